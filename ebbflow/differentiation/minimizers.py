"""Minimisers of f: (*batch, n) -> (*batch,), a batch at a time; each problem stops by itself.

A gradient is counted as small when |∇f(x)| <= tolerance (1 + |x|).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebbflow.differentiation.derivatives import pullback
from ebbflow.differentiation.iterations import Map, Solver, relative
from ebbflow.differentiation.linear import CG, Auto, LinearSolver, Operator, divide
from ebbflow.differentiation.status import Status, dot, keep, norm, some

# Newton's steps need not be exact; what they leave over, the next one takes.
_SYMMETRIC = Auto(CG(tolerance=1e-6))


class _Point(NamedTuple):
    """x (*batch, n), f(x) (*batch,) and ∇f(x)."""

    x: Tensor
    value: Tensor
    gradient: Tensor

    @classmethod
    def at(cls, function: Map, x: Tensor) -> _Point:
        value, pull = pullback(function, x)
        return cls(x, value, pull(torch.ones_like(value))[0])

    def where(self, condition: Tensor, other: _Point) -> _Point:
        """This one where the condition (*batch, 1) holds."""
        return _Point(
            torch.where(condition, self.x, other.x),
            torch.where(condition.squeeze(-1), self.value, other.value),
            torch.where(condition, self.gradient, other.gradient),
        )


@dataclass(frozen=True)
class Minimizer(Solver):
    """Minimises f: (*batch, n) -> (*batch,); the residual is the gradient."""

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        raise NotImplementedError

    @staticmethod
    def line_search(
        function: Map, at: _Point, step: Tensor, active: Tensor
    ) -> tuple[_Point, Tensor]:
        """Armijo's rule; within rounding of the value, a smaller gradient counts as progress."""
        value, slope = at.value.unsqueeze(-1), dot(at.gradient, step)
        noise = 10 * torch.finfo(step.dtype).eps * value.abs()
        t, size = torch.ones_like(slope), norm(at.gradient).unsqueeze(-1)
        new, good = at, torch.zeros_like(active)
        for _ in range(40):
            new = _Point.at(function, at.x + t * step)
            there = new.value.unsqueeze(-1)
            smaller = norm(new.gradient).unsqueeze(-1) < size
            good = (there <= value + 1e-4 * t * slope) | ((there <= value + noise) & smaller)
            if bool((good | ~active).all()):
                break
            t = torch.where(good, t, t / 2)
        moved = active & good
        return new.where(moved, at), moved


@dataclass(frozen=True)
class GradientDescent(Minimizer):
    """x <- x - step ∇f(x)."""

    step: float = 0.1
    max_iterations: int = 10000

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        g, k = _Point.at(function, x).gradient, 0
        while k < self.max_iterations:
            active = (relative(g, x) > self.goal(x)).unsqueeze(-1)
            if not some(active):
                break
            k += 1
            x = keep(active, x - self.step * g, x)
            g = keep(active, _Point.at(function, x).gradient, g)
        return x, self.status(x, g, k, f"max_iterations {self.max_iterations}")


@dataclass(frozen=True)
class LBFGS(Minimizer):
    """Limited-memory BFGS with Armijo steps: gradients alone."""

    memory: int = 10
    max_iterations: int = 2000

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        pairs: list[tuple[Tensor, Tensor]] = []
        at, k, reason = _Point.at(function, x), 0, f"max_iterations {self.max_iterations}"
        while k < self.max_iterations:
            active = (relative(at.gradient, at.x) > self.goal(x)).unsqueeze(-1)
            if not some(active):
                break
            k += 1
            step = -self.inverse_hessian(pairs, at.gradient)
            new, moved = self.line_search(function, at, step, active)
            if not some(moved):
                if not pairs:
                    reason = "no step makes the objective smaller"
                    break
                pairs = []
                continue
            pair = self.pair(new.x - at.x, new.gradient - at.gradient)
            pairs, at = [*pairs, pair][-self.memory :], new
        return at.x, self.status(at.x, at.gradient, k, reason)

    @staticmethod
    def pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both over |y|; zero where the curvature is not positive, which leaves the pair out."""
        size = torch.where(dot(s, y) > 0, norm(y).unsqueeze(-1), 0.0)
        return divide(s, size), divide(torch.where(size > 0, y, 0.0), size)

    @staticmethod
    def inverse_hessian(pairs: list[tuple[Tensor, Tensor]], g: Tensor) -> Tensor:
        """The compact form: γ g + S q - γ Y p with small triangular systems for p and q.

        Representations of Quasi-Newton Matrices and their Use in Limited Memory Methods, (3.1).
        """
        if not pairs:
            return g / norm(g).clamp_min(1.0).unsqueeze(-1)
        s, y = (torch.stack(vectors, -1) for vectors in zip(*pairs, strict=True))
        last, column = pairs[-1], g.unsqueeze(-1)
        # |y| is 1.
        gamma = dot(*last).unsqueeze(-1)
        gamma = torch.where(gamma > 0, gamma, 1.0)
        products = s.mT @ y
        d = products.diagonal(dim1=-2, dim2=-1)
        # A pair that is left out has a row and a column of zeros.
        r = products.triu() + torch.diag_embed((d == 0).to(g.dtype))
        p = torch.linalg.solve_triangular(r, s.mT @ column, upper=True)
        right = d.unsqueeze(-1) * p + gamma * (y.mT @ (y @ p) - y.mT @ column)
        q = torch.linalg.solve_triangular(r.mT, right, upper=False)
        return (gamma * (column - y @ p) + s @ q).squeeze(-1)


@dataclass(frozen=True)
class Newton(Minimizer):
    """Newton's method with Armijo steps; where the Hessian gives no descent, the gradient's."""

    max_iterations: int = 200
    linear_solver: LinearSolver = _SYMMETRIC

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        def gradient(x: Tensor) -> Tensor:
            return _Point.at(function, x).gradient

        at, k, reason = _Point.at(function, x), 0, f"max_iterations {self.max_iterations}"
        while k < self.max_iterations:
            active = (relative(at.gradient, at.x) > self.goal(x)).unsqueeze(-1)
            if not some(active):
                break
            k += 1
            # Symmetric, so that the cheaper transposed products serve.
            hessian = Operator.of_jacobian(gradient, at.x, transpose=True)
            step = self.linear_solver(hessian, -at.gradient).x
            descends = step.isfinite().all(-1, keepdim=True) & (dot(step, at.gradient) < 0)
            step = torch.where(descends, step, -at.gradient)
            at, moved = self.line_search(function, at, step, active)
            if not some(moved):
                reason = "no step makes the objective smaller"
                break
        return at.x, self.status(at.x, at.gradient, k, reason)
