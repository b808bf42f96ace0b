"""The catalogue of conditions, projections and proximal operators against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from ebbflow.differentiation import (
    NotSolved,
    conditions,
    fixed_point,
    minimize,
    projections,
    proximal,
    quadratic_program,
    root,
)

torch.manual_seed(3)
F64 = torch.float64
A = torch.randn(9, 5, dtype=F64)
Y = torch.randn(9, dtype=F64)
X = torch.randn(5, dtype=F64)
STEP = 0.9 / torch.linalg.matrix_norm(A.mT @ A, ord=2).item()


def squares(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (A @ x - y).square().sum()


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "simplex": projections.simplex,
    "l1 ball": lambda x: projections.l1_ball(x, 1.2),
    "l2 ball": lambda x: projections.l2_ball(x, 0.7),
    "box": lambda x: projections.box(x, -0.3, 0.4),
    "affine": lambda x: projections.affine(x, A[:2], Y[:2]),
    "hyperplane": lambda x: projections.hyperplane(x, A[0], 0.3),
    "halfspace": lambda x: projections.halfspace(x, A[0], -5.0),
    "cone": projections.second_order_cone,
    "polytope": lambda x: projections.transport_polytope(
        x.view(1, 5) * A[:3], torch.tensor([0.5, 0.3, 0.2], dtype=F64), X.softmax(0)
    ).flatten(),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_idempotent_and_differentiable(name: str) -> None:
    f = PROJECTIONS[name]
    x = X.clone().requires_grad_()
    # A step at which what the solvers leave over, 1e-11, does not show.
    assert gradcheck(f, (x,), eps=1e-4)
    assert torch.allclose(jacfwd(f)(X), jacrev(f)(X), atol=1e-9)
    xs = torch.randn(3, 5, dtype=F64)
    assert torch.allclose(vmap(f)(xs), torch.stack([f(x) for x in xs]), atol=1e-9)
    if name != "polytope":
        p = f(X)
        assert torch.allclose(f(p), p, atol=1e-12)
        # x - p is normal to the set at p: no point of the set lies further along it.
        for q in map(f, torch.randn(20, 5, dtype=F64)):
            assert (X - p) @ (q - p) < 1e-10


def test_the_simplex_s_jacobian_is_the_closed_form() -> None:
    support = (projections.simplex(X) > 0).to(F64)
    closed = support.diag() - torch.outer(support, support) / support.sum()
    assert torch.allclose(jacrev(projections.simplex)(X), closed, atol=1e-12)
    assert gradgradcheck(projections.simplex, (X.clone().requires_grad_(),))


PROXES = {
    "lasso": (proximal.lasso, lambda z: z.abs().sum()),
    "ridge": (proximal.ridge, lambda z: 0.5 * z.square().sum()),
    "group": (proximal.group_lasso, lambda z: z.norm()),
    "max": (proximal.max_norm, lambda z: z.abs().max()),
    "logistic": (proximal.logistic, lambda z: torch.nn.functional.softplus(z).sum()),
}


@pytest.mark.parametrize("name", PROXES)
def test_proximal_operators_minimise_and_are_differentiable(name: str) -> None:
    prox, g = PROXES[name]
    scale = torch.tensor(0.4, dtype=F64)
    p = prox(X, scale)
    least = scale * g(p) + 0.5 * (p - X).square().sum()
    for shift in torch.randn(30, 5, dtype=F64) * 0.05:
        assert scale * g(p + shift) + 0.5 * (p + shift - X).square().sum() > least
    inputs = X.clone().requires_grad_(), scale.clone().requires_grad_()
    assert gradcheck(prox, inputs, eps=1e-4)


def lasso_path(weight: Tensor) -> Tensor:
    condition = conditions.proximal_gradient(
        squares, lambda z, w: proximal.lasso(z, STEP * w), STEP
    )
    return fixed_point(condition, torch.zeros_like(X), Y, weight)


def test_the_lasso_s_derivative_is_the_closed_form() -> None:
    weight = torch.tensor(1.5, dtype=F64)
    x = lasso_path(weight)
    alive = x != 0
    assert 0 < alive.sum() < 5
    part = A[:, alive]
    closed = torch.zeros_like(x)
    closed[alive] = -torch.linalg.inv(part.mT @ part) @ x[alive].sign()
    for transform in (jacrev, jacfwd):
        assert torch.allclose(transform(lasso_path)(weight), closed, atol=1e-9)
    # Linear between kinks.
    assert jacfwd(jacrev(lasso_path))(weight).abs().max() < 1e-8
    weights = torch.tensor([1.4, 1.5], dtype=F64)
    assert torch.allclose(vmap(jacrev(lasso_path))(weights)[1], closed, atol=1e-9)


def on_the_simplex(name: str, y: Tensor) -> Tensor:
    start = torch.full_like(X, 0.2)
    if name == "projected":
        return fixed_point(
            conditions.projected_gradient(squares, projections.simplex, STEP), start, y
        )
    mirror = conditions.mirror_descent(squares, lambda z: z.softmax(0), torch.log, 0.05)
    return fixed_point(mirror, start, y)


def test_conditions_for_one_problem_agree() -> None:
    """The same constrained problem by projection, mirror descent, KKT and as a cone program."""
    y = A @ torch.tensor([0.3, 0.1, 0.2, 0.25, 0.15], dtype=F64) + 0.05 * Y
    one = torch.ones(1, 5, dtype=F64)

    def program(y: Tensor) -> Tensor:
        total = torch.ones(1, dtype=F64)
        zero = torch.zeros(5, dtype=F64)
        return quadratic_program(A.mT @ A, -A.mT @ y, one, total, -torch.eye(5, dtype=F64), zero).x

    reference = jacrev(program)(y)
    assert (program(y) > 1e-3).all()
    for name in ("projected", "mirror"):
        assert torch.allclose(on_the_simplex(name, y), program(y), atol=1e-8)
        assert torch.allclose(
            jacrev(lambda y, n=name: on_the_simplex(n, y))(y), reference, atol=1e-7
        )


def test_stationary_gradient_and_newton_conditions_agree() -> None:
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return squares(x, Y) + t * (x**4).sum()

    t, start = torch.tensor(0.3, dtype=F64), torch.zeros_like(X)
    stationary = conditions.stationary(loss)
    found = [
        jacrev(f)(t)
        for f in (
            lambda t: minimize(loss, start, t),
            lambda t: root(stationary, start, t),
            lambda t: fixed_point(conditions.gradient_descent(loss, STEP / 2), start, t),
            lambda t: fixed_point(conditions.newton(stationary), start, t, solver="picard"),
        )
    ]
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-8)


def test_block_proximal_gradient() -> None:
    def joint(x: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return squares(torch.cat(x), y)

    condition = conditions.block_proximal_gradient(
        joint,
        (lambda z, w: proximal.lasso(z, STEP * w), lambda z, w: proximal.ridge(z, STEP / 2 * w)),
        (STEP, STEP / 2),
    )
    weights = torch.tensor([1.0, 0.7], dtype=F64)

    def f(w: Tensor) -> Tensor:
        x = fixed_point(
            condition, (torch.zeros(2, dtype=F64), torch.zeros(3, dtype=F64)), Y, (w[0], w[1])
        )
        return torch.cat(x)

    assert gradcheck(f, (weights.requires_grad_(),), eps=1e-4)


Q = torch.randn(4, 4, dtype=F64)
Q = Q @ Q.mT + torch.eye(4, dtype=F64)
PROGRAM = (
    Q,
    torch.randn(4, dtype=F64),
    torch.randn(1, 4, dtype=F64),
    torch.randn(1, dtype=F64),
    torch.randn(3, 4, dtype=F64),
    torch.rand(3, dtype=F64) * 0.1,
)


def test_quadratic_programs() -> None:
    q, c, e, d, m, h = PROGRAM
    x, _, dual = quadratic_program(*PROGRAM)
    assert ((m @ x - h) < 1e-8).all() and (dual > -1e-8).all() and (dual > 1e-3).any()
    inputs = tuple(t.clone().requires_grad_() for t in (c, d, h))

    def f(c: Tensor, d: Tensor, h: Tensor) -> Tensor:
        return quadratic_program(q, c, e, d, m, h).x

    assert gradcheck(f, inputs)
    assert gradcheck(
        lambda q, e, m: quadratic_program(q, c, e, d, m, h).x,
        tuple(t.clone().requires_grad_() for t in (q, e, m)),
    )
    cs = torch.randn(2, 4, dtype=F64)
    rows = torch.stack([jacrev(f)(c, d, h) for c in cs])
    assert torch.allclose(vmap(lambda c: jacrev(f)(c, d, h))(cs), rows, atol=1e-8)
    # With equalities alone, the dense system of the textbook.
    matrix = torch.cat([torch.cat([q, e.mT], 1), torch.cat([e, torch.zeros(1, 1)], 1)])
    dense = (torch.linalg.inv(matrix) @ torch.cat([-c, d]))[:4]
    assert torch.allclose(quadratic_program(q, c, e, d).x, dense, atol=1e-9)


def test_programs_without_a_solution_raise() -> None:
    q, c, *_ = PROGRAM
    m = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=F64)
    h = torch.tensor([-1.0, -1.0], dtype=F64)
    with pytest.raises(NotSolved):
        quadratic_program(q, c, None, None, m, h)
    with pytest.raises(NotSolved):
        quadratic_program(torch.zeros_like(q), c)
    rows = torch.tensor([0.5, 0.7], dtype=F64)
    with pytest.raises(ValueError, match="totals must be equal"):
        projections.transport_polytope(torch.randn(2, 2, dtype=F64), rows, rows.flip(0) * 2)


def test_a_second_order_cone_program() -> None:
    """min cᵀx over |x - p| <= r is p - r c/|c|."""
    c, p = torch.randn(3, dtype=F64), torch.randn(3, dtype=F64)
    r = torch.tensor(0.8, dtype=F64)
    a = torch.cat([torch.zeros(1, 3, dtype=F64), -torch.eye(3, dtype=F64)])

    def f(c: Tensor, p: Tensor, r: Tensor) -> Tensor:
        b = torch.cat([r.reshape(1), -p])

        def solve(z: tuple[Tensor, Tensor], a: Tensor, b: Tensor, c: Tensor) -> tuple:
            x = -b[1:] - b[0] * c / c.norm()
            y = torch.cat([c.norm().reshape(1), c])
            return x, y - (b - a @ x)

        return root(conditions.conic_residual(0, 0, (4,)), solver=solve)(
            (torch.zeros(3, dtype=F64), torch.zeros(4, dtype=F64)), a, b, c
        )[0]

    def closed(c: Tensor, p: Tensor, r: Tensor) -> Tensor:
        return p - r * c / c.norm()

    for i in range(3):
        ours = jacrev(f, argnums=i)(c, p, r)
        assert torch.allclose(ours, jacrev(closed, argnums=i)(c, p, r), atol=1e-8)


def test_optimal_transport() -> None:
    cost = torch.rand(3, 4, dtype=F64)
    a, b = torch.rand(3, dtype=F64).softmax(0), torch.rand(4, dtype=F64).softmax(0)
    plan = projections.transport(cost, a, b, 0.1)
    assert torch.allclose(plan.sum(1), a) and torch.allclose(plan.sum(0), b)

    def value(cost: Tensor) -> Tensor:
        p = projections.transport(cost, a, b, 0.1)
        return (cost * p).sum() + 0.1 * (p * (p.log() - 1)).sum()

    # Danskin: the derivative of the optimal value in the cost is the plan itself.
    assert torch.allclose(grad(value)(cost), plan, atol=1e-9)
    flat = cost.clone().requires_grad_()
    assert gradcheck(lambda c: projections.transport(c, a, b, 0.1), (flat,), eps=1e-4)
    hessian = jacfwd(grad(value))(cost)
    assert torch.allclose(
        hessian, jacrev(lambda c: projections.transport(c, a, b, 0.1))(cost), atol=1e-8
    )
