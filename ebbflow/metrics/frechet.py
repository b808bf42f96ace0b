"""Fréchet distance between the Gaussians with the moments of two sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ebbflow.metrics._vectors import vectors


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean (d,) and scatter (d, d) = sum (x - mean)(x - mean)ᵀ of a set, in float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(x: Tensor) -> Moments:
        """The moments of vectors (n, d)."""
        x = vectors(x, "the set", least=1)
        mean = x.mean(0)
        return Moments(len(x), mean, (x - mean).T @ (x - mean))

    @staticmethod
    def stream(batches: Iterable[Tensor]) -> Moments:
        """The moments of the union of batches (b, d), which need not be in memory together."""
        return reduce(Moments.merge, map(Moments.of, batches))

    def merge(self, other: Moments) -> Moments:
        """The moments of the union of two sets.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances".
        """
        count = self.count + other.count
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.scatter
            + other.scatter
            + torch.outer(shift, shift) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (d, d)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


def gaussian_frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """|m_a - m_b|² + tr(A + B) - 2 tr sqrt(A B), for means (d,) and covariances (d, d).

    Dowson and Landau, "The Fréchet distance between multivariate normal distributions". With
    symmetric roots, sqrt(A B) has the eigenvalues of sqrt(sqrt(A) B sqrt(A)): the singular values
    of sqrt(A) sqrt(B). They are real, and accurate to rounding where A or B is singular.
    """
    shift = mean_a.double() - mean_b.double()
    A, B = covariance_a.double(), covariance_b.double()
    trace_root = torch.linalg.svdvals(_root(A).T @ _root(B)).sum()
    return max(0.0, float(shift @ shift + A.trace() + B.trace() - 2.0 * trace_root))


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments, *, allow_few: bool = False) -> float:
    """Fréchet distance (squared, as is customary) of two sets of vectors (n, d), or their moments.

    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash
    equilibrium", eq. 6. It is biased upwards by about 1/n: compare at equal counts. Raises
    ValueError for fewer samples than d, unless `allow_few`.
    """
    a = a if isinstance(a, Moments) else Moments.of(a)
    b = b if isinstance(b, Moments) else Moments.of(b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"sets of {len(a.mean)} and {len(b.mean)} features cannot be compared")
    count, features = min(a.count, b.count), len(a.mean)
    if count < features and not allow_few:
        raise ValueError(
            f"{count} samples are fewer than the {features} features: their covariance is "
            f"singular and the Fréchet distance mostly bias; give at least {features}, "
            "or allow few samples (allow_few=True, --allow-few)"
        )
    return gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def _root(covariance: Tensor) -> Tensor:
    """A factor R (d, rank) with R Rᵀ = covariance, orthogonal columns.

    Eigenvalues that rounding alone explains are left out: their roots, 1e-8, would be no rounding
    error any more.
    """
    values, directions = torch.linalg.eigh(covariance)
    kept = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return directions[:, kept] * values[kept].sqrt()
