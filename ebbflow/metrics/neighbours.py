"""Precision, recall, density and coverage from nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebbflow.metrics._vectors import distances, pair


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Share of `generated` (m, d) within the support of `real` (n, d), and the reverse.

    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models",
    eq. 1 and 2: a set's support is the union of balls around its points, each as wide as the
    distance to the k-th neighbour.
    """
    real, generated = pair(real, generated, least=neighbours + 1)
    _, balls_of_generated = _inside(real, _radii(real, neighbours), generated)
    _, balls_of_real = _inside(generated, _radii(generated, neighbours), real)
    return PrecisionRecall(_share(balls_of_generated), _share(balls_of_real))


def density_coverage(real: Tensor, generated: Tensor, *, neighbours: int = 5) -> DensityCoverage:
    """Real balls around a generated point, over k, and the share of real balls that hold any.

    Naeem et al., "Reliable fidelity and diversity metrics for generative models", §3.
    The density's mean is 1 for equal laws, and it can be larger.
    """
    real, generated = pair(real, generated, least=neighbours + 1)
    points_of_real, balls_of_generated = _inside(real, _radii(real, neighbours), generated)
    density = float(balls_of_generated.double().mean()) / neighbours
    return DensityCoverage(density, _share(points_of_real))


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance (n,) of every point to its k-th nearest other point."""
    radii = []
    for start, block in distances(x, x):
        block.diagonal(start).fill_(torch.inf)
        radii.append(block.topk(neighbours, largest=False).values[:, -1])
    return torch.cat(radii)


def _inside(centres: Tensor, radii: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The number of points in each ball (n,), and of balls around each point (m,)."""
    points_of, balls_of = [], torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for start, block in distances(centres, points):
        # The k-th neighbour itself lies on the sphere; rounding must not push it out.
        within = block <= radii[start : start + len(block), None] * (1 + 1e-9)
        points_of.append(within.sum(1))
        balls_of += within.sum(0)
    return torch.cat(points_of), balls_of


def _share(counts: Tensor) -> float:
    return float((counts > 0).double().mean())
