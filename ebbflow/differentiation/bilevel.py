"""Bilevel problems: min over x of F(x, y*(x)) where y*(x) minimises f(x, ·).

Functions take (x, y) in this order, as the papers do; x and y are tensors.

    hypergradient   implicit      ∇ₓF - ∂²ₓᵧf [∂²ᵧᵧf]⁻¹ ∇ᵧF, memory that of one step
                    unrolled      through all steps of a solver, memory that of all
                    truncated     through its last steps alone, biased, memory that of those
                    neumann       implicit with so many terms of the series of the inverse
    single loop     lv_hba        coupled constraints, no Hessian
                    bsvrb         many blocks, stochastic, variance-reduced
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebbflow.differentiation.blockwise import BSVRB as BSVRB
from ebbflow.differentiation.blockwise import Blocks as Blocks
from ebbflow.differentiation.blockwise import bsvrb as bsvrb
from ebbflow.differentiation.implicit import minimize
from ebbflow.differentiation.linear import LinearSolver, divide
from ebbflow.differentiation.solvers import Minimizer, relative
from ebbflow.differentiation.status import NotSolved, Report, Status
from ebbflow.differentiation.value_function import LVHBA as LVHBA
from ebbflow.differentiation.value_function import lv_hba as lv_hba

Function = Callable[[Tensor, Tensor], Tensor]


class Hypergradient(NamedTuple):
    """F(x, y), the derivative of it in x, and the y that it was taken at.

    `residual` is what the method left of its equation: of ∇ᵧf at y, over 1 + |y|, and for
    `neumann` of the linear system, relative.
    """

    value: Tensor
    gradient: Tensor
    y: Tensor
    residual: Tensor


def _total(
    outer: Function, inner: Function, x: Tensor, solve: Callable[[Tensor], Tensor]
) -> Hypergradient:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = solve(x)
        value = outer(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    y = y.detach()
    left = torch.func.grad(inner, argnums=1)(x.detach(), y)
    return Hypergradient(value.detach(), gradient, y, relative(left.flatten(), y.flatten()))


def _require_progress(name: str, start: Tensor, end: Tensor, steps: int) -> None:
    """Raise where steps of fixed length made the residual larger than it was."""
    good = torch.isfinite(end) & (end <= start)
    if not bool(good):
        reason = "the steps diverge: shorten `step`"
        raise NotSolved(Status(name, end, float(start), steps, good, reason))


def implicit(
    outer: Function,
    inner: Function,
    x: Tensor,
    y: Tensor,
    *,
    solver: str | Minimizer = "lbfgs",
    linear_solver: str | LinearSolver | None = None,
    tol: float | None = None,
    report: Report | None = None,
) -> Hypergradient:
    """The exact hypergradient at x, with the inner problem solved from y.

    Raises:
        NotSolved: the inner solve or the linear one failed and `report` is None.
    """
    made = minimize(
        lambda y, x: inner(x, y), solver=solver, linear_solver=linear_solver, tol=tol, report=report
    )
    return _total(outer, inner, x, lambda x: made(y.detach(), x))


def unrolled(
    outer: Function, inner: Function, x: Tensor, y: Tensor, *, step: float, steps: int
) -> Hypergradient:
    """The derivative of F at the y of `steps` gradient steps, through all of them.

    Raises:
        NotSolved: the steps diverged.
    """
    return truncated(outer, inner, x, y, step=step, steps=steps, last=steps)


def truncated(
    outer: Function, inner: Function, x: Tensor, y: Tensor, *, step: float, steps: int, last: int
) -> Hypergradient:
    """The same, through the `last` steps alone; the error falls as the contraction to that power.

    Truncated Back-propagation for Bilevel Optimization.

    Raises:
        NotSolved: the steps diverged.
    """
    if not 0 <= last <= steps:
        raise ValueError(f"last {last} must be between 0 and steps {steps}")

    def descend(x: Tensor, y: Tensor, count: int, keep: bool) -> Tensor:
        for _ in range(count):
            with torch.enable_grad():
                z = y if y.requires_grad else y.detach().requires_grad_()
                (g,) = torch.autograd.grad(inner(x, z), z, create_graph=keep)
            y = z - step * g
            y = y if keep else y.detach()
        return y

    start = descend(x.detach(), y.detach(), steps - last, False)
    found = _total(outer, inner, x, lambda x: descend(x, start, last, True))
    before = torch.func.grad(inner, argnums=1)(x.detach(), y.detach())
    first = relative(before.flatten(), y.detach().flatten())
    _require_progress("gradient descent", first, found.residual, steps)
    return found


def neumann(
    outer: Function, inner: Function, x: Tensor, y: Tensor, *, step: float, terms: int
) -> Hypergradient:
    """The implicit derivative at the given y, with `terms` terms of a series for the inverse.

    [∂²f]⁻¹ ≈ η Σ_{k < terms} (1 - η ∂²f)^k

    Raises:
        NotSolved: the series diverges.
    """
    g_x, v = torch.func.grad(outer, argnums=(0, 1))(x, y)
    inner_gradient = torch.func.grad(inner, argnums=1)
    pull = torch.func.vjp(inner_gradient, x, y)[1]
    total, whole = torch.zeros_like(v), torch.linalg.vector_norm(v)
    for _ in range(terms):
        total = total + step * v
        v = v - step * pull(v)[1]
    left = torch.linalg.vector_norm(v)
    _require_progress("Neumann series", whole, left, terms)
    return Hypergradient(outer(x, y), g_x - pull(total)[0], y, divide(left, whole))
