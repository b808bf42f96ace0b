"""Energy distance."""

from __future__ import annotations

from torch import Tensor

from ebbflow.metrics._vectors import distances, pair


def energy_distance(x: Tensor, y: Tensor, *, unbiased: bool = True) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| for sets (n, d) and (m, d): zero only for equal laws.

    Székely and Rizzo, "Energy statistics: a class of statistics based on distances". The
    unbiased form leaves the pairs i = j out and may be negative; the other, the V-statistic, is the
    energy distance of the two empirical laws and never is.
    """
    x, y = pair(x, y)
    n, m = len(x), len(y)
    own = 1 if unbiased else 0
    between = _sum(x, y) / (n * m)
    return 2.0 * between - _sum(x, x) / (n * (n - own)) - _sum(y, y) / (m * (m - own))


def _sum(x: Tensor, y: Tensor) -> float:
    return sum(float(block.sum()) for _, block in distances(x, y))
