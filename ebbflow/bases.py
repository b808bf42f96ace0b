"""Orthonormal coordinates of a state: its own, cosines of an image, or the columns of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["identity", "cosine", "matrix"]


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal coordinates of samples of one shape.

    Args:
        kind: "identity"; "cosine", the two-dimensional DCT-II over the last two axes; or "matrix".
        shape: of the coordinates of one sample, and of coefficients: (*shape), or (d,) of a matrix.
        matrix: (d, d), the orthonormal columns, for kind "matrix".
    """

    kind: Kind
    shape: tuple[int, ...]
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        d = math.prod(self.shape)
        if self.kind not in ("identity", "cosine", "matrix") or d < 1:
            raise ValueError(
                f"basis {self.kind!r} of shape {self.shape}: use identity, cosine, matrix"
            )
        if self.kind == "cosine" and len(self.shape) < 2:
            raise ValueError(f"cosines need two axes, the shape is {self.shape}")
        if (self.kind == "matrix") != (self.matrix is not None):
            raise ValueError("a matrix is needed by, and only by, kind 'matrix'")
        if self.matrix is not None:
            unit = torch.eye(d, dtype=torch.float64)
            away = self.matrix.double().T @ self.matrix.double()
            if (
                self.shape != (d,)
                or self.matrix.shape != (d, d)
                or (away - unit).abs().max() > 1e-5
            ):
                raise ValueError(
                    f"a basis of shape {self.shape} needs an orthonormal ({d}, {d}) matrix"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Basis) or (self.kind, self.shape) != (other.kind, other.shape):
            return False
        if self.matrix is None or other.matrix is None:
            return self.matrix is other.matrix
        return torch.equal(self.matrix, other.matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates (B, *self.shape) of states (B, *shape)."""
        if self.matrix is None:
            return cosines(x) if self.kind == "cosine" else x
        return x.reshape(len(x), -1) @ self.matrix.to(x.device, x.dtype)

    def inverse(self, z: Tensor, shape: torch.Size) -> Tensor:
        """The states, of shape (B, *shape), with these coordinates."""
        if self.matrix is None:
            return cosines(z, inverse=True) if self.kind == "cosine" else z
        return (z @ self.matrix.to(z.device, z.dtype).T).reshape(shape)


def cosines(x: Tensor, inverse: bool = False) -> Tensor:
    """Orthonormal DCT-II over the last two axes, or its inverse."""
    for axis in (-2, -1):
        n = x.shape[axis]
        k = torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
        matrix[0] /= math.sqrt(2)
        matrix = (matrix.T if inverse else matrix).to(x.device, x.dtype)
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (d,) and principal axes (d, d) of rows x (N, d); tiny negative variances are 0."""
    return eigen(torch.atleast_2d(torch.cov(x.T)))


def eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, negative ones of round-off set to 0, and eigenvectors of a covariance."""
    variance, basis = torch.linalg.eigh(covariance.double())
    rounded = variance.abs() < 1e-6 * variance.abs().max()
    return torch.where(rounded, variance.clamp(min=0), variance), basis


def leading(x: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Of rows (N, d): the largest variances (r,), their axes (d, r), the mean variance off them."""
    centred = x - x.mean(0)
    rank = min(rank, len(x) - 1, x.shape[1])
    _, scale, basis = torch.linalg.svd(centred, full_matrices=False)
    variance = scale**2 / (len(x) - 1)
    rest = x.shape[1] - rank
    residual = float(variance[rank:].sum() / rest) if rest else 0.0
    return variance[:rank], basis[:rank].T.contiguous(), residual
