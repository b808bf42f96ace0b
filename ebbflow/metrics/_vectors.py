"""What every metric asks of its input, and distances between two sets in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 22  # distances held at once: 32 MiB in float64


def vectors(x: Tensor, name: str, least: int = 2) -> Tensor:
    """`x` (n, d) in float64; raises ValueError unless it is finite, floating and n >= `least`."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floats of shape (n, d), got {x.dtype} of shape {tuple(x.shape)}: "
            "flatten images with x.flatten(1), or pass their features"
        )
    if len(x) < least:
        raise ValueError(f"{name} holds {len(x)} vectors, at least {least} are needed")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise ValueError(f"{bad} of the {len(x)} vectors of {name} hold NaN or infinity")
    return x.detach().double()


def pair(x: Tensor, y: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Two sets of vectors of the same width, in float64."""
    x = vectors(x, "the first set", least)
    y = vectors(y, "the second set", least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"vectors of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared")
    return x, y


def distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Euclidean distances of successive rows of `x` to all of `y`: (first row, (rows, len(y))).

    |x - y|² = |x|² + |y|² - 2 x·y, seven times as fast as differences, is rounding alone where
    x = y; less than float32 could resolve counts as zero.
    """
    centre = y.mean(0)
    x, y = x - centre, y - centre
    squares_x, squares_y = x.square().sum(1, keepdim=True), y.square().sum(1)
    rows = max(1, BLOCK // len(y))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        squares = torch.addmm(squares_y, x[part], y.T, alpha=-2.0).add_(squares_x[part])
        floor = 1e-14 * (squares_x[part] + squares_y.max())
        yield start, squares.masked_fill_(squares < floor, 0.0).sqrt_()
