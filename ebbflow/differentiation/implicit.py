"""Roots, fixed points and minimisers that are differentiable in their arguments.

    x*(θ):  F(x*, θ) = 0,    x* = T(x*, θ),    or  x* = argmin f(·, θ)

State the condition as a Python function and let any solver find x*: derivatives come from the
condition, not from the iterations, so that memory does not grow with them. They compose with
autograd, `torch.func.{grad, vjp, jvp, vmap, jacrev, jacfwd, hessian}` and themselves. x and θ are
tensors or any nesting of tuples, lists and dictionaries of them. A tensor that the condition
captures, such as a parameter of a module, counts as an argument; one that it reaches in a way
that cannot be followed is refused.
Efficient and Modular Implicit Differentiation, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ebbflow.differentiation import linear, solvers
from ebbflow.differentiation._function import Dims, Equation, Implicit, Residual
from ebbflow.differentiation.captured import captured, substituted
from ebbflow.differentiation.derivatives import gradient
from ebbflow.differentiation.linear import LinearSolver
from ebbflow.differentiation.solvers import FixedPointSolver, Minimizer, RootSolver, Solver
from ebbflow.differentiation.status import Report, Status

Condition = Callable[..., Any]
UserSolver = Callable[..., Any]


@dataclass(frozen=True)
class Layout:
    """How a nesting of tensors lies in one vector (n,)."""

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    size: int

    @classmethod
    def of(cls, tree: Any) -> Layout:
        leaves, spec = pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise TypeError(f"the start holds {leaf!r}; it must hold floating-point tensors")
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) != 1:
            kinds = sorted({f"{leaf.dtype} on {leaf.device}" for leaf in leaves})
            raise TypeError(f"the start holds tensors of {kinds}; convert them to one kind")
        shapes = tuple(leaf.shape for leaf in leaves)
        return cls(spec, shapes, sum(shape.numel() for shape in shapes))

    def ravel(self, tree: Any, what: str) -> Tensor:
        leaves = [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)
        if sum(leaf.numel() for leaf in leaves) != self.size:
            shapes = tuple(leaf.shape for leaf in leaves)
            raise ValueError(
                f"{what} has shapes {shapes}, the start {self.shapes}: as many numbers"
            )
        flat = [leaf.reshape(-1) for leaf in leaves]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def unravel(self, x: Tensor) -> Any:
        if self.spec.is_leaf():
            return x.reshape(self.shapes[0])
        parts = x.split([shape.numel() for shape in self.shapes])
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Library:
    """A solver of this package on the function that it iterates."""

    solver: Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Status]]
    function: Residual

    def __call__(self, x0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Status]:
        return self.solver(lambda x: self.function(x, *theta), x0)

    def batched(self, dims: Dims) -> Library:
        return replace(self, function=torch.vmap(self.function, in_dims=(0, *dims)))


@dataclass(frozen=True)
class Foreign:
    """Somebody else's solver (x0, *θ) -> x, one problem at a time, checked by the residual."""

    call: Callable[..., Tensor]
    residual: Residual
    tolerance: float | None

    def __call__(self, x0: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Status]:
        x = self.call(x0, *theta).detach()
        goal = torch.finfo(x.dtype).eps ** 0.375 if self.tolerance is None else self.tolerance
        size = solvers.relative(self.residual(x, *theta), x)
        status = Status("the given solver", size, goal, 1, size <= goal, "it stopped early")
        return x, status

    def batched(self, dims: Dims) -> Foreign:
        def call(x0: Tensor, *theta: Tensor) -> Tensor:
            rows = [
                self.call(
                    x,
                    *(t if d is None else t.select(d, i) for t, d in zip(theta, dims, strict=True)),
                )
                for i, x in enumerate(x0)
            ]
            return torch.stack(rows)

        residual = torch.vmap(self.residual, in_dims=(0, *dims))
        return replace(self, call=call, residual=residual)


@dataclass(frozen=True)
class Root:
    """x0, *args -> x* with condition(x*, *args) = 0; also a decorator of a solver (x0, *args) -> x.

    Made by `root`, `fixed_point` and `minimize`; `iterated` is what a solver of this package
    works on: F itself, T, or the objective.
    """

    condition: Condition
    iterated: Condition
    solver: Solver | UserSolver | None
    linear_solver: LinearSolver
    tol: float | None
    report: Report | None

    def __call__(self, *arguments: Any) -> Any:
        if not arguments:
            raise TypeError("call with a start and the condition's arguments, or with a solver")
        if len(arguments) == 1 and callable(arguments[0]):
            return replace(self, solver=arguments[0])
        x0, *args = arguments
        layout = Layout.of(x0)
        leaves, spec = pytree.tree_flatten(tuple(args))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        given = {id(leaf) for leaf in leaves}
        lifted = [t for t in captured(self.condition) if id(t) not in given]

        # A nesting costs as much to build as a few operations, at every call.
        plain = all(child.is_leaf() for child in spec.children())

        def rebuilt(theta: Sequence[Tensor]) -> Any:
            full = list(leaves)
            for i, value in zip(places, theta, strict=False):
                full[i] = value
            return full if plain else pytree.tree_unflatten(full, spec)

        def residual(x: Tensor, *theta: Tensor) -> Tensor:
            with substituted(lifted, theta[len(places) :]):
                tree = self.condition(layout.unravel(x), *rebuilt(theta))
                return layout.ravel(tree, "the condition's value")

        def iterated(x: Tensor, *theta: Tensor) -> Any:
            with substituted(lifted, theta[len(places) :]):
                return self.iterated(layout.unravel(x), *rebuilt(theta))

        inner = self.inner(layout, rebuilt, residual, iterated)
        theta = [*(leaves[i] for i in places), *lifted]
        start = layout.ravel(x0, "the start").detach()
        refuse_hidden(residual, start, theta)
        equation = Equation(residual, inner, self.linear_solver, self.report)
        x = Implicit.apply(equation, start, *theta)
        assert isinstance(x, Tensor)
        return layout.unravel(x)

    def inner(
        self,
        layout: Layout,
        rebuilt: Callable[..., Any],
        residual: Residual,
        iterated: Callable[..., Any],
    ) -> Any:
        """What finds x*, on vectors."""
        solver = self.solver
        if not isinstance(solver, Solver):
            if solver is None:
                raise TypeError("this condition has no default solver: pass solver=…")

            def call(x: Tensor, *theta: Tensor) -> Tensor:
                tree = solver(layout.unravel(x), *rebuilt(theta))
                return layout.ravel(tree, "the solver's answer")

            return Foreign(call, residual, self.tol)

        def function(x: Tensor, *theta: Tensor) -> Tensor:
            value = iterated(x, *theta)
            if isinstance(solver, Minimizer):
                return value.reshape(())
            return layout.ravel(value, "the function's value")

        if isinstance(solver, RootSolver):
            return Library(solver, residual)
        if isinstance(solver, FixedPointSolver) and self.iterated is self.condition:
            return Library(solver, lambda x, *theta: x + residual(x, *theta))
        return Library(solver, function)


def chosen(
    solver: str | Solver | UserSolver | None, tol: float | None
) -> Solver | UserSolver | None:
    """The solver by its name, with the tolerance."""
    found = solvers.get(solver) if isinstance(solver, str) else solver
    if isinstance(found, Solver) and tol is not None:
        found = replace(found, tolerance=tol)
    return found


def root(
    optimality: Condition,
    x0: Any = None,
    *args: Any,
    solver: str | Solver | UserSolver | None = "newton-krylov",
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    report: Report | None = None,
) -> Any:
    """The root x* of optimality(x, *args) = 0.

    Function form: `root(F, x0, *args)` or `root(F, solver=…)(x0, *args)`. Decorator form:

        @root(F, linear_solver="cg")
        def solve(x0, *args): ...

    Args:
        optimality: F(x, *args), as many numbers as x.
        x0: where the solver starts; it receives no derivative.
        solver: "newton-krylov", "broyden", "bisection", on x + F "anderson", "anderson-newton" and
            "picard", one of `solvers`, or a function (x0, *args) -> x.
        linear_solver: "auto" (LU up to 512 unknowns, then GMRES), "cg", "normal-cg", "gmres",
            "bicgstab", "direct", or one of `linear`.
        tol: of |F(x)| / (1 + |x|): eps^0.7 for the package's solvers; a given function's answer
            is only checked, against eps^0.375 (1e-6 in float64). The derivative's error is of the
            size of the solution's.
        report: receives a Status for every solve, forward and backward, instead of errors.

    Raises:
        NotSolved: where a solve, of the root or of a linear system, failed and `report` is None.
    """
    made = Root(optimality, optimality, chosen(solver, tol), linear.get(linear_solver), tol, report)
    return made if x0 is None else made(x0, *args)


def fixed_point(
    f: Condition,
    x0: Any = None,
    *args: Any,
    solver: str | Solver | UserSolver | None = "anderson",
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    report: Report | None = None,
) -> Any:
    """The fixed point x* = f(x*, *args); forms and arguments as `root`, F = f(x) - x."""

    def condition(x: Any, *theta: Any) -> Any:
        return pytree.tree_map(torch.sub, f(x, *theta), x)

    made = Root(condition, f, chosen(solver, tol), linear.get(linear_solver), tol, report)
    return made if x0 is None else made(x0, *args)


def minimize(
    objective: Condition,
    x0: Any = None,
    *args: Any,
    solver: str | Solver | UserSolver | None = "lbfgs",
    linear_solver: str | LinearSolver | None = None,
    tol: float | None = None,
    report: Report | None = None,
) -> Any:
    """The minimiser of objective(x, *args), a scalar; forms and arguments as `root`, F = ∇f.

    Solvers are "lbfgs", "newton", "gradient-descent" and those of `root`; the linear solver is LU
    up to 512 unknowns, then CG, unless given.
    """
    condition = gradient(objective)
    systems = linear.Auto(linear.CG()) if linear_solver is None else linear.get(linear_solver)
    made = Root(condition, objective, chosen(solver, tol), systems, tol, report)
    return made if x0 is None else made(x0, *args)


def refuse_hidden(residual: Residual, x: Tensor, theta: Sequence[Tensor]) -> None:
    """Raise where the condition depends on a differentiated tensor that `captured` did not find."""
    inside = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

    def constant(t: Tensor) -> Tensor:
        while inside.is_functorch_wrapped_tensor(t):
            place = inside.maybe_get_bdim(t) if inside.is_batchedtensor(t) else -1
            t = inside.get_unwrapped(t)
            t = t.select(place, 0) if place >= 0 else t
        return t.detach()

    def differentiated(t: Tensor) -> bool:
        if t.requires_grad or inside.is_batchedtensor(t):
            return True
        forward = torch.autograd.forward_ad
        if forward._current_level >= 0 and forward.unpack_dual(t, level=0).tangent is not None:
            return True
        # Every operation under torch.func.grad is wrapped, whether or not anything depends on it.
        return inside.is_functorch_wrapped_tensor(t) and differentiated(inside.get_unwrapped(t))

    with torch.enable_grad():
        value = residual(constant(x), *map(constant, theta))
    if differentiated(value):
        raise ValueError(
            "the condition uses a tensor that requires a derivative or is batched and that is not "
            "among its arguments, so that its derivative would silently be lost: pass it as an "
            "argument (for a module: torch.func.functional_call with its parameters), or detach it"
        )
