"""Sliced Wasserstein distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ebbflow.metrics._vectors import pair


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, p: float = 2.0, projections: int = 256, seed: int = 0
) -> float:
    """(mean over random directions u of W_p^p(u·x, u·y))^(1/p) for sets (n, d) and (m, d).

    Bonneel et al., "Sliced and Radon Wasserstein barycenters of measures", with directions uniform
    on the sphere, drawn by `seed`. On a line the optimal coupling joins equal quantiles;
    for n != m it is exact too: the quantile functions are steps, with n + m - gcd(n, m) pieces.
    """
    x, y = pair(x, y, least=1)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, x.shape[1], generator=generator, dtype=x.dtype)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x.device)
    n, m = len(x), len(y)
    # The ends of the pieces, as multiples of 1/(n m): integers, so that equal ones are equal.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique().to(x.device)
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    of_x, of_y = (ends - 1) // m, (ends - 1) // n
    total = 0.0
    for u in directions.split(32):
        quantiles_x = (x @ u.T).sort(0).values[of_x]
        quantiles_y = (y @ u.T).sort(0).values[of_y]
        total += float((widths @ (quantiles_x - quantiles_y).abs() ** p).sum())
    return (total / projections) ** (1.0 / p)
