"""Minimisers of f: (*batch, n) -> (*batch,), a batch at a time; each problem stops by itself.

A gradient is counted as small when |∇f(x)| <= tolerance (1 + |x|).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebbflow.differentiation.iterations import Map, Solver, jacobian, relative
from ebbflow.differentiation.linear import CG, Auto, LinearSolver, divide
from ebbflow.differentiation.status import Status, dot, norm

# Newton's steps need not be exact; what they leave over, the next one takes.
_SYMMETRIC = Auto(CG(tolerance=1e-6))


@dataclass(frozen=True)
class Minimizer(Solver):
    """Minimises f: (*batch, n) -> (*batch,); the residual is the gradient."""

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        raise NotImplementedError

    @staticmethod
    def line_search(
        function: Map, x: Tensor, g: Tensor, step: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Armijo's rule; within rounding of the value, a smaller gradient counts as progress."""
        value, slope = function(x).unsqueeze(-1), dot(g, step)
        noise = 10 * torch.finfo(x.dtype).eps * value.abs()
        t, size = torch.ones_like(slope), norm(g).unsqueeze(-1)
        new, good = x, torch.zeros_like(active)
        for _ in range(40):
            new = x + t * step
            there = function(new).unsqueeze(-1)
            good = there <= value + 1e-4 * t * slope
            close = (there <= value + noise) & ~good
            if bool((close & active).any()):
                good = good | (close & (norm(gradient(function, new)).unsqueeze(-1) < size))
            if bool((good | ~active).all()):
                break
            t = torch.where(good, t, t / 2)
        moved = active & good
        return torch.where(moved, new, x), moved


@dataclass(frozen=True)
class GradientDescent(Minimizer):
    """x <- x - step ∇f(x)."""

    step: float = 0.1
    max_iterations: int = 10000

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        g, k = gradient(function, x), 0
        while k < self.max_iterations:
            active = (relative(g, x) > self.goal(x)).unsqueeze(-1)
            if not bool(active.any()):
                break
            k += 1
            x = torch.where(active, x - self.step * g, x)
            g = torch.where(active, gradient(function, x), g)
        return x, self.status(x, g, k, f"max_iterations {self.max_iterations}")


@dataclass(frozen=True)
class LBFGS(Minimizer):
    """Limited-memory BFGS with Armijo steps: gradients alone."""

    memory: int = 10
    max_iterations: int = 2000

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        pairs: list[tuple[Tensor, Tensor]] = []
        g, k, reason = gradient(function, x), 0, f"max_iterations {self.max_iterations}"
        while k < self.max_iterations:
            active = (relative(g, x) > self.goal(x)).unsqueeze(-1)
            if not bool(active.any()):
                break
            k += 1
            step = -self.inverse_hessian(pairs, g)
            new, moved = self.line_search(function, x, g, step, active)
            if not bool(moved.any()):
                if not pairs:
                    reason = "no step makes the objective smaller"
                    break
                pairs = []
                continue
            there = torch.where(moved, gradient(function, new), g)
            pairs = [*pairs, (new - x, there - g)][-self.memory :]
            x, g = new, there
        return x, self.status(x, g, k, reason)

    @staticmethod
    def inverse_hessian(pairs: list[tuple[Tensor, Tensor]], g: Tensor) -> Tensor:
        """The two-loop recursion; pairs without positive curvature are left out."""
        if not pairs:
            return g / norm(g).clamp_min(1.0).unsqueeze(-1)
        rhos = [divide(torch.ones_like(dot(s, y)), dot(s, y).clamp_min(0.0)) for s, y in pairs]
        alphas: list[Tensor] = []
        q = g
        for (s, y), rho in zip(reversed(pairs), reversed(rhos), strict=True):
            alphas.append(rho * dot(s, q))
            q = q - alphas[-1] * y
        s, y = pairs[-1]
        scale = divide(dot(s, y), dot(y, y))
        q = q * torch.where(scale > 0, scale, 1.0)
        for (s, y), rho, alpha in zip(pairs, rhos, reversed(alphas), strict=True):
            q = q + s * torch.where(rho > 0, alpha - rho * dot(y, q), 0.0)
        return q


@dataclass(frozen=True)
class Newton(Minimizer):
    """Newton's method with Armijo steps; where the Hessian gives no descent, the gradient's."""

    max_iterations: int = 200
    linear_solver: LinearSolver = _SYMMETRIC

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        g, k, reason = gradient(function, x), 0, f"max_iterations {self.max_iterations}"
        while k < self.max_iterations:
            active = (relative(g, x) > self.goal(x)).unsqueeze(-1)
            if not bool(active.any()):
                break
            k += 1
            step = self.linear_solver(jacobian(lambda z: gradient(function, z), x), -g).x
            descends = step.isfinite().all(-1, keepdim=True) & (dot(step, g) < 0)
            step = torch.where(descends, step, -g)
            x, moved = self.line_search(function, x, g, step, active)
            if not bool(moved.any()):
                reason = "no step makes the objective smaller"
                break
            g = torch.where(moved, gradient(function, x), g)
        return x, self.status(x, g, k, reason)


def gradient(function: Map, x: Tensor) -> Tensor:
    """∇f of each problem, (*batch, n)."""
    value, pull = torch.func.vjp(function, x)[:2]
    return pull(torch.ones_like(value))[0]
