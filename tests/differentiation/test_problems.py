"""Seven problems: derivatives to second order, forward and reverse, alone and in batches.

The references are closed forms and central differences of solutions that are solved afresh.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ebbflow.differentiation import (
    conditions,
    fixed_point,
    minimize,
    projections,
    proximal,
    quadratic_program,
)

F64 = torch.float64
G = torch.Generator().manual_seed(5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=F64)


A, Y = normal(9, 4), normal(9)
STEP = 0.9 / torch.linalg.matrix_norm(A, ord=2).item() ** 2
SAMPLES, LABELS = normal(6, 8), torch.eye(3, dtype=F64)[torch.tensor([0, 1, 2, 0, 1, 2])]
Q = normal(4, 4)
Q = Q @ Q.mT + torch.eye(4, dtype=F64)
E, D, M, H = normal(1, 4), normal(1), normal(3, 4), 0.1 * torch.ones(3, dtype=F64)
W = normal(5, 5)
W = 0.7 * W / torch.linalg.matrix_norm(W, ord=2)


def ridge(log_weights: Tensor) -> Tensor:
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (A @ x - Y).square().sum() + 0.5 * (t.exp() * x * x).sum()

    return minimize(loss, torch.zeros(4, dtype=F64), log_weights, solver="newton", tol=1e-13)


def ridge_closed(log_weights: Tensor) -> Tensor:
    return torch.linalg.inv(A.mT @ A + torch.diag(log_weights.exp())) @ (A.mT @ Y)


def lasso(y: Tensor) -> Tensor:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (A @ x - y).square().sum()

    condition = conditions.proximal_gradient(loss, lambda z: proximal.lasso(z, 1.5 * STEP), STEP)
    return fixed_point(condition, torch.zeros(4, dtype=F64), y, tol=1e-13)


def lasso_closed(y: Tensor) -> Tensor:
    """On the support at Y, with the signs there."""
    at = lasso(Y)
    alive = at != 0
    part = A[:, alive]
    x = torch.linalg.inv(part.mT @ part) @ (part.mT @ y - 1.5 * at[alive].sign())
    return torch.zeros_like(at).index_put((alive.nonzero().squeeze(-1),), x)


def svm(log_ridge: Tensor) -> Tensor:
    """The weights of a multiclass machine from its dual, one simplex a sample."""

    def weights(dual: Tensor, t: Tensor) -> Tensor:
        return SAMPLES.mT @ (LABELS - dual) / t.exp()

    def loss(dual: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (t.exp() * weights(dual, t).square()).sum() + (dual * LABELS).sum()

    condition = conditions.projected_gradient(loss, projections.simplex, 0.15)
    start = torch.full((6, 3), 1 / 3, dtype=F64)
    dual = fixed_point(condition, start, log_ridge, solver="anderson-newton", tol=1e-13)
    return weights(dual, log_ridge).flatten()


def program(c: Tensor) -> Tensor:
    return quadratic_program(Q, c, E, D, M, H, tol=1e-10).x


def program_closed(c: Tensor) -> Tensor:
    """The dense system of the constraints that are active at C."""
    active = quadratic_program(Q, C, E, D, M, H).inequality > 1e-6
    rows, right = torch.cat([E, M[active]]), torch.cat([D, H[active]])
    below = torch.cat([rows, torch.zeros(len(rows), len(rows), dtype=F64)], 1)
    matrix = torch.cat([torch.cat([Q, rows.mT], 1), below])
    return (torch.linalg.inv(matrix) @ torch.cat([-c, right]))[:4]


def transport(cost: Tensor) -> Tensor:
    rows = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    columns = torch.tensor([0.6, 0.4], dtype=F64)
    return projections.transport(cost.view(3, 2), rows, columns, 0.4, tol=1e-13).flatten()


def network(x: Tensor) -> Tensor:
    def layer(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(W @ z + x)

    return fixed_point(layer, torch.zeros(5, dtype=F64), x, tol=1e-13)


C = 2 * normal(4)
PROBLEMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "ridge": (ridge, normal(4)),
    "lasso": (lasso, Y),
    "svm": (svm, torch.tensor([1.5], dtype=F64)),
    "program": (program, C),
    "simplex": (projections.simplex, normal(5)),
    "transport": (transport, normal(6)),
    "network": (network, normal(5)),
}
CLOSED = {"ridge": ridge_closed, "lasso": lasso_closed, "program": program_closed}


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of the solution that is not linear in it."""

    def loss(at: Tensor) -> Tensor:
        x = f(at)
        return (x * torch.linspace(-1, 2, len(x), dtype=F64)).sum() + 0.5 * x.square().sum()

    return loss


def differences(f: Callable[[Tensor], Tensor], at: Tensor, v: Tensor) -> Tensor:
    """Central, of fourth order."""
    h = 1e-3
    near, far = (f(at + s * v) - f(at - s * v) for s in (h, 2 * h))
    return (8 * near - far) / (12 * h)


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_to_second_order_alone_and_in_batches(name: str) -> None:
    f, at = PROBLEMS[name]
    # Not linear in the index: such a change of the cost leaves a transport as it is.
    loss, v = scalar(f), torch.arange(len(at), dtype=F64).square().cos()
    gradient, curve = jvp(grad(loss), (at,), (v,))
    scale = 1 + gradient.abs().max()
    assert ((gradient * v).sum() - differences(loss, at, v)).abs() < 1e-6 * scale
    slope = differences(grad(loss), at, v)
    assert (curve - slope).abs().max() < 1e-6 * (scale + slope.abs().max())
    assert gradient.abs().max() > 1e-3 and curve.abs().max() > 1e-3
    assert torch.allclose(jvp(loss, (at,), (v,))[1], (gradient * v).sum(), atol=1e-9)
    batch = torch.stack([at, at + 0.01 * v])
    assert torch.allclose(vmap(grad(loss))(batch)[0], gradient, atol=1e-9)
    twice = vmap(lambda at: jvp(grad(loss), (at,), (v,))[1])(batch)
    assert torch.allclose(twice[0], curve, atol=1e-8)
    assert torch.allclose(vmap(hessian(loss))(batch)[0] @ v, curve, atol=1e-8)
    tangents = vmap(lambda at: jvp(f, (at,), (v,))[1])(batch)
    assert torch.allclose(vmap(jacrev(f))(batch) @ v, tangents, atol=1e-8)
    cotangent = vjp(f, at)[1](tangents[0])[0]
    assert torch.allclose((cotangent * v).sum(), tangents[0].square().sum(), atol=1e-8)
    # Plain autograd, twice.
    point = at.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(point), point, create_graph=True)
    (second,) = torch.autograd.grad(plain, point, v)
    assert torch.allclose(plain, gradient, atol=1e-9) and torch.allclose(second, curve, atol=1e-8)


@pytest.mark.parametrize("name", CLOSED)
def test_jacobians_are_those_of_the_closed_form(name: str) -> None:
    f, at = PROBLEMS[name]
    closed = jacrev(CLOSED[name])(at)
    assert torch.allclose(f(at), CLOSED[name](at), atol=1e-9)
    for transform in (jacrev, jacfwd):
        assert torch.allclose(transform(f)(at), closed, atol=1e-8)


def test_the_machine_and_the_program_have_constraints_that_bind_and_some_that_do_not() -> None:
    multipliers = quadratic_program(Q, C, E, D, M, H).inequality
    assert (multipliers > 1e-3).any() and (multipliers < 1e-6).any()
    alive = lasso(Y) != 0
    assert alive.any() and not alive.all()
