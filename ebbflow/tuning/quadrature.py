"""What each residual of a plan weighs in each later state, if residuals are a Gaussian process."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ebbflow.solvers.quadrature import FAR as FAR
from ebbflow.solvers.quadrature import matern

JITTER = 1e-6
LENGTH = 2.0  # of the process, e-folds of s
PANELS = 4


def quadrature(lambda_: Tensor, ends: Tensor, variance: Tensor) -> Tensor:
    """C (n + 1, n, d) with `w_k = w_0 + sum_{j<k} C_kj rho_j`.

    `dw/dlambda = -rho / sqrt(L + s²)`, and rho is the decay `s / sqrt(L + s²)` times a Matérn 7/2
    process in `lambda = log s`, of which the mean given the calls before is integrated; from the
    start down to the first call, given that call.

    lambda_: (n,) of the calls, falling; ends: (2,) of the first state and the last, which may be
    infinite; variance: L (d,).
    """
    n, length = len(lambda_), torch.tensor(LENGTH, dtype=torch.float64)

    def decay(lambda_: Tensor) -> Tensor:
        square = torch.exp(2 * lambda_)[:, None]
        return (square / (variance + square)).sqrt()

    now = lambda_.tolist()
    start, end = ends.tolist()
    begin = torch.cat([lambda_.new_tensor([min(start, now[0] + FAR)]), lambda_])
    stop = torch.cat([lambda_, lambda_.new_tensor([max(end, now[-1] - FAR)])])
    # Interval i ends at call i, its integrand given the calls before; the first, above call 0, is
    # given that call alone.
    known = torch.tril(torch.ones(n + 1, n, dtype=torch.bool), -1)
    known[0, 0] = True
    x, by = _nodes(begin, stop)
    both = known[:, :, None] & known[:, None, :]
    one = torch.eye(n, dtype=torch.float64)
    kernel = torch.where(both, matern(lambda_[:, None] - lambda_, length), 0 * one)
    across = matern(lambda_[:, None] - x[:, None, :], length) * known[:, :, None]
    jitter = torch.where(known, JITTER, 1.0)[:, :, None] * one
    interpolant = torch.linalg.solve(kernel + jitter, across)
    flat = x.flatten()
    density = decay(flat) / (variance + torch.exp(2 * flat)[:, None]).sqrt()
    density = by[:, :, None] * density.reshape(*x.shape, len(variance))
    rows = torch.cumsum(-(interpolant @ density) / decay(lambda_), 0)
    return torch.cat([torch.zeros_like(rows[:1]), rows[1:]])


def _nodes(begin: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 32) Gauss-Legendre nodes and weights on the intervals: 4 panels of 8."""
    x, weights = _rule()
    width = (stop - begin)[:, None]
    return begin[:, None] + width * x, width * weights


@cache
def _rule() -> tuple[Tensor, Tensor]:
    from numpy.polynomial.legendre import leggauss

    x, weights = (torch.from_numpy(part) for part in leggauss(8))
    edges = torch.arange(PANELS, dtype=torch.float64)[:, None]
    return ((edges + 0.5 + x / 2) / PANELS).flatten(), (weights / 2 / PANELS).repeat(PANELS)
