"""Semi-discrete optimal transport: from a law that can be drawn to finitely many points.

The map that moves X to points y_i of masses nu_i at the least mean square distance is the gradient
of a convex function, `u_h(x) = max_i (<x, y_i> + h_i)`: `T(x) = y_i` on the cell where i is the
maximum. The heights h minimise the convex `E(h) = E u_h(X) - sum_i nu_i h_i`, whose gradient is
`w(h) - nu`, the masses of the cells less the masses wanted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ebbflow.progress import bar

Source = Callable[[int, torch.Generator], Tensor]
"""`source(count, generator)`: independent draws (count, d) of the law that is moved."""

ELEMENTS = 2**23
"""Of the largest table of draws against points that is held at once."""

ROUND = 50
"""Iterations after which progress is looked at."""

USUAL = 20
"""Rounds that most problems take, for the progress bar."""

logger = logging.getLogger("ebbflow")


def standard_normal(d: int) -> Source:
    """N(0, 1) in d dimensions, in float64."""
    return lambda n, generator: torch.randn(n, d, dtype=torch.float64, generator=generator)


class Cells(NamedTuple):
    """Masses of the cells by counting draws, (n,), and their standard errors."""

    masses: Tensor
    standard_errors: Tensor


@dataclass(frozen=True)
class SemiDiscrete:
    """The map `T(x) = y_i`, `i = argmax_i <x, y_i> + h_i`; heights have mean zero.

    targets: y, (n, d); weights: nu, (n,); heights: h, (n,).
    error: a bound (two standard errors above an estimate without bias) of the root mean square
        relative error of the cells' masses, `sqrt(sum_i (w_i - nu_i)²/nu_i)`; 0 where h is exact.
    status: "converged", or what is missing; samples: draws spent, the check included.
    """

    targets: Tensor
    weights: Tensor
    heights: Tensor
    error: float
    status: str = "converged"
    samples: int = 0

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    def index(self, x: Tensor) -> Tensor:
        """The cell of each x (B, d): (B,)."""
        return self.highest(x, 1)[1][:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        """T(x), (B, d), in the dtype and on the device of x."""
        return self.targets[self.index(x)].to(x)

    def potential(self, x: Tensor) -> Tensor:
        """u_h(x), (B,)."""
        return self.highest(x, 1)[0][:, 0]

    def highest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k highest planes over each x, best first: heights there and indices, (B, k) each."""
        found = [torch.topk(values, k, dim=1) for values in self._planes(x)]
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    def angles(self, x: Tensor) -> Tensor:
        """Angle (B,), in radians, between the two highest planes over each x.

        Their normals are (y_i, -1); the angle is the bend of u_h at the border nearest in height.
        """
        if len(self.targets) < 2:
            return torch.zeros(len(x), dtype=self.targets.dtype)
        pair = self.targets[self.highest(x, 2)[1]]
        normals = torch.cat((pair, -torch.ones_like(pair[..., :1])), -1)
        first, second = (normals / normals.norm(dim=-1, keepdim=True)).unbind(1)
        # By chords: the arc cosine of a number near one has no digits left.
        return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1))

    def cells(self, source: Source, samples: int, seed: int = 0) -> Cells:
        """Masses of the cells under a law, from this many draws."""
        masses = self.count(source, samples, torch.Generator().manual_seed(seed)) / samples
        return Cells(masses, (masses * (1 - masses) / samples).sqrt())

    def count(self, source: Source, samples: int, generator: torch.Generator) -> Tensor:
        """How many of `samples` draws fall in each cell, (n,), float64."""
        n, total = len(self.targets), torch.zeros(len(self.targets), dtype=torch.float64)
        part = max(1, ELEMENTS // n)
        for first in range(0, samples, part):
            x = source(min(part, samples - first), generator)
            total += torch.bincount(self.index(x), minlength=n).cpu()
        return total

    def _planes(self, x: Tensor) -> Iterator[Tensor]:
        """`<x, y_i> + h_i` for some rows of x at a time."""
        if x.ndim != 2 or x.shape[1] != self.targets.shape[1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: these targets need (B, {self.targets.shape[1]})"
            )
        heights = self.heights.to(self.targets)
        for part in x.to(self.targets).split(max(1, ELEMENTS // len(self.targets))):
            yield torch.addmm(heights, part, self.targets.T)


class NotConverged(RuntimeError):
    """The masses of the cells missed the tolerance; `result` is the map that was reached."""

    def __init__(self, result: SemiDiscrete) -> None:
        super().__init__(result.status)
        self.result = result


def monotone(
    targets: Tensor, quantile: Callable[[Tensor], Tensor], weights: Tensor | None = None
) -> SemiDiscrete:
    """The exact map in one dimension, to targets (n,): their order is kept.

    The cells of the sorted y_i are the source's quantile intervals, whose borders are
    `b_i = quantile(nu_1 + … + nu_i)`, and u_h is continuous there: `h_i - h_{i+1} = b_i (y_{i+1} -
    y_i)`. quantile: the inverse distribution function, such as `torch.special.ndtri`.
    """
    targets, weights = _checked(targets[:, None], weights)
    order = targets[:, 0].argsort()
    y = targets[order, 0]
    borders = quantile(weights[order].cumsum(0)[:-1])
    heights = torch.zeros_like(y)
    heights[1:] = -(borders * y.diff()).cumsum(0)
    heights = torch.empty_like(heights).index_copy_(0, order, heights - heights.mean())
    return SemiDiscrete(targets, weights, heights, 0.0)


def semi_discrete(
    targets: Tensor,
    source: Source | None = None,
    weights: Tensor | None = None,
    *,
    tolerance: float = 0.05,
    seed: int = 0,
    learning_rate: float = 0.1,
    max_samples: int | None = None,
    strict: bool = True,
    progress: bool = False,
) -> SemiDiscrete:
    """Solve for the heights by stochastic gradients of growing batches.

    Adam on `w(h) - nu`, with w counted from n draws at first. After a round of 50 iterations the
    rate grows if the gradients of its halves agree; else, if the gradient is no better, the rate
    halves and the draws grow by half. The heights are averaged over a round. They are accepted
    on fresh draws only: when no cell is empty and `error`, the noise of counting taken away, is at
    most `tolerance`. That test alone takes 4 n / tolerance² draws, the whole a few times as many.

    Args:
        targets: y, (n, d), all different, float32 or float64, which the planes are computed in.
        source: the law that is moved, the very one that the map will be fed; N(0, 1) unless given.
        weights: nu, (n,), positive, of sum 1; equal unless given.
        learning_rate: the first step in h, in units of the typical <x, y>/sqrt(n).
        max_samples: draws to spend, 400 n / tolerance² unless given.
        strict: raise NotConverged; otherwise log a warning and say so in `status`.

    Raises ValueError for targets and weights that do not fit.
    DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport, algorithm 1, with
    another start (the nearest point), rates that find themselves, averages, and a test that neither
    counting noise nor a lucky draw passes.
    """
    targets, weights = _checked(targets, weights)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must lie in (0, 1): it is a relative error")
    n, d = targets.shape
    source = standard_normal(d) if source is None else source
    generator = torch.Generator().manual_seed(seed)
    final = math.ceil(4 * n / tolerance**2)
    budget = 100 * final if max_samples is None else max_samples
    x = source(1000, generator)
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"the source draws shape {tuple(x.shape)}: the targets need (count, {d})")
    centred = (targets - weights.to(targets) @ targets).double().cpu()
    spread_y = (weights @ centred.square().sum(1)).sqrt().item()
    spread_x = (x.double() - x.double().mean(0)).square().sum(1).mean().sqrt().item()
    scale = spread_x * spread_y / d  # of <x, y> and so of heights
    # Where the targets are the source's own points, times a number, the cells are those nearest.
    height = -centred.square().sum(1) * spread_x / (2 * spread_y) if n > 1 else torch.zeros(1)
    height = (height - height.mean()).double()

    def at(h: Tensor) -> SemiDiscrete:
        return SemiDiscrete(targets, weights, h, math.inf)

    m, v = torch.zeros_like(height), torch.zeros_like(height)
    draws, rate = max(n, 200), learning_rate * scale / math.sqrt(n)
    average, best, bound, empty, spent, steps = height, math.inf, math.inf, n, 1000, count(1)
    with bar("solving the transport", USUAL, progress) as advance:
        while spent < budget:
            heights, halves = torch.zeros_like(height), torch.zeros(2, n, dtype=torch.float64)
            for i in range(ROUND):
                step = next(steps)
                gradient = at(height).count(source, draws, generator) / draws - weights
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
                change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-12)
                height = height - rate * change
                height = height - height.mean()
                heights, spent = heights + height, spent + draws
                halves[2 * i // ROUND] += gradient
            average = heights / ROUND
            advance()
            for checked in sorted({min(4 * draws, final), final}):
                bound, empty = _error(at(average), source, checked, generator)
                spent += checked
                if bound > tolerance or empty:
                    break
            else:
                return SemiDiscrete(targets, weights, average, bound, samples=spent)
            norm = halves.sum(0).norm().item()
            along = torch.cosine_similarity(halves[0], halves[1], dim=0).item()
            if along > 0.5:
                rate = rate * (3 if along > 0.8 else 1.5)
            elif norm > 0.9 * best:
                draws, rate, best = math.ceil(1.5 * draws), rate / 2, math.inf
            best = min(best, norm)
    status = (
        f"not converged: the cells' masses are {bound:.3g} off (tolerance {tolerance:g}) and "
        f"{empty} of {n} cells empty after {spent} draws; raise max_samples or tolerance"
    )
    result = SemiDiscrete(targets, weights, average, bound, status, spent)
    if strict:
        raise NotConverged(result)
    logger.warning("semi-discrete transport %s", status)
    return result


def _error(
    map_: SemiDiscrete, source: Source, samples: int, generator: torch.Generator
) -> tuple[float, int]:
    """A bound above the root mean square relative error of the masses, and the empty cells.

    `sum (w - nu)²/nu` counts its own noise too, `sum w (1 - w)/(nu samples)` in the mean, which is
    taken away; the bound lies two standard errors above what is left.
    """
    counts, nu = map_.count(source, samples, generator), map_.weights
    w = counts / samples
    noise = w * (1 - w) / (nu * samples)
    excess = ((w - nu).square() / nu - noise).sum()
    # Of the noise alone, and of its product with the error.
    spread = (2 * noise.square().sum()).sqrt()
    spread = spread + 2 * (((w - nu) / nu).square() * w / samples).sum().sqrt()
    return (excess + 2 * spread).clamp(min=0).sqrt().item(), int((counts == 0).sum())


def _checked(targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets (n, d), and weights (n,) in float64 of sum 1."""
    if targets.ndim != 2 or not len(targets) or not targets.is_floating_point():
        raise ValueError(
            f"targets are {targets.dtype} of {tuple(targets.shape)}: give floats (n, d)"
        )
    if not bool(torch.isfinite(targets).all()):
        raise ValueError("the targets hold NaN or infinite values")
    if len(targets.unique(dim=0)) != len(targets):
        raise ValueError("some targets are equal: merge them, and add their weights")
    n = len(targets)
    if weights is None:
        return targets, torch.full((n,), 1 / n, dtype=torch.float64)
    nu = weights.double()
    total = nu.sum().item()
    if nu.shape != (n,) or not bool((nu > 0).all()) or not abs(total - 1) < 1e-6:
        raise ValueError(
            f"weights have shape {tuple(nu.shape)}, least value {nu.min().item():g} and sum "
            f"{total:g}: give {n} positive ones of sum 1"
        )
    return targets, nu / total
