"""Quadratic programs whose solution is differentiable in everything that defines them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow.differentiation.implicit import root
from ebbflow.differentiation.status import Report


class Optimum(NamedTuple):
    """x (n,), the multipliers of the equalities (e,) and those of the inequalities (m,) >= 0."""

    x: Tensor
    equality: Tensor
    inequality: Tensor


def quadratic_program(
    q: Tensor,
    c: Tensor,
    e: Tensor | None = None,
    d: Tensor | None = None,
    m: Tensor | None = None,
    h: Tensor | None = None,
    *,
    tol: float | None = None,
    report: Report | None = None,
) -> Optimum:
    """argmin xᵀQx/2 + cᵀx subject to E x = d and M x <= h; derivatives by the KKT conditions.

    Q (n, n), of which the symmetric part counts, is positive definite on the null space of E; an
    interior point method finds x, LU solves the systems of the derivatives. Where a multiplier
    and its constraint are both zero, or active constraints depend on each other, there is no
    derivative, and NotSolved is raised when one is asked for.

    Raises:
        NotSolved: infeasible, unbounded or degenerate.
    """
    n = c.shape[-1]
    e, d = (c.new_zeros(0, n), c.new_zeros(0)) if e is None or d is None else (e, d)
    m, h = (c.new_zeros(0, n), c.new_zeros(0)) if m is None or h is None else (m, h)

    def condition(z: Any, objective: Any, equality: Any, inequality: Any) -> Any:
        """`conditions.kkt` of this problem, written out."""
        (x, nu, dual), (q, c), (e, d), (m, h) = z, objective, equality, inequality
        stationary = 0.5 * (q @ x + x @ q) + c + nu @ e + dual @ m
        return stationary, e @ x - d, dual * (m @ x - h)

    made = root(condition, solver=interior_point, linear_solver="direct", tol=tol, report=report)
    start = (torch.zeros_like(c), torch.zeros_like(d), torch.zeros_like(h))
    return Optimum(*made(start, (q, c), (e, d), (m, h)))


class _Point(NamedTuple):
    """An iterate (x, ν, s, z), s the slacks and z the multipliers of the inequalities."""

    x: Tensor
    nu: Tensor
    s: Tensor
    z: Tensor

    def plus(self, step: _Point, t: float) -> _Point:
        return _Point(*(a + t * b for a, b in zip(self, step, strict=True)))

    def longest(self, step: _Point) -> float:
        """The longest step up to 1 that keeps s and z positive."""
        both, change = torch.cat([self.s, self.z]), torch.cat([step.s, step.z])
        ratios = torch.where(change < 0, -both / change, torch.inf)
        return min(1.0, float(ratios.min())) if both.numel() else 1.0


class _Newton:
    """The linearised conditions at a point, factorised once."""

    def __init__(self, problem: tuple[Tensor, ...], point: _Point) -> None:
        q, c, e, d, m, h = problem
        self.e, self.m, self.at = e, m, point
        x, nu, s, z = point
        self.dual = q @ x + c + e.mT @ nu + m.mT @ z
        self.primal, self.slack = e @ x - d, m @ x + s - h
        self.gap = s @ z / max(len(h), 1)
        top = torch.cat([q + m.mT @ ((z / s).unsqueeze(-1) * m), e.mT], 1)
        below = torch.cat([e, e.new_zeros(len(d), len(d))], 1)
        self.factors = torch.linalg.lu_factor_ex(torch.cat([top, below]))[:2]

    @property
    def error(self) -> float:
        residuals = torch.cat([self.dual, self.primal, self.slack]).abs().max()
        return max(float(residuals), float(self.gap))

    def step(self, target: Tensor) -> _Point:
        """The Newton step that takes s ∘ z to s ∘ z - target."""
        _, _, s, z = self.at
        rhs = torch.cat([-self.dual - self.m.mT @ ((z * self.slack - target) / s), -self.primal])
        both = torch.linalg.lu_solve(*self.factors, rhs.unsqueeze(-1)).squeeze(-1)
        dx, dnu = both.split([self.m.shape[1], len(self.primal)])
        ds = -self.slack - self.m @ dx
        return _Point(dx, dnu, ds, -(target + z * ds) / s)


def interior_point(
    start: tuple[Tensor, Tensor, Tensor],
    objective: tuple[Tensor, Tensor],
    equality: tuple[Tensor, Tensor],
    inequality: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mehrotra's predictor-corrector method on a dense problem; (x, ν, λ)."""
    (q, c), (e, d), (m, h) = objective, equality, inequality
    problem = ((q + q.mT) / 2, c, e, d, m, h)
    point = _Point(start[0], start[1], torch.ones_like(h), torch.ones_like(h))
    eps = torch.finfo(c.dtype).eps
    size = 1 + max(float(v.abs().max()) if v.numel() else 0.0 for v in (c, d, h))
    best, least = point, math.inf
    for _ in range(60):
        newton = _Newton(problem, point)
        if newton.error < least:
            best, least = point, newton.error
        # Past the accuracy that rounding allows, further steps only lose some of it.
        if not newton.error > 4 * eps * size or newton.error > 100 * least:
            break
        product = point.s * point.z
        predictor = newton.step(product)
        ahead = point.plus(predictor, point.longest(predictor))
        gap = ahead.s @ ahead.z / max(len(h), 1)
        centre = (gap / newton.gap.clamp_min(eps**2)) ** 3 * newton.gap
        corrector = newton.step(product + predictor.s * predictor.z - centre)
        longest = point.longest(corrector)
        new = point.plus(corrector, 1.0 if longest == 1.0 else 0.995 * longest)
        if not all(bool(v.isfinite().all()) for v in new):
            break
        point = new
    return best.x, best.nu, best.z
