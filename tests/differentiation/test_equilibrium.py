from __future__ import annotations

import logging
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ebbflow.differentiation import HomotopyODE, equilibrium, odeint

torch.manual_seed(0)
W = torch.randn(4, 4, dtype=torch.float64) * 0.3
X = torch.randn(3, 4, dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)
COTANGENT = torch.randn(3, 4, dtype=torch.float64)


def test_a_linear_equilibrium_has_its_closed_form_and_its_gradients():
    """z = W z + x gives z = (I - W)⁻¹ x."""
    w, x = W.clone().requires_grad_(), X.clone().requires_grad_()
    found = equilibrium(
        lambda z: z @ w.T + x, torch.zeros(3, 4, dtype=torch.float64), tolerance=1e-11
    )
    truth = x @ torch.linalg.inv(EYE - w).T
    torch.testing.assert_close(found.z, truth, rtol=1e-9, atol=1e-9)
    # Anderson's acceleration is GMRES on a linear equation: as many steps as unknowns, and ends.
    assert found.evaluations <= 7 and float(found.residual.max()) <= 1e-11
    for a, b in zip(
        torch.autograd.grad((found.z * COTANGENT).sum(), [x, w]),
        torch.autograd.grad((truth * COTANGENT).sum(), [x, w]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_nonlinear_equilibrium_has_the_gradient_of_unrolling():
    w, x = W.clone().requires_grad_(), X.clone().requires_grad_()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w.T + x)

    z = torch.zeros(3, 4, dtype=torch.float64)
    found = equilibrium(f, z, tolerance=1e-10)
    for _ in range(80):
        z = f(z)
    for a, b in zip(
        torch.autograd.grad((found.z * COTANGENT).sum(), [x, w]),
        torch.autograd.grad((z * COTANGENT).sum(), [x, w]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_a_solve_that_stops_short_is_reported(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        found = equilibrium(lambda z: 2 * z + 1 + z**2, torch.ones(1, 1), max_evaluations=4)
    assert "4 evaluations left" in caplog.text and float(found.residual) > 1e-5
    with pytest.raises(ValueError, match="memory at least 1"):
        equilibrium(lambda z: z, torch.ones(1, 1), memory=0)


class Pull(nn.Module):
    """c (W z + x - z), whose solution at time 1 is within e^(-c) of the equilibrium."""

    def __init__(self, c: float = 25.0) -> None:
        super().__init__()
        self.w, self.c = nn.Parameter(W.clone()), c

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.c * (z @ self.w.T + x - z)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible", "adjoint"])
def test_a_homotopy_layer_reaches_the_equilibrium_with_gradients_to_field_and_input(gradient: str):
    # Backwards, the adjoint magnifies errors by up to e^(1.9 c).
    field, mode = Pull(18.0 if gradient == "adjoint" else 25.0), cast(Any, gradient)
    layer = HomotopyODE(field, (4,), 1e-8, 1e-8, mode, momentum=0.5).double()
    x = X.clone().requires_grad_()
    z = layer(x)
    truth = x @ torch.linalg.inv(EYE - layer.field.w).T  # type: ignore[operator]
    torch.testing.assert_close(z, truth, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad((z * COTANGENT).sum(), [x, layer.field.w]),  # type: ignore[list-item]
        torch.autograd.grad((truth * COTANGENT).sum(), [x, layer.field.w]),  # type: ignore[list-item]
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.start, z.detach().mean(0) / 2)


def test_a_better_start_takes_fewer_evaluations():
    """All answers near one point: once the start has learnt it, there is little way left."""
    layer = HomotopyODE(Pull(), (4,)).double()
    x = 3 + 0.01 * X
    layer(x)
    before = layer.evaluations
    for _ in range(40):
        layer(x)
    layer.eval()
    start = layer.start.clone()
    layer(x)
    assert layer.evaluations < before
    assert torch.equal(layer.start, start)
    z = odeint(lambda t, z: layer.field(z, x), start.expand(3, 4).clone(), [0.0, 1.0])[-1]
    torch.testing.assert_close(z, layer(x), rtol=1e-2, atol=1e-2)
