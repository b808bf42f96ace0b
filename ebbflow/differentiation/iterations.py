"""Fixed points x = T(x) and roots F(x) = 0, a batch at a time.

Functions map (*batch, n) to (*batch, n); each problem of a batch stops by itself. A residual is
counted as small when |F(x)| <= tolerance (1 + |x|).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebbflow.differentiation.linear import GMRES, Auto, LinearSolver, Operator, divide, times
from ebbflow.differentiation.status import Status, dot, keep, norm, some

Map = Callable[[Tensor], Tensor]


# Newton's steps need not be exact; what they leave over, the next one takes.
_ANY = Auto(GMRES(tolerance=1e-6))


def default_tolerance(dtype: torch.dtype) -> float:
    """eps^0.7: 1e-11 in float64, 1e-5 in float32."""
    return torch.finfo(dtype).eps ** 0.7


def relative(r: Tensor, x: Tensor) -> Tensor:
    """|r| / (1 + |x|) of each problem, (*batch,)."""
    return norm(r) / (1 + norm(x))


@dataclass(frozen=True)
class Solver:
    """What iterates, and when it stops.

    Args:
        tolerance: of the relative residual; eps^0.7 of the dtype unless given.
        max_iterations: a solve that needs more has failed.
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if self.max_iterations < 1 or (self.tolerance is not None and self.tolerance < 0):
            raise ValueError(
                f"max_iterations {self.max_iterations} must be at least 1 and tolerance "
                f"{self.tolerance} at least 0"
            )

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        """The solution from x, and how it was reached."""
        raise NotImplementedError

    def goal(self, x: Tensor) -> float:
        return default_tolerance(x.dtype) if self.tolerance is None else self.tolerance

    def status(self, x: Tensor, r: Tensor, iterations: int, reason: str) -> Status:
        size, goal = relative(r, x), self.goal(x)
        converged = size <= goal
        why = "converged" if bool(converged.all()) else reason
        return Status(type(self).__name__, size, goal, iterations, converged, why)


@dataclass(frozen=True)
class FixedPointSolver(Solver):
    """Solves x = T(x), or F(x) = 0 as x = x + F(x)."""

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        raise NotImplementedError


@dataclass(frozen=True)
class RootSolver(Solver):
    """Solves F(x) = 0, or x = T(x) as T(x) - x = 0."""

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        raise NotImplementedError


@dataclass(frozen=True)
class Picard(FixedPointSolver):
    """x <- x + damping (T(x) - x)."""

    damping: float = 1.0

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        k, goal = 0, self.goal(x)
        r = function(x) - x
        while k < self.max_iterations:
            active = (relative(r, x) > goal).unsqueeze(-1)
            if not some(active):
                break
            k += 1
            x = keep(active, torch.add(x, r, alpha=self.damping), x)
            r = keep(active, function(x) - x, r)
        return x, self.status(x, r, k, f"max_iterations {self.max_iterations}")


@dataclass(frozen=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration: the mixture of the last `memory` values of T with least residual.

    Where |T(x) - x| more than doubles, what came before is forgotten: without that, maps with
    kinks, as proximal and projected gradient steps are, may never settle.

    Args:
        memory: pairs (x, T(x)) that are kept.
        ridge: relative, of the small least-squares problem.
    """

    memory: int = 8
    ridge: float = 1e-12

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        # Rows are differences of successive T(x) and r.
        dt, dr = x.new_zeros(2, *x.shape[:-1], self.memory, x.shape[-1])
        t, k, goal = function(x), 0, self.goal(x)
        r = t - x
        size = norm(r)
        while k < self.max_iterations:
            active = (size > goal * (1 + norm(x))).unsqueeze(-1)
            if not some(active):
                break
            # The mixture of the past whose r is least; the ridge keeps its matrix definite.
            gram = dr @ dr.mT
            diagonal = gram.diagonal(dim1=-2, dim2=-1)
            diagonal.mul_(1 + self.ridge).masked_fill_(diagonal == 0, 1.0)
            factor = torch.linalg.cholesky_ex(gram)[0]
            weights = torch.cholesky_solve(times(dr, r).unsqueeze(-1), factor).squeeze(-1)
            old, x = x, keep(active, t - times(dt.mT, weights), x)
            t = keep(active, function(x), t)
            there = t - x
            change = there - r
            # Not by T(x) itself: to rounding, the two tables are of the same steps.
            dt[..., k % self.memory, :] = x - old + change
            dr[..., k % self.memory, :] = change
            # A jump means that T has another slope here, as behind a kink: the past misleads.
            before, size = size, norm(there)
            forget = size > 2 * before
            if some(forget):
                stays = (~forget).to(x.dtype).unsqueeze(-1).unsqueeze(-1)
                dt, dr = dt * stays, dr * stays
            r, k = there, k + 1
        return x, self.status(x, r, k, f"max_iterations {self.max_iterations}")


@dataclass(frozen=True)
class AndersonNewton(FixedPointSolver):
    """Anderson's steps, and from time to time Newton's for as long as each gains a digit.

    For maps of several smooth pieces, as proximal and projected gradient steps are: Anderson's
    steps find the piece, Newton's end on it.

    Args:
        patience: Anderson's steps before Newton's are tried, doubled when they fail.
    """

    memory: int = 8
    patience: int = 10
    linear_solver: LinearSolver = _ANY

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        def residual(x: Tensor) -> Tensor:
            return function(x) - x

        r, k, patience = residual(x), 0, self.patience
        while k < self.max_iterations and some(relative(r, x) > self.goal(x)):
            steps = min(patience, self.max_iterations - k)
            x, _ = Anderson(self.tolerance, steps, self.memory)(function, x)
            r, k, gained = residual(x), k + steps, False
            while k < self.max_iterations:
                active = (relative(r, x) > self.goal(x)).unsqueeze(-1)
                if not some(active):
                    break
                step = self.linear_solver(Operator.of_jacobian(residual, x), -r).x
                new = torch.where(step.isfinite(), x + step, x)
                there = residual(new)
                better = active & (norm(there) < 0.1 * norm(r)).unsqueeze(-1)
                if not some(better):
                    break
                x, r = torch.where(better, new, x), torch.where(better, there, r)
                k, gained = k + 1, True
            patience = patience if gained else 2 * patience
        return x, self.status(x, r, k, f"max_iterations {self.max_iterations}")


@dataclass(frozen=True)
class Broyden(RootSolver):
    """Broyden's good method, limited memory: the inverse Jacobian as -1 + a sum of outer products.

    For a root of F near that of x + F(x), as fixed points are; restarts when the memory is full.
    """

    memory: int = 30

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        us: list[Tensor] = []
        vs: list[Tensor] = []
        r, k = function(x), 0

        def inverse(y: Tensor) -> Tensor:
            return sum((u * dot(v, y) for u, v in zip(us, vs, strict=True)), -y)

        def transposed(y: Tensor) -> Tensor:
            return sum((v * dot(u, y) for u, v in zip(us, vs, strict=True)), -y)

        while k < self.max_iterations:
            active = (relative(r, x) > self.goal(x)).unsqueeze(-1)
            if not some(active):
                break
            k += 1
            step = keep(active, -inverse(r), 0.0)
            new = function(x + step)
            # The update keeps to problems that moved, and a step that made things worse is halved.
            for _ in range(10):
                worse = active.squeeze(-1) & ~(norm(new) < 2 * norm(r))
                if not some(worse):
                    break
                step = torch.where(worse.unsqueeze(-1), step / 2, step)
                new = function(x + step)
            dr = keep(active, new - r, 0.0)
            image, back = inverse(dr), transposed(step)
            us = [*us, divide(step - image, dot(step, image))]
            vs = [*vs, back]
            if len(us) > self.memory:
                us, vs = [], []
            x, r = x + step, keep(active, new, r)
        return x, self.status(x, r, k, f"max_iterations {self.max_iterations}")


@dataclass(frozen=True)
class NewtonKrylov(RootSolver):
    """J(x) step = -F(x) by a linear solver on products with J, with halving until |F| falls."""

    max_iterations: int = 100
    linear_solver: LinearSolver = _ANY

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        r, k, reason = function(x), 0, f"max_iterations {self.max_iterations}"
        while k < self.max_iterations:
            active = (relative(r, x) > self.goal(x)).unsqueeze(-1)
            if not some(active):
                break
            k += 1
            step = self.linear_solver(Operator.of_jacobian(function, x), -r).x
            step = torch.where(active & step.isfinite(), step, 0.0)
            size, t = norm(r).unsqueeze(-1), torch.ones_like(r[..., :1])
            for _ in range(30):
                new = function(x + t * step)
                good = norm(new).unsqueeze(-1) <= (1 - 1e-4 * t) * size
                if bool((good | ~active).all()):
                    break
                t = torch.where(good, t, t / 2)
            moved = active & (norm(new).unsqueeze(-1) < size)
            if not some(moved):
                reason = "no step makes the residual smaller"
                break
            x, r = torch.where(moved, x + t * step, x), torch.where(moved, new, r)
        return x, self.status(x, r, k, reason)


@dataclass(frozen=True)
class Bisection(RootSolver):
    """Halving of a bracket, component by component, for F whose component i depends on x_i alone.

    F must have opposite signs at `lower` and `upper`; it need not be smooth.
    """

    lower: float = 0.0
    upper: float = 1.0
    max_iterations: int = 200

    def __call__(self, function: Map, x: Tensor) -> tuple[Tensor, Status]:
        low, high = torch.full_like(x, self.lower), torch.full_like(x, self.upper)
        sign, end = function(low).sign(), function(high).sign()
        if bool((sign * end > 0).any()):
            raise ValueError(
                f"no sign change between lower {self.lower} and upper {self.upper}: "
                "widen the bracket"
            )
        # A root on the lower end itself has sign 0 there.
        sign = torch.where(sign == 0, -end, sign)
        k, x = 0, (low + high) / 2
        while k < self.max_iterations and bool(((x != low) & (x != high)).any()):
            k += 1
            left = function(x).sign() == sign
            low, high = torch.where(left, x, low), torch.where(left, high, x)
            x = (low + high) / 2
        return x, self.status(x, function(x), k, "the function jumps at its root")
