"""Oracles: laws whose denoiser is known in closed form, the ground truth of every check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.schedules import Schedule, along
from ebbflow.statistics import Statistics


def _uniform(seed: int, n: int) -> Tensor:
    """Uniform numbers (n,), one a sample index, from the counter-based noise."""
    return torch.special.ndtr(noise.normal(seed, range(n), 0, (1,), torch.float64, stream=1))[:, 0]


class GaussianMixture:
    """A mixture of K Gaussians in d dimensions.

    Args:
        means: (K, d).
        covariances: (K, d, d), or (K,) variances of isotropic components.
        weights: (K,), non-negative; normalised to sum to 1.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        weights = torch.as_tensor(weights, dtype=torch.float64)
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means must be (K, d), got {tuple(self.means.shape)}")
        k, d = self.means.shape
        if covariances.shape not in ((k,), (k, d, d)) or weights.shape != (k,):
            raise ValueError(
                f"means {(k, d)} need covariances (K, d, d) or (K,) and weights (K,); got "
                f"{tuple(covariances.shape)} and {tuple(weights.shape)}"
            )
        if bool((weights < 0).any()) or weights.sum() <= 0:
            raise ValueError(f"weights must be non-negative with a positive sum, got {weights}")
        self.weights = weights / weights.sum()
        if covariances.ndim == 1:
            covariances = covariances[:, None, None] * torch.eye(d, dtype=torch.float64)
        self.covariances = covariances
        self._variances, self._bases = torch.linalg.eigh(covariances)
        if bool((self._variances < -1e-12).any()):
            raise ValueError("a covariance has a negative eigenvalue")

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        centred = self.means - self.mean
        between = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return between + torch.einsum("k,kij->ij", self.weights, self.covariances)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n samples (n, d), float64; sample i depends on the seed and i only."""
        which = torch.searchsorted(self.weights.cumsum(0), _uniform(seed, n))
        which = which.clamp(max=len(self.weights) - 1)
        z = noise.normal(seed, range(n), 1, self.means.shape[1:], torch.float64, stream=1)
        z = z * self._variances.clamp(min=0).sqrt()[which]
        return self.means[which] + torch.einsum("nij,nj->ni", self._bases[which], z)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats at x (B, d)."""
        one = torch.ones((), dtype=torch.float64)
        return torch.logsumexp(self._joint(x.double(), one, 0 * one)[0], 1)

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(weight_k p(x_t | k)) (B, K), and E[x_0 | x_t, k] (B, K, d)."""
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        total = alpha**2 * self._variances + sigma**2  # (B or 1, K, d)
        z = torch.einsum("bki,kij->bkj", x[:, None] - alpha * self.means, self._bases)
        log_densities = -0.5 * (z**2 / total + torch.log(2 * math.pi * total)).sum(-1)
        shrunk = alpha * self._variances / total * z
        means = self.means + torch.einsum("bkj,kij->bki", shrunk, self._bases)
        return torch.log(self.weights) + log_densities, means

    def denoiser(self, schedule: Schedule, statistics: bool = False) -> Denoiser:
        """The exact `E[x_0 | x_t]`, computed in float64; with `statistics`, it carries its own."""

        def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            log_joint, means = self._joint(x.double(), alpha, sigma)
            return (torch.softmax(log_joint, 1)[:, :, None] * means).sum(1).to(x.dtype)

        known = Statistics.exact(self.mean, self.covariance) if statistics else None
        return Denoiser(posterior_mean, schedule, shape=self.means.shape[1:], statistics=known)


class Empirical:
    """The empirical law of a data set, each point widened to a Gaussian of deviation `bandwidth`.

    data: (N, *shape). Its denoiser is the ideal one of that data set.
    """

    def __init__(self, data: Tensor, bandwidth: float = 0.0) -> None:
        self.data = torch.as_tensor(data, dtype=torch.float64)
        if self.data.ndim < 2 or not bool(torch.isfinite(self.data).all()):
            raise ValueError(f"data must be finite, (N, *shape); got {tuple(self.data.shape)}")
        if not 0 <= bandwidth < math.inf:
            raise ValueError(f"bandwidth must be non-negative, got {bandwidth}")
        self.bandwidth = float(bandwidth)
        self._flat = self.data.reshape(len(self.data), -1)
        self._squares = self._flat.square().sum(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n samples (n, *shape), float64; sample i depends on the seed and i only."""
        which = (_uniform(seed, n) * len(self.data)).long().clamp(max=len(self.data) - 1)
        z = noise.normal(seed, range(n), 1, self.data.shape[1:], torch.float64, stream=1)
        return self.data[which] + self.bandwidth * z

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats at x (B, *shape); needs a positive bandwidth."""
        if self.bandwidth == 0:
            raise ValueError("an empirical law of bandwidth 0 has no density: give a bandwidth")
        flat = x.double().reshape(len(x), -1)
        variance = self.bandwidth**2
        norm = 0.5 * flat.shape[1] * math.log(2 * math.pi * variance) + math.log(len(self.data))
        distance = torch.cdist(flat, self._flat, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.logsumexp(-0.5 * distance.square() / variance, 1) - norm

    def denoiser(self, schedule: Schedule, statistics: bool = False) -> Denoiser:
        """The exact `E[x_0 | x_t]`, computed in float64; with `statistics`, it carries its own."""

        def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
            flat = x.double().reshape(len(x), -1)
            alpha, sigma = (along(v, flat) for v in (schedule.alpha(t), schedule.sigma(t)))
            total = alpha**2 * self.bandwidth**2 + sigma**2
            # |x|² is the same for every point and drops out of the weights.
            logits = (alpha * (flat @ self._flat.T) - 0.5 * alpha**2 * self._squares) / total
            nearest = torch.softmax(logits, 1) @ self._flat
            widened = alpha * self.bandwidth**2 / total * (flat - alpha * nearest)
            return (nearest + widened).reshape(x.shape).to(x.dtype)

        known = None
        if statistics:
            centred = self._flat - self._flat.mean(0)
            covariance = centred.T @ centred / len(centred)
            covariance += self.bandwidth**2 * torch.eye(len(covariance), dtype=torch.float64)
            known = Statistics.exact(self.data.mean(0), covariance)
        return Denoiser(posterior_mean, schedule, shape=self.data.shape[1:], statistics=known)
