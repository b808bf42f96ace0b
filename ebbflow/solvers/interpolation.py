"""The coefficients that all families share: integrals of interpolated predictions over a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rule = Callable[[Sequence[float], float, float], list[float]]
"""`rule(u, h, rate)`: weights w in `∫_0^h rate e^{rate (u - h)} D(lambda + u) du = sum_j w_j D_j`.

D_j is known at the offset u_j in lambda; u[0] = 0. The data form has rate 1 (2 for the SDE), the
noise form -1.
"""


def phi(z: float, k: int) -> float:
    """`phi_k(z) = ∫_0^1 e^{z (1 - s)} s^{k - 1} ds / (k - 1)!`, k >= 1, by its series near zero."""
    if abs(z) < 1:
        return sum(z**m / math.factorial(m + k) for m in range(18))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def interpolated(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights of the polynomial through values at `nodes` under a measure.

    moments[p] is the measure's integral of u^p, one for each node.
    """
    weights = []
    for j, node in enumerate(nodes):
        basis = [1.0]  # the Lagrange polynomial of node j, by rising powers
        for other in (v for i, v in enumerate(nodes) if i != j):
            scale = 1 / (node - other)
            shifted = [0.0, *(c * scale for c in basis)]
            basis = [s - c * other * scale for s, c in zip(shifted, [*basis, 0.0], strict=True)]
        weights.append(sum(c * m for c, m in zip(basis, moments, strict=True)))
    return weights


def polynomial(u: Sequence[float], h: float, rate: float) -> list[float]:
    """D is the polynomial through its known values, integrated exactly."""
    z = -rate * h
    moments = [rate * h ** (p + 1) * math.factorial(p) * phi(z, p + 1) for p in range(1, len(u))]
    return interpolated(u, [-math.expm1(z), *moments])


def midpoint(u: Sequence[float], h: float, rate: float) -> list[float]:
    """D is its linear extrapolation at the middle of the step."""
    total = -math.expm1(-rate * h)
    if len(u) == 1:
        return [total]
    ratio = -h / (2 * u[1])
    return [total * (1 + ratio), -total * ratio]
