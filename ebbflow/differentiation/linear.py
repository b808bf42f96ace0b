"""Linear systems A x = b from products with A alone, a batch at a time.

Vectors have shape (*batch, n) and A is block-diagonal over the batch; every problem of a batch is
solved as if it were alone. Each solver ends by measuring |b - A x| / |b| itself: a recursion that
lost its way does not report success.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ebbflow.differentiation.derivatives import lazily, pullback, pushforward
from ebbflow.differentiation.status import Status, dot, keep, norm, some

Product = Callable[[Tensor], Tensor]
Ended = tuple[Tensor, int, str]


@dataclass(frozen=True)
class Operator:
    """A linear map: `matvec` x -> A x, `rmatvec` u -> Aᵀu, and `dense()` -> A (*batch, n, n).

    `dense()` may lack the first axes of the batch, where those problems share their matrix.
    """

    matvec: Product
    rmatvec: Product
    dense: Callable[[], Tensor]

    @classmethod
    def of(cls, matrix: Tensor) -> Operator:
        """The operator of a matrix (*batch, n, n)."""
        return cls(lambda x: times(matrix, x), lambda u: times(matrix.mT, u), lambda: matrix)

    @classmethod
    def of_jacobian(cls, f: Product, x: Tensor, transpose: bool = False) -> Operator:
        """The Jacobian of `f` at x (*batch, n), a block a problem, or its transpose.

        One graph serves all products of a kind.
        """
        pull = lazily(lambda: pullback(f, x)[1])
        push = lazily(lambda: pushforward(f, x, x))

        reverse, forward = lambda u: pull()(u)[0], lambda v: push()(v)

        def dense() -> Tensor:
            n, product = x.shape[-1], pull()
            eye = torch.eye(n, dtype=x.dtype, device=x.device)
            eye = eye.view(n, *[1] * (x.dim() - 1), n).expand(n, *x.shape)
            # Row i of the Jacobian is the product of e_i with its transpose.
            rows = torch.vmap(lambda u: product(u)[0])(eye).movedim(0, -2)
            return rows.mT if transpose else rows

        return cls(reverse, forward, dense) if transpose else cls(forward, reverse, dense)


@dataclass(frozen=True)
class LinearResult:
    """x (*batch, n) and how it was reached."""

    x: Tensor
    status: Status


class LinearSolver(Protocol):
    """Anything that solves A x = b and says how it went."""

    def __call__(self, operator: Operator, b: Tensor) -> LinearResult: ...


def default_tolerance(dtype: torch.dtype) -> float:
    """eps^0.6: 4e-10 in float64, 7e-5 in float32."""
    return torch.finfo(dtype).eps ** 0.6


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and zero where b is zero: the step of a problem that has nothing left to do."""
    return (a / b).masked_fill_(b == 0, 0.0)


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Each problem's matrix (*batch, m, n) on its vector (*batch, n)."""
    return matrix @ x if x.dim() == 1 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def finished(
    name: str, operator: Operator, b: Tensor, x: Tensor, k: int, tolerance: float, reason: str
) -> LinearResult:
    """Measure the true residual and write the status; twice the tolerance allows for rounding."""
    residual = divide(norm(b - operator.matvec(x)), norm(b))
    converged = torch.isfinite(residual) & (residual <= 2 * tolerance)
    why = "converged" if bool(converged.all()) else reason
    return LinearResult(x, Status(name, residual, tolerance, k, converged, why))


@dataclass(frozen=True)
class Iterative:
    """A solver by products alone.

    Args:
        tolerance: of |b - Ax| / |b|; eps^0.6 of the dtype unless given.
        max_iterations: 10 n + 50 unless given.
        ridge: r >= 0 solves (A + r) x = b instead.
    """

    tolerance: float | None = None
    max_iterations: int | None = None
    ridge: float = 0.0

    def __call__(self, operator: Operator, b: Tensor) -> LinearResult:
        operator = with_ridge(operator, self.ridge)
        rtol = default_tolerance(b.dtype) if self.tolerance is None else self.tolerance
        cap = 10 * b.shape[-1] + 50 if self.max_iterations is None else self.max_iterations
        x, k, reason = self.iterate(operator, b, rtol * norm(b).unsqueeze(-1), cap)
        early = "rounding: the recursion says it is done" if k < cap else f"max_iterations {cap}"
        return finished(type(self).__name__, operator, b, x, k, rtol, reason or early)

    def iterate(self, operator: Operator, b: Tensor, goal: Tensor, cap: int) -> Ended:
        """x, iterations, and why they ended before both the `goal` (*batch, 1) and the `cap`."""
        raise NotImplementedError


@dataclass(frozen=True)
class CG(Iterative):
    """Conjugate gradients, for A symmetric and definite (of either sign)."""

    def iterate(self, operator: Operator, b: Tensor, goal: Tensor, cap: int) -> Ended:
        x, r, p = torch.zeros_like(b), b, b
        rr, sign = dot(r, r), None
        k, reason = 0, ""
        while k < cap:
            active = rr.sqrt() > goal
            if not some(active):
                break
            k += 1
            q = operator.matvec(p)
            curvature = dot(p, q)
            sign = curvature.sign() if sign is None else sign
            # Curvatures of both signs: an indefinite matrix, on which the method means nothing.
            if some(active & (curvature * sign <= 0)):
                reason = "the matrix is singular or not definite; use gmres or normal-cg"
                break
            step = keep(active, rr / curvature, 0.0)
            x, r = torch.addcmul(x, step, p), torch.addcmul(r, step, q, value=-1)
            before, rr = rr, keep(active, dot(r, r), rr)
            p = keep(active, torch.addcmul(r, rr / before, p), p)
        return x, k, reason


@dataclass(frozen=True)
class NormalCG(Iterative):
    """Conjugate gradients on AᵀA x = Aᵀb: any invertible A, at the square of its condition."""

    def iterate(self, operator: Operator, b: Tensor, goal: Tensor, cap: int) -> Ended:
        x, r = torch.zeros_like(b), b
        s = operator.rmatvec(r)
        p, ss = s, dot(s, s)
        k, reason = 0, ""
        while k < cap:
            active = (norm(r).unsqueeze(-1) > goal) & (ss > 0)
            if not some(active):
                reason = "the right-hand side is not in the range of a singular matrix"
                break
            k += 1
            q = operator.matvec(p)
            step = keep(active, divide(ss, dot(q, q)), 0.0)
            x, r = torch.addcmul(x, step, p), torch.addcmul(r, step, q, value=-1)
            s = operator.rmatvec(r)
            before, ss = ss, keep(active, dot(s, s), ss)
            p = keep(active, torch.addcmul(s, ss / before, p), p)
        return x, k, reason


@dataclass(frozen=True)
class BiCGSTAB(Iterative):
    """Stabilised bi-conjugate gradients: any A, two products an iteration, short recurrences."""

    def iterate(self, operator: Operator, b: Tensor, goal: Tensor, cap: int) -> Ended:
        x, r, shadow, p = torch.zeros_like(b), b, b, b
        rho = dot(shadow, r)
        k, reason = 0, ""
        while k < cap:
            active = norm(r).unsqueeze(-1) > goal
            if not some(active):
                break
            k += 1
            v = operator.matvec(p)
            alpha = divide(rho, dot(shadow, v))
            s = torch.addcmul(r, alpha, v, value=-1)
            t = operator.matvec(s)
            omega = divide(dot(t, s), dot(t, t))
            stuck = active & ((omega == 0) | (rho == 0))
            if some(stuck) and some(stuck & (norm(s).unsqueeze(-1) > goal)):
                reason = "the recurrence broke down; use gmres"
                break
            x = keep(active, torch.addcmul(x, alpha, p).addcmul(omega, s), x)
            r = keep(active, torch.addcmul(s, omega, t, value=-1), r)
            before, rho = rho, keep(active, dot(shadow, r), rho)
            beta = divide(rho * alpha, before * omega)
            p = keep(active, torch.addcmul(p, omega, v, value=-1).mul(beta).add(r), p)
        return x, k, reason


@dataclass(frozen=True)
class GMRES(Iterative):
    """Generalised minimal residuals, restarted: any A, residual never grows.

    Args:
        restart: length of the Krylov basis, which is kept in memory.
    """

    restart: int = 50

    def iterate(self, operator: Operator, b: Tensor, goal: Tensor, cap: int) -> Ended:
        x, k, reason = torch.zeros_like(b), 0, ""
        r, left = b, norm(b).unsqueeze(-1)
        while k < cap and some(left > goal):
            length = min(self.restart, b.shape[-1], cap - k)
            step, done = self.cycle(operator, r, length, goal)
            k += done
            x = x + keep(left > goal, step, 0.0)
            r = b - operator.matvec(x)
            before, left = left, norm(r).unsqueeze(-1)
            if some((left > goal) & (left > 0.9999 * before)):
                reason = "stagnation: the matrix is singular, or `restart` is too short"
                break
        return x, k, reason

    @staticmethod
    def cycle(operator: Operator, r: Tensor, length: int, goal: Tensor) -> tuple[Tensor, int]:
        """The best step in a Krylov space of dimension `length`, and the dimension it needed.

        The residual before the step is known: β / |u| for the u, u_0 = 1, that is orthogonal to
        every column of the Hessenberg matrix.
        """
        beta, half, rounding = norm(r).unsqueeze(-1), 0.5 * goal, 10 * torch.finfo(r.dtype).eps
        basis = r.new_zeros(*r.shape[:-1], length, r.shape[-1])
        hessenberg = r.new_zeros(*r.shape[:-1], length + 1, length)
        last, u = divide(r, beta), torch.ones_like(beta)
        for j in range(length):
            basis[..., j, :] = last
            w = operator.matvec(last)
            span, before = basis.narrow(-2, 0, j + 1), norm(w).unsqueeze(-1)
            # Gram-Schmidt twice: once is not orthogonal enough at 1e-10.
            h = times(span, w)
            w = w - times(span.mT, h)
            more = times(span, w)
            w, h = w - times(span.mT, more), h + more
            height = norm(w).unsqueeze(-1)
            outside = height > rounding * before
            hessenberg[..., : j + 2, j] = torch.cat([h, height * outside], -1)
            u = torch.cat([u, dot(u, h) / -height], -1)
            if not some(outside & (beta > half * norm(u).unsqueeze(-1))):
                break
            last = keep(outside, w / height, 0.0)
        y = beta * torch.linalg.pinv(hessenberg[..., : j + 2, : j + 1])[..., 0]
        return times(span.mT, y), j + 1


@dataclass(frozen=True)
class Direct:
    """LU of the matrix itself, n products and n³/3 work: best for n up to some hundreds.

    A condition number beyond 1 / (10 n eps), as seen by one more right-hand side, is a failure.
    """

    tolerance: float | None = None
    ridge: float = 0.0

    def __call__(self, operator: Operator, b: Tensor) -> LinearResult:
        n = b.shape[-1]
        rtol = default_tolerance(b.dtype) if self.tolerance is None else self.tolerance
        matrix = with_ridge(operator, self.ridge).dense()
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        # Problems that share a matrix are columns of one right-hand side.
        columns = b.reshape(-1, *matrix.shape[:-1]).movedim(0, -1)
        probe = torch.ones_like(columns[..., :1])
        probe[..., 1::2, :] = -1.0
        solved = torch.linalg.lu_solve(factors, pivots, torch.cat([columns, probe], -1))
        x, test = solved[..., :-1].movedim(-1, 0).reshape(b.shape), solved[..., -1]
        condition = torch.linalg.matrix_norm(matrix, ord=1) * norm(test) / n**0.5
        sound = torch.isfinite(condition) & (condition < 1 / (10 * n * torch.finfo(b.dtype).eps))
        end = finished("LU", Operator.of(matrix), b, x, 1, rtol, "the matrix is ill-conditioned")
        if bool(sound.all()):
            return end
        why, converged = "the matrix is singular to rounding", end.status.converged & sound
        return LinearResult(x, replace(end.status, converged=converged, reason=why))


@dataclass(frozen=True)
class Auto:
    """LU up to `largest_dense` unknowns, else `iterative`."""

    iterative: LinearSolver
    largest_dense: int = 512

    def __call__(self, operator: Operator, b: Tensor) -> LinearResult:
        solver = Direct() if b.shape[-1] <= self.largest_dense else self.iterative
        return solver(operator, b)


def with_ridge(operator: Operator, ridge: float) -> Operator:
    """A + ridge."""
    if ridge == 0:
        return operator
    if ridge < 0:
        raise ValueError(f"ridge {ridge} must be at least 0")

    def dense() -> Tensor:
        matrix = operator.dense()
        return matrix + torch.diag_embed(torch.full_like(matrix[..., 0], ridge))

    return Operator(
        lambda x: operator.matvec(x) + ridge * x, lambda u: operator.rmatvec(u) + ridge * u, dense
    )


_NAMED: dict[str, LinearSolver] = {
    "auto": Auto(GMRES()),
    "cg": CG(),
    "normal-cg": NormalCG(),
    "gmres": GMRES(),
    "bicgstab": BiCGSTAB(),
    "direct": Direct(),
}


def get(solver: str | LinearSolver) -> LinearSolver:
    """A linear solver by name, or the one given."""
    if not isinstance(solver, str):
        return solver
    if solver not in _NAMED:
        raise ValueError(f"linear_solver {solver!r} is not one of {sorted(_NAMED)}")
    return _NAMED[solver]
