"""Polynomials in θ that a tableau's dense output is made of."""

from __future__ import annotations

from collections.abc import Sequence

from ebbflow.differentiation.trees import Rows


def product(*factors: Sequence[float]) -> tuple[float, ...]:
    """The product of polynomials given by their coefficients, lowest degree first."""
    out = [1.0]
    for factor in factors:
        new = [0.0] * (len(out) + len(factor) - 1)
        for i, x in enumerate(out):
            for j, y in enumerate(factor):
                new[i + j] += x * y
        out = new
    return tuple(out)


def hermite(b: Sequence[float]) -> Rows:
    """The cubic through both ends with their slopes, for stages that begin and end with f there."""
    rows = [[0.0, 3 * x, -2 * x] for x in b]
    for row, extra in ((rows[0], (1.0, -2.0, 1.0)), (rows[-1], (0.0, -1.0, 1.0))):
        for i, x in enumerate(extra):
            row[i] += x
    return tuple(tuple(row) for row in rows)
