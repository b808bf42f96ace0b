"""Square roots of symmetric positive definite matrices, and the Lyapunov equation behind them.

R² = A gives  R dR + dR R = dA, so that derivatives solve  R X + X R = G  whatever found R: the
backward pass of a root with repeated eigenvalues is finite, which that of an eigendecomposition
is not. Matrices have shape (*batch, n, n) and are solved one norm a matrix.
Fast Differentiable Matrix Square Root, sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation.derivatives import tangent_rule
from ebbflow.differentiation.status import NotSolved, Report, Status, settle

METHODS = ("newton-schulz", "denman-beavers", "eigen", "pade", "taylor")


def sqrtm(
    a: Tensor,
    method: str = "newton-schulz",
    *,
    degree: int | None = None,
    tol: float | None = None,
    report: Report | None = None,
) -> Tensor:
    """The symmetric positive definite R with R² = a, differentiable to any order.

    Range of condition numbers κ of `a`, with the greater of the relative errors (Frobenius) of
    value and gradient in float64, n = 8, eigenvalues evenly spaced in their logarithm:

        method             κ = 1    κ ≤ 10   κ ≤ 1e3   κ ≤ 1e6   cost
        "newton-schulz"    1e-14    1e-13    1e-13     1e-10     1.7 log₂ κ + 8 rounds of products
        "denman-beavers"   1e-14    1e-13    1e-13     1e-10     about 8 rounds with an inverse
        "eigen"            1e-14    1e-13    1e-12     1e-9      one eigendecomposition
        "pade"             1e-6     5e-3     no        no        `degree` (5) solves
        "taylor"           5e-4     5e-2     no        no        `degree` (10) products

    The last two are the paper's fixed budgets, MPA and MTP; a higher `degree` widens their range:
    "pade" is right to 1e-8 at degree 6 √κ. Far outside it they raise.

    Args:
        a: (*batch, n, n), of which the symmetric part counts.
        degree: of "pade" and "taylor".
        tol: of |R² - a| / |a|: 1e-2 for "pade", 5e-2 for "taylor", else eps^0.5 of the dtype.
        report: receives the Status instead of errors.

    Raises:
        NotSolved: the residual is above `tol`: `a` is not positive definite or out of range.
    """
    return _apply(False, a, method, degree, tol, report)


def inverse_sqrtm(
    a: Tensor,
    method: str = "newton-schulz",
    *,
    degree: int | None = None,
    tol: float | None = None,
    report: Report | None = None,
) -> Tensor:
    """The symmetric positive definite Z with Z a Z = 1; arguments and ranges as `sqrtm`.

    `tol` is of |Z a Z - 1| / √n; errors are κ times those of `sqrtm` at worst.
    """
    return _apply(True, a, method, degree, tol, report)


def _apply(
    inverse: bool,
    a: Tensor,
    method: str,
    degree: int | None,
    tol: float | None,
    report: Report | None,
) -> Tensor:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a has shape {tuple(a.shape)}; square matrices (*batch, n, n) are needed")
    if degree is not None and (degree < 1 or method not in ("pade", "taylor")):
        raise ValueError(f"degree {degree} must be at least 1, and is of 'pade' and 'taylor' alone")
    result = _Root.apply((a + a.mT) / 2, (inverse, method, degree, tol, report))
    assert isinstance(result, Tensor)
    return result


def sylvester_symmetric(r: Tensor, g: Tensor, max_iterations: int = 100) -> Tensor:
    """X with R X + X R = G for R symmetric positive definite, by products alone.

    Newton-Schulz for the sign of [[R, G], [0, -R]], stopped when the diagonal blocks are the
    identity; about 2 log₂ κ(R) + 6 iterations. Right to κ(R)² eps: κ(R) up to 1e3 gives 1e-9.
    Differentiable in R and G, to any order. R and G of shape (*batch, n, n).

    Raises:
        NotSolved: R is not positive definite, or κ(R) is beyond 1 / eps.
    """
    x = _Lyapunov.apply(r, g, max_iterations)
    assert isinstance(x, Tensor)
    return x


def _size(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x).unsqueeze(-1).unsqueeze(-1)


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


class _Lyapunov(torch.autograd.Function):
    @staticmethod
    def forward(r: Tensor, g: Tensor, max_iterations: int) -> Tensor:
        size, eye = _size(r), _eye(r)
        b, c, k = r / size, g / size, 0
        error = torch.linalg.matrix_norm(b - eye)
        floor = 100 * r.shape[-1] * torch.finfo(r.dtype).eps
        while k < max_iterations and bool((error > floor).any()):
            k += 1
            square = b @ b
            c = (c @ (3 * eye - square) - square @ c + b @ c @ b) / 2
            b = b @ (3 * eye - square) / 2
            before, error = error, torch.linalg.matrix_norm(b - eye)
            # Quadratic until rounding, which is where it stops getting better.
            if bool(((error < 1e-4) & (error >= before)).all()):
                break
        solved = (error < 1e-4) & torch.isfinite(error)
        if not bool(solved.all()):
            reason = "the matrix is not positive definite, or its condition is beyond reach"
            raise NotSolved(Status("Lyapunov by the sign function", error, 1e-4, k, solved, reason))
        return c / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)
        ctx.limit = inputs[2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        r, x = ctx.saved_tensors
        y = sylvester_symmetric(r, cotangents[0], ctx.limit)
        return -(y @ x.mT + x.mT @ y), y, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dr, dg, _ = tangents
        with tangent_rule(*ctx.saved_tensors) as (r, x):
            right = torch.zeros_like(x) if dg is None else dg
            right = right if dr is None else right - dr @ x - x @ dr
            return sylvester_symmetric(r, right, ctx.limit)

    @staticmethod
    def vmap(info: Any, in_dims: Any, r: Tensor, g: Tensor, limit: int) -> tuple[Tensor, int]:
        front = [
            t.unsqueeze(0) if d is None else t.movedim(d, 0)
            for t, d in zip((r, g), in_dims[:2], strict=True)
        ]
        r, g = front
        rank = max(r.dim(), g.dim())
        r, g = (t.reshape(len(t), *[1] * (rank - t.dim()), *t.shape[1:]) for t in (r, g))
        shape = torch.broadcast_shapes(r.shape, g.shape)
        return sylvester_symmetric(r.expand(shape), g.expand(shape), limit), 0


class _Root(torch.autograd.Function):
    """a -> a^(1/2) or a^(-1/2)."""

    @staticmethod
    def forward(a: Tensor, options: Any) -> Tensor:
        inverse, method, degree, tol, report = options
        size = _size(a)
        n = a / torch.where(size > 0, size, 1.0)
        if method == "taylor":
            pair = _taylor(n, 10 if degree is None else degree, inverse)
        elif method == "pade":
            pair = _pade(n, 5 if degree is None else degree, inverse)
        elif method == "eigen":
            values, vectors = torch.linalg.eigh(n)
            scaled = vectors * values.unsqueeze(-2) ** (-0.5 if inverse else 0.5)
            pair = scaled @ vectors.mT, 1
        else:
            coupled = _newton_schulz if method == "newton-schulz" else _denman_beavers
            y, z, k = coupled(n)
            pair = (z if inverse else y), k
        root, k = pair
        root = (root + root.mT) / 2
        product = root @ n @ root - _eye(n) if inverse else root @ root - n
        residual = torch.linalg.matrix_norm(product)
        residual = residual / (a.shape[-1] ** 0.5 if inverse else 1.0)
        budgets = {"pade": 1e-2, "taylor": 5e-2}
        goal = budgets[method] if method in budgets else torch.finfo(a.dtype).eps ** 0.5
        if tol is not None:
            goal = tol
        good = residual <= goal
        reason = "converged" if bool(good.all()) else "not positive definite, or ill-conditioned"
        settle(Status(f"square root by {method}", residual, goal, k, good, reason), report)
        return root / size.sqrt() if inverse else root * size.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)
        ctx.options = inputs[1]

    @staticmethod
    def derivative(root: Tensor, direction: Tensor, inverse: bool) -> Tensor:
        """R X + X R = D, or Z X + X Z = -Z²DZ²: the map is its own transpose."""
        if not inverse:
            return sylvester_symmetric(root, direction)
        square = root @ root
        return sylvester_symmetric(root, -square @ direction @ square)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (root,) = ctx.saved_tensors
        return _Root.derivative(root, cotangents[0], ctx.options[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with tangent_rule(*ctx.saved_tensors) as (root,):
            return _Root.derivative(root, tangents[0], ctx.options[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, options: Any) -> Any:
        return _Root.apply(a.movedim(in_dims[0], 0), options), 0


def _taylor(n: Tensor, degree: int, inverse: bool) -> tuple[Tensor, int]:
    """Σ binomial(±1/2, k) (-1)^k (1 - n)^k."""
    exponent = -0.5 if inverse else 0.5
    z = power = _eye(n) - n
    total, coefficient = _eye(n).expand_as(n), 1.0
    for k in range(1, degree + 1):
        coefficient *= -(exponent - k + 1) / k
        total = total + coefficient * power
        power = power @ z
    return total, degree


def _pade(n: Tensor, degree: int, inverse: bool) -> tuple[Tensor, int]:
    """The diagonal approximant of √(1 - z), by partial fractions: any degree is stable.

    √(1-z) ≈ 1 - Σ_j (2 / (2m+1)) sin²θ_j z / (1 - cos²θ_j z),   θ_j = jπ / (2m+1)
    """
    eye, z = _eye(n), _eye(n) - n
    total = eye.expand_as(n)
    for j in range(1, degree + 1):
        theta = j * math.pi / (2 * degree + 1)
        weight = 2 / (2 * degree + 1) * math.sin(theta) ** 2
        total = total - weight * torch.linalg.solve(eye - math.cos(theta) ** 2 * z, z)
    return (torch.linalg.inv(total) if inverse else total), degree


def _newton_schulz(n: Tensor) -> tuple[Tensor, Tensor, int]:
    """Y <- Y (3 - Z Y)/2, Z <- (3 - Z Y) Z/2 from (n, 1): the root and its inverse."""
    eye = _eye(n)
    y, z, k = n, eye.expand_as(n), 0
    error = torch.linalg.matrix_norm(eye - n)
    while k < 100:
        k += 1
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
        before, error = error, torch.linalg.matrix_norm(eye - z @ y)
        if bool((~(error > 1e-14) | ((error < 1e-3) & (error >= before / 2))).all()):
            break
    return y, z, k


def _denman_beavers(n: Tensor) -> tuple[Tensor, Tensor, int]:
    """The product form of Denman and Beavers' iteration, scaled by determinants."""
    eye = _eye(n)
    m, y, z, k = n, n, eye.expand_as(n), 0
    error = torch.linalg.matrix_norm(eye - n)
    while k < 50:
        k += 1
        mu = torch.linalg.slogdet(m)[1] / (-2 * n.shape[-1])
        mu = torch.where(error > 1e-2, mu.exp(), 1.0).unsqueeze(-1).unsqueeze(-1)
        inverse = torch.linalg.inv_ex(m)[0]
        half = (eye + inverse / mu**2) / 2
        y, z = mu * y @ half, mu * half @ z
        m = (eye + (mu**2 * m + inverse / mu**2) / 2) / 2
        before, error = error, torch.linalg.matrix_norm(eye - m)
        if bool((~(error > 1e-14) | ((error < 1e-3) & (error >= before / 2))).all()):
            break
    return y, z, k
