"""An independent implementation to check against: numpy and scipy, nothing of the package.

Schedules by hand with their derivatives, the posterior mean of a Gaussian mixture through linear
solves, and the probability-flow ODE under an adaptive eighth-order method.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp

Array = np.ndarray


@dataclass(frozen=True)
class Levels:
    """alpha, sigma and their derivatives in t."""

    alpha: float
    sigma: float
    alpha_prime: float
    sigma_prime: float


def vp(t: float) -> Levels:
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    alpha, sigma = math.exp(-integral / 2), math.sqrt(-math.expm1(-integral))
    steep = beta * alpha**2 / (2 * sigma) if sigma else math.inf
    return Levels(alpha, sigma, -beta * alpha / 2, steep)


def cosine(t: float) -> Levels:
    angle, rate = math.pi * t / 2, math.pi / 2
    alpha, sigma = math.cos(angle), math.sin(angle)
    return Levels(alpha, sigma, -rate * sigma, rate * alpha)


def ve(t: float) -> Levels:
    growth = math.log(80 / 0.002)
    sigma = 0.002 * math.exp(growth * t)
    return Levels(1.0, sigma, 0.0, growth * sigma)


def linear(t: float) -> Levels:
    return Levels(1 - t, t, -1.0, 1.0)


LEVELS: dict[str, Callable[[float], Levels]] = {
    "VP": vp,
    "Cosine": cosine,
    "VE": ve,
    "Linear": linear,
}


@dataclass(frozen=True, eq=False)
class Mixture:
    """A Gaussian mixture: means (K, d), covariances (K, d, d), weights (K,)."""

    means: Array
    covariances: Array
    weights: Array

    @property
    def mean(self) -> Array:
        return self.weights @ self.means

    @property
    def covariance(self) -> Array:
        spread = self.means - self.mean
        within = np.einsum("k,kij->ij", self.weights, self.covariances)
        return within + np.einsum("k,ki,kj->ij", self.weights, spread, spread)

    def draw(self, n: int, seed: int) -> Array:
        """n samples (n, d)."""
        random = np.random.default_rng(seed)
        which = random.choice(len(self.weights), n, p=self.weights)
        roots = np.linalg.cholesky(self.covariances)[which]
        z = random.standard_normal((n, self.means.shape[1]))
        return self.means[which] + np.einsum("nij,nj->ni", roots, z)

    def log_density(self, x: Array, alpha: float = 1.0, sigma: float = 0.0) -> Array:
        """log p(x_t), (B,)."""
        return np.logaddexp.reduce(self._joint(x, alpha, sigma)[0], axis=0)

    def posterior_mean(self, x: Array, alpha: float, sigma: float) -> Array:
        """E[x_0 | alpha x_0 + sigma eps = x], (B, d)."""
        logs, away, gain = self._joint(x, alpha, sigma)
        share = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
        each = self.means[:, :, None] + gain @ away
        return (share[:, None] * each).sum(0).T

    def _joint(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array, Array]:
        """log(weight p(x | k)) (K, B), x - alpha mean (K, d, B), and its gain (K, d, d)."""
        inverse, gain, norm = self._at(alpha, sigma)
        away = x.T - alpha * self.means[:, :, None]
        logs = -0.5 * ((away * (inverse @ away)).sum(1) + norm[:, None])
        return np.log(self.weights)[:, None] + logs, away, gain

    @functools.lru_cache(maxsize=2**14)  # noqa: B019  the laws live as long as the tests
    def _at(self, alpha: float, sigma: float) -> tuple[Array, Array, Array]:
        """Of S = alpha^2 C + sigma^2: its inverse, alpha C S^-1, and log det(2 pi S)."""
        d = self.means.shape[1]
        total = alpha**2 * self.covariances + sigma**2 * np.eye(d)
        inverse = np.linalg.inv(total)
        norm = np.log(np.linalg.det(total)) + d * math.log(2 * math.pi)
        return inverse, alpha * self.covariances @ inverse, norm


def flow(law: Mixture, schedule: str, x: Array, start: float, end: float) -> Array:
    """x at time `end` of the probability-flow ODE in t, from x (B, d) at `start`."""
    levels = LEVELS[schedule]

    def slope(t: float, flat: Array) -> Array:
        now, state = levels(t), flat.reshape(x.shape)
        clean = law.posterior_mean(state, now.alpha, now.sigma)
        noise = (state - now.alpha * clean) / now.sigma
        return (now.alpha_prime * clean + now.sigma_prime * noise).ravel()

    return _integrate(slope, x, start, end)


def flow_in_ratio(law: Mixture, schedule: str, x: Array, start: float, end: float) -> Array:
    """The same through another variable: y = x/alpha against log(sigma/alpha)."""
    first, last = LEVELS[schedule](start), LEVELS[schedule](end)

    def slope(u: float, flat: Array) -> Array:
        y = flat.reshape(x.shape)
        return (y - law.posterior_mean(y, 1.0, math.exp(u))).ravel()

    ends = math.log(first.sigma / first.alpha), math.log(last.sigma / last.alpha)
    return last.alpha * _integrate(slope, x / first.alpha, *ends)


def gaussian_flow(law: Mixture, schedule: str, x: Array, start: float, end: float) -> Array:
    """The ODE's solution in closed form for one Gaussian: standardised coordinates do not move."""
    (mean,), (covariance,) = law.means, law.covariances
    variance, basis = np.linalg.eigh(covariance)
    a, b = LEVELS[schedule](start), LEVELS[schedule](end)
    still = (x - a.alpha * mean) @ basis / np.sqrt(a.alpha**2 * variance + a.sigma**2)
    return b.alpha * mean + (still * np.sqrt(b.alpha**2 * variance + b.sigma**2)) @ basis.T


def _integrate(slope: Callable[[float, Array], Array], x: Array, start: float, end: float) -> Array:
    solution = solve_ivp(
        slope, (start, end), x.ravel(), method="DOP853", rtol=1e-12, atol=1e-13, t_eval=(end,)
    )
    assert solution.success, solution.message
    return solution.y[:, -1].reshape(x.shape)
