"""Euclidean projections, of the last axis unless said otherwise, with exact derivatives.

Each is written so that automatic differentiation of it gives the closed-form Jacobian, to any
order and under `torch.func`; where a projection has a kink, one side's derivative. Those without
a closed form are fixed points, differentiated as such.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebbflow.differentiation.implicit import fixed_point
from ebbflow.differentiation.solvers import Anderson, AndersonNewton
from ebbflow.finite import readable


def nonnegative(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return torch.relu(x)


def box(x: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """The nearest point with lower <= x <= upper."""
    low = torch.as_tensor(lower, dtype=x.dtype, device=x.device)
    high = torch.as_tensor(upper, dtype=x.dtype, device=x.device)
    return torch.where(x < low, low, torch.where(x > high, high, x))


def simplex(x: Tensor, total: Tensor | float = 1.0) -> Tensor:
    """(x - τ)₊ with sum `total` > 0; Jacobian diag(s) - ssᵀ/|S| on the support S."""
    return torch.relu(x - _threshold(x, torch.as_tensor(total, dtype=x.dtype, device=x.device)))


def _threshold(x: Tensor, total: Tensor) -> Tensor:
    """τ (..., 1) with Σ (x - τ)₊ = total (...), not a number where there is none."""
    ordered = torch.sort(x, dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    means = (ordered.cumsum(-1) - total.unsqueeze(-1)) / count
    size = (ordered > means).sum(-1, keepdim=True)
    tau = means.gather(-1, (size - 1).clamp_min(0))
    return torch.where(total.unsqueeze(-1) < 0, torch.nan, tau)


def l1_ball(x: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    """The nearest point with Σ|x| <= radius."""
    r = torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    inside = x.abs().sum(-1, keepdim=True) <= r.unsqueeze(-1)
    return torch.where(inside, x, x.sign() * simplex(x.abs(), r))


def l2_ball(x: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    """The nearest point with |x| <= radius."""
    r = torch.as_tensor(radius, dtype=x.dtype, device=x.device).unsqueeze(-1)
    square = (x * x).sum(-1, keepdim=True)
    outside = square > r * r
    # The root is only taken where it is far from zero, so that its derivative exists.
    length = torch.where(outside, square, 1.0).sqrt()
    return torch.where(outside, x * (r / length), x)


def linf_ball(x: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    """The nearest point with max|x| <= radius."""
    return box(x, -torch.as_tensor(radius, dtype=x.dtype), radius)


def hyperplane(x: Tensor, normal: Tensor, offset: Tensor | float) -> Tensor:
    """The nearest point with normal·x = offset."""
    excess = (x * normal).sum(-1) - offset
    return x - (excess / (normal * normal).sum(-1)).unsqueeze(-1) * normal


def halfspace(x: Tensor, normal: Tensor, offset: Tensor | float) -> Tensor:
    """The nearest point with normal·x <= offset."""
    excess = torch.relu((x * normal).sum(-1) - offset)
    return x - (excess / (normal * normal).sum(-1)).unsqueeze(-1) * normal


def affine(x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """The nearest point x (n,) with matrix (m, n) x = offset (m,), rows independent."""
    # torch 2.13's linalg.solve has a wrong forward derivative under vmap; inv has not.
    gram = torch.linalg.inv(matrix @ matrix.mT)
    return x - matrix.mT @ (gram @ (matrix @ x - offset))


def second_order_cone(x: Tensor) -> Tensor:
    """The nearest (t, z) with |z| <= t, x = (t, z)."""
    t, z = x[..., :1], x[..., 1:]
    square = (z * z).sum(-1, keepdim=True)
    length = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    half = (t + length) / 2
    edge = torch.cat([half, half * z / torch.where(length > 0, length, 1.0)], -1)
    return torch.where(length <= t, x, torch.where(length <= -t, 0.0, edge))


def _of_same_total(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows`; under vmap, where numbers cannot be read, not a number where the totals differ."""
    gap = (rows.sum() - columns.sum()).abs()
    limit = torch.finfo(rows.dtype).eps ** 0.5
    equal = gap <= limit * (1 + columns.sum().abs())
    if not readable(equal):
        return torch.where(equal, rows, torch.nan)
    if not bool(equal):
        raise ValueError(
            f"rows add up to {rows.sum().item():.6g}, columns to {columns.sum().item():.6g}; "
            "the totals must be equal"
        )
    return rows


def transport_polytope(
    x: Tensor, rows: Tensor, columns: Tensor, tol: float | None = None
) -> Tensor:
    """The nearest P >= 0 to x (n, m) whose rows sum to `rows` (n,) and columns to `columns` (m,).

    P = (x - u - vᵀ)₊; the dual is maximised by turns in u and v, each exactly, and differentiated
    as a fixed point. Smooth and Sparse Optimal Transport, section 3, with a squared norm.

    Raises:
        ValueError: `rows` and `columns` have different totals, so that there is no such P;
            under vmap, NotSolved.
    """
    rows = _of_same_total(rows, columns)

    def potentials(u: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        v = _threshold((x - u.unsqueeze(-1)).mT, columns).squeeze(-1)
        u = _threshold(x - v, rows).squeeze(-1)
        # u + c with v - c is the same point; the mean fixes c and makes the root simple.
        return u - u.mean()

    u = fixed_point(
        potentials,
        torch.zeros_like(rows),
        x,
        rows,
        columns,
        tol=tol,
        solver=AndersonNewton(memory=5),
    )
    v = _threshold((x - u.unsqueeze(-1)).mT, columns).squeeze(-1)
    return torch.relu(x - u.unsqueeze(-1) - v)


def transport(
    cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, tol: float | None = None
) -> Tensor:
    """Entropic optimal transport: argmin ⟨cost, P⟩ + ε Σ P (log P - 1) over the same polytope.

    That is the Kullback-Leibler projection of exp(-cost/ε). Sinkhorn's iteration in logarithms,
    accelerated, differentiated as a fixed point. cost (n, m), epsilon > 0 in its unit.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon {epsilon} must be above 0; it is in the unit of the cost")
    rows = _of_same_total(rows, columns)

    def other(u: Tensor, cost: Tensor, columns: Tensor) -> Tensor:
        return columns.log() - torch.logsumexp(u.unsqueeze(-1) - cost / epsilon, 0)

    def potentials(u: Tensor, cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        v = other(u, cost, columns)
        u = rows.log() - torch.logsumexp(v - cost / epsilon, 1)
        return u - u.mean()

    u = fixed_point(
        potentials, torch.zeros_like(rows), cost, rows, columns, tol=tol, solver=Anderson(memory=5)
    )
    v = other(u, cost, columns)
    return (u.unsqueeze(-1) + v - cost / epsilon).exp()
