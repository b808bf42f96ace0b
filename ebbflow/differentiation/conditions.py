"""Optimality conditions, made from the parts of a problem: maps for `root` and `fixed_point`.

Where a problem has several parts, the arguments of each come as one tuple (or one tensor): a
condition is called as condition(x, θ_objective, θ_constraint, …).
Efficient and Modular Implicit Differentiation, section 2.2 and table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ebbflow.differentiation.derivatives import gradient, pullback
from ebbflow.differentiation.projections import second_order_cone

Function = Callable[..., Any]


def _tuple(arguments: Any) -> tuple[Any, ...]:
    return arguments if isinstance(arguments, tuple) else (arguments,)


def stationary(objective: Function) -> Function:
    """F = ∇₁f(x, *θ), a root."""
    return gradient(objective)


def gradient_descent(objective: Function, step: float) -> Function:
    """T = x - η ∇₁f(x, *θ), a fixed point with the root of `stationary`."""

    def fixed(x: Any, *theta: Any) -> Any:
        g = gradient(objective)(x, *theta)
        return pytree.tree_map(lambda a, b: a - step * b, x, g)

    return fixed


def proximal_gradient(objective: Function, prox: Function, step: float) -> Function:
    """T = prox(x - η ∇₁f(x, θ_f), θ_g), for min f + g; `prox` is that of η g.

    For η g of weight w, `prox=lambda z, w: proximal.lasso(z, step * w)`.
    """

    def fixed(x: Tensor, theta: Any, theta_prox: Any = ()) -> Tensor:
        g = gradient(objective)(x, *_tuple(theta))
        return prox(x - step * g, *_tuple(theta_prox))

    return fixed


def projected_gradient(objective: Function, projection: Function, step: float) -> Function:
    """T = proj(x - η ∇₁f(x, θ_f), θ_C), for min f over C(θ_C)."""
    return proximal_gradient(objective, projection, step)


def block_proximal_gradient(
    objective: Function, proxes: Sequence[Function], steps: Sequence[float]
) -> Function:
    """T_b = prox_b(x_b - η_b ∇_b f(x, θ_f), θ_b) for x a tuple of blocks, θ_g a tuple of theirs."""

    def fixed(x: tuple[Tensor, ...], theta: Any, theta_prox: tuple[Any, ...]) -> Any:
        g = gradient(objective)(x, *_tuple(theta))
        parts = zip(proxes, x, steps, g, theta_prox, strict=True)
        return tuple(prox(b - s * d, *_tuple(t)) for prox, b, s, d, t in parts)

    return fixed


def mirror_descent(
    objective: Function, projection: Function, mirror_map: Function, step: float
) -> Function:
    """T = proj^φ(∇φ(x) - η ∇₁f(x, θ_f), θ_C), `projection` from the dual space.

    On the simplex with the entropy: `mirror_map=torch.log`, `projection=softmax`.
    """

    def fixed(x: Tensor, theta: Any, theta_projection: Any = ()) -> Tensor:
        g = gradient(objective)(x, *_tuple(theta))
        return projection(mirror_map(x) - step * g, *_tuple(theta_projection))

    return fixed


def newton(function: Function, step: float = 1.0) -> Function:
    """T = x - η [∂₁G]⁻¹ G(x, *θ) for x (n,), a fixed point at the roots of G."""

    def fixed(x: Tensor, *theta: Any) -> Tensor:
        jacobian = torch.func.jacrev(function)(x, *theta)
        return x - step * (torch.linalg.inv(jacobian) @ function(x, *theta))

    return fixed


def kkt(
    objective: Function, equality: Function | None = None, inequality: Function | None = None
) -> Function:
    """F(x, ν, λ) for min f(x, θ_f) s.t. h(x, θ_h) = 0, g(x, θ_g) <= 0.

        F = (∇f + (∂h)ᵀν + (∂g)ᵀλ,  h,  λ ∘ g)

    The unknown is the tuple (x, ν, λ) without the multipliers of an absent constraint; the
    parameters follow in the same order. λ >= 0 and g <= 0 are for the solver to see to.
    """

    def condition(z: tuple[Tensor, ...], *thetas: Any) -> tuple[Tensor, ...]:
        x, *multipliers = z
        constraints = [c for c in (equality, inequality) if c is not None]
        total = gradient(objective)(x, *_tuple(thetas[0]))
        rest: list[Tensor] = []
        for constraint, dual, theta in zip(constraints, multipliers, thetas[1:], strict=True):
            value, pull = pullback(lambda x, c=constraint, t=theta: c(x, *_tuple(t)), x)
            total = total + pull(dual)[0]
            rest.append(value if constraint is equality else dual * value)
        return (total, *rest)

    return condition


def conic_residual(zero: int, nonnegative: int, second_order: Sequence[int] = ()) -> Function:
    """F(u, v; A, b, c) for min cᵀx s.t. Ax + s = b, s in K = {0} × R₊ × second-order cones.

        F = (Aᵀ Π*(v) + c,  b - A u + v - Π*(v)),    Π* the projection on the dual cone

    is the homogeneous self-dual embedding's residual at w = 1, where it has no null space; the
    solution is x = u, dual y = Π*(v), slack s = Π*(v) - v. Sizes of the cones in that order.
    """

    def project(v: Tensor) -> Tensor:
        free, positive, *cones = v.split([zero, nonnegative, *second_order])
        return torch.cat([free, torch.relu(positive), *map(second_order_cone, cones)])

    def condition(z: tuple[Tensor, Tensor], a: Tensor, b: Tensor, c: Tensor) -> Any:
        u, v = z
        y = project(v)
        return a.mT @ y + c, b - a @ u + v - y

    return condition
