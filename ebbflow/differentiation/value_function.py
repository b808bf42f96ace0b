"""LV-HBA: bilevel problems with coupled constraints in one loop and without a Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


class Iterate(NamedTuple):
    """Where a run of `lv_hba` ended.

    Attributes:
        x, y: the answer.
        theta, multiplier: the inner problem's own minimiser and multiplier, tracked.
        z: the proximal point of the multiplier.
        gap: f(x, y) less the value function as (theta, multiplier) estimate it; the constraint of
            the reformulation is that it is at most zero.
        moved: length of the last step in (x, y).
    """

    x: Tensor
    y: Tensor
    theta: Tensor
    multiplier: Tensor
    z: Tensor
    gap: float
    moved: float


@dataclass(frozen=True)
class LVHBA:
    """Step sizes and proximal weights.

        min F(x, y)  s.t.  f(x, y) - v(x, y, z) <= 0,  (x, y) in C
        v = min_θ max_λ f(x, θ) + λᵀg(x, θ) + |θ - y|²/2γ₁ - |λ - z|²/2γ₂

    Args:
        alpha, beta, eta: steps of (x, y), of z and of (θ, λ).
        gamma1, gamma2: proximal weights; 1/γ₁ must exceed the weak convexity of f in y.
        bound: r, of the multipliers.
        penalty: c₀; c_k = c₀ (k + 1)^power.
        power: p in [0, 1/2).
        equality: the constraint is g = 0 rather than g <= 0, with multipliers of both signs.
    """

    alpha: float = 0.008
    beta: float = 0.02
    eta: float = 0.01
    gamma1: float = 10.0
    gamma2: float = 10.0
    bound: float = 1000.0
    penalty: float = 0.025
    power: float = 0.3
    equality: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.power < 0.5:
            raise ValueError(f"power {self.power} must be in [0, 0.5)")
        names = ("alpha", "beta", "eta", "gamma1", "gamma2", "bound", "penalty")
        bad = {name: getattr(self, name) for name in names if not getattr(self, name) > 0}
        if bad:
            raise ValueError(f"{bad} must be above 0")


def lv_hba(
    outer: Function,
    inner: Function,
    constraint: Function,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    project_inner: Callable[[Tensor], Tensor] = lambda y: y,
    settings: LVHBA | None = None,
    on_step: Callable[[int, Iterate], None] | None = None,
) -> Iterate:
    """`steps` rounds of the method from (x, y).

    Args:
        outer, inner: F and f of (x, y), scalars.
        constraint: g of (x, y), a vector.
        project: of (x, y) on C, the outer set with g in it.
        project_inner: of y on Y.
        on_step: called with the round and its iterate.

    Raises:
        FloatingPointError: a round was not finite: the steps are too long.

    Constrained Bi-Level Optimization: Proximal Lagrangian Value Function Approach and
    Hessian-free Algorithm, algorithm 1.
    """
    how = LVHBA() if settings is None else settings
    low = -how.bound if how.equality else 0.0
    theta, multiplier = y, torch.zeros_like(constraint(x, y))
    z = multiplier

    def gradient(f: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            at = tuple(t.detach().requires_grad_() for t in at)
            return torch.autograd.grad(f(*at), at)

    def lagrangian(x: Tensor, theta: Tensor) -> Tensor:
        return inner(x, theta) + multiplier @ constraint(x, theta)

    last = Iterate(x, y, theta, multiplier, z, float("inf"), float("inf"))
    for k in range(steps):
        c = how.penalty * (k + 1) ** how.power
        push = gradient(lagrangian, x, theta)[1] + (theta - y) / how.gamma1
        rise = constraint(x, theta) - (multiplier - z) / how.gamma2
        theta = project_inner(theta - how.eta * push)
        multiplier = (multiplier + how.eta * rise).clamp(low, how.bound)
        dx, dy = gradient(lambda x, y, c=c: outer(x, y) / c + inner(x, y), x, y)
        dx = dx - gradient(lagrangian, x, theta)[0]
        dy = dy - (y - theta) / how.gamma1
        before = torch.cat([x.flatten(), y.flatten()])
        x, y = project(x - how.alpha * dx, y - how.alpha * dy)
        z = (z + how.beta * (multiplier - z) / how.gamma2).clamp(low, how.bound)
        moved = torch.linalg.vector_norm(torch.cat([x.flatten(), y.flatten()]) - before)
        if not bool(torch.isfinite(moved)):
            raise FloatingPointError(
                f"round {k} is not finite: shorten alpha {how.alpha}, beta {how.beta}, "
                f"eta {how.eta}"
            )
        if on_step is not None or k == steps - 1:
            v = inner(x, theta) + multiplier @ constraint(x, theta)
            v = v + (theta - y).square().sum() / (2 * how.gamma1)
            v = v - (multiplier - z).square().sum() / (2 * how.gamma2)
            gap = float(inner(x, y) - v)
            last = Iterate(x, y, theta, multiplier, z, gap, float(moved))
            if on_step is not None:
                on_step(k, last)
    return last
