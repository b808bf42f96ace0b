"""The implicit function theorem, once.

x*(θ) with F(x*, θ) = 0 has  A dx* = B dθ,  A = -∂₁F,  B = ∂₂F. The product with a tangent solves
one system with A, the product with a cotangent one with Aᵀ. Both are roots of linear equations,
so their own derivatives come from the same rule, to any order.

Unknowns are vectors (*batch, n). `torch.vmap` adds a batch axis instead of hiding it, so solvers
see plain numbers, stop each problem by itself and can report.
Efficient and Modular Implicit Differentiation, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ebbflow.differentiation.derivatives import pullback, pushforward, tangent_rule
from ebbflow.differentiation.linear import LinearSolver, Operator
from ebbflow.differentiation.status import Report, Status, settle

Residual = Callable[..., Tensor]
"""(x (n,), *θ) -> (n,)."""
Dims = tuple[int | None, ...]


def select(theta: Sequence[Tensor], which: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(theta[i] for i in which)


def only(f: Residual, x: Tensor, theta: Sequence[Tensor], which: Sequence[int]) -> Residual:
    """`f` as a function of the parameters at the places `which`."""

    def partial(*chosen: Tensor) -> Tensor:
        full = list(theta)
        for i, value in zip(which, chosen, strict=True):
            full[i] = value
        return f(x, *full)

    return partial


class Inner(Protocol):
    """What finds the root; `batched` is the same for one more leading axis."""

    def __call__(self, x0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Status]: ...

    def batched(self, dims: Dims) -> Inner: ...


@dataclass(frozen=True)
class Equation:
    """F(x, θ) = 0 with what finds its root and what solves the linear systems of its derivatives.

    `batch` counts the axes before the last one of x.
    """

    residual: Residual
    inner: Inner
    linear_solver: LinearSolver
    report: Report | None
    batch: int = 0

    def solve(self, x0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Status]:
        return self.inner(x0, theta)

    def add_axis(
        self, size: int, dims: Dims, x0: Tensor, theta: Sequence[Tensor]
    ) -> tuple[Equation, Tensor, list[Tensor], int]:
        """The equation of `size` problems at once, its arguments, and the place of the new axis."""
        inner_dims = dims[1:]
        x0 = x0.expand(size, *x0.shape) if dims[0] is None else x0.movedim(dims[0], 0)
        residual = torch.vmap(self.residual, in_dims=(0, *inner_dims))
        inner = self.inner.batched(inner_dims)
        grown = replace(self, residual=residual, inner=inner, batch=self.batch + 1)
        return grown, x0, list(theta), 0

    def system(self, transpose: bool) -> System:
        """The linear system A v = b, or Aᵀv = b, of this equation's derivatives, A = -∂₁F."""
        return System(self, transpose)

    @staticmethod
    def point(x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the matrix of that system depends on."""
        return (x, *theta)


@dataclass(frozen=True)
class System:
    """A(x, θ) v = b, or Aᵀ v = b, an equation in v with the parameters (x, *θ, b).

    v and b may have `extra` leading axes that x and θ do not have: many right-hand sides of one
    matrix, as in a Jacobian.
    """

    parent: Equation
    transpose: bool
    extra: int = 0

    @property
    def report(self) -> Report | None:
        return self.parent.report

    def operator(self, x: Tensor, theta: Sequence[Tensor]) -> Operator:
        """The matrix at (x, θ); products are of vectors without the extra axes."""

        def f(z: Tensor) -> Tensor:
            return -self.parent.residual(z, *theta)

        return Operator.of_jacobian(f, x, self.transpose)

    def residual(self, v: Tensor, x: Tensor, *theta_b: Tensor) -> Tensor:
        *theta, b = theta_b
        return self.over(self.operator(x, theta).matvec)(v) - b

    def over(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The product, for vectors with the extra axes."""
        for _ in range(self.extra):
            product = torch.vmap(product)
        return product

    def solve(self, x0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Status]:
        x, *rest, b = theta
        one = self.operator(x, rest)
        many = Operator(self.over(one.matvec), self.over(one.rmatvec), one.dense)
        result = self.parent.linear_solver(many, b)
        return result.x, result.status

    def add_axis(
        self, size: int, dims: Dims, x0: Tensor, theta: Sequence[Tensor]
    ) -> tuple[System, Tensor, list[Tensor], int]:
        *point, b = theta
        *inner_dims, last = dims[1:]
        shared = all(dim is None for dim in inner_dims)
        # A new matrix for each problem stands inside the axes that share a matrix.
        place = 0 if shared else self.extra
        b = (
            b.unsqueeze(place).expand(*b.shape[:place], size, *b.shape[place:])
            if (last is None)
            else b.movedim(last, place)
        )
        x0 = torch.zeros_like(b)
        if shared:
            return replace(self, extra=self.extra + 1), x0, [*point, b], place
        head = point[0]
        parent, head, rest, _ = self.parent.add_axis(size, tuple(inner_dims), head, point[1:])
        return replace(self, parent=parent), x0, [head, *rest, b], place

    def system(self, transpose: bool) -> System:
        return replace(self, transpose=self.transpose != transpose)

    @staticmethod
    def point(x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(theta[:-1])


class Implicit(torch.autograd.Function):
    """(equation, x0, *θ) -> x*, whose derivatives do not look at how x* was found."""

    @staticmethod
    def forward(equation: Any, x0: Tensor, *theta: Tensor) -> Tensor:
        x, status = equation.solve(x0, theta)
        settle(status, equation.report)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equation = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, *theta = ctx.saved_tensors
        u = solve_linear(ctx.equation, x, theta, cotangents[0], transpose=True)
        wanted = [
            i for i, t in enumerate(theta) if ctx.needs_input_grad[i + 2] and t.is_floating_point()
        ]
        f = only(ctx.equation.residual, x, theta, wanted)
        found = pullback(f, *select(theta, wanted))[1](u)
        gradients: list[Tensor | None] = [None] * len(theta)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient * sign_of(ctx.equation)
        return None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        given = [i for i, t in enumerate(tangents[2:]) if t is not None]
        with tangent_rule(*ctx.saved_tensors) as (x, *theta):
            if not given:
                return torch.zeros_like(x)
            f = only(ctx.equation.residual, x, theta, given)
            b = pushforward(f, x, *select(theta, given))(*select(tangents[2:], given))
            b = b * sign_of(ctx.equation)
            return solve_linear(ctx.equation, x, theta, b, transpose=False)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Tensor, int]:
        equation, x0, *theta = arguments
        grown, x0, theta, place = equation.add_axis(info.batch_size, in_dims[1:], x0, theta)
        return Implicit.apply(grown, x0, *theta), place  # pyright: ignore[reportReturnType]


def sign_of(equation: Equation | System) -> float:
    """B = ∂₂F for A = -∂₁F; a linear system is its own A, so that there B = -∂₂F."""
    return -1.0 if isinstance(equation, System) else 1.0


def solve_linear(
    equation: Equation | System, x: Tensor, theta: Sequence[Tensor], b: Tensor, transpose: bool
) -> Tensor:
    """A⁻¹b or A⁻ᵀb, differentiable in all of (x, θ, b)."""
    system = equation.system(transpose)
    solution = Implicit.apply(system, torch.zeros_like(b), *equation.point(x, theta), b)
    assert isinstance(solution, Tensor)
    return solution
