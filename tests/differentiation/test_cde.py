from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebbflow.differentiation import HermitePath, LinearPath, cdeint

TIMES = [0.0, 0.4, 1.0, 1.3, 2.0]


def values() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", [LinearPath, HermitePath])
def test_paths_pass_through_their_values_and_derivatives_are_theirs(kind: type[LinearPath]):
    path = kind(TIMES, values())
    for t, value in zip(TIMES, path.values, strict=True):
        torch.testing.assert_close(path(t), value)
    for t in (0.2, 0.7, 1.1, 1.9):
        t = torch.tensor(t, dtype=torch.float64)
        _, slope = torch.func.jvp(path, (t,), (torch.ones_like(t),))
        torch.testing.assert_close(path.derivative(t), slope)


def test_hermite_paths_have_continuous_slopes_and_know_one_value_ahead():
    path = HermitePath(TIMES, values())
    for t in TIMES[1:-1]:
        torch.testing.assert_close(
            path.derivative(t - 1e-9), path.derivative(t + 1e-9), rtol=1e-6, atol=1e-6
        )
    (seen,) = torch.autograd.grad(path(0.9).sum(), path.values)
    assert torch.equal(seen[3:], torch.zeros_like(seen[3:])) and bool(seen[2].any())


@pytest.mark.parametrize("kind", [LinearPath, HermitePath])
def test_a_linear_equation_has_its_closed_form_whatever_the_path_between(kind: type[LinearPath]):
    """dz = z (c · dX) gives z = z0 exp(c · (X(t) - X(0))), and does not see how fast X runs."""
    c = torch.tensor([0.5, -0.3], dtype=torch.float64)
    x = values().detach()

    def f(t: Tensor, z: Tensor) -> Tensor:
        return z[..., None] * c

    truth = torch.exp((x[-1] - x[0]) @ c)[:, None].expand(3, 4)
    z0 = torch.ones(3, 4, dtype=torch.float64)
    for warp in (lambda t: t, lambda t: t * t + 0.3 * t):
        times = [warp(t) for t in TIMES]
        z = cdeint(f, kind(times, x), z0, [times[0], times[-1]], rtol=1e-5, atol=1e-7)[-1]
        torch.testing.assert_close(z, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible", "adjoint"])
def test_gradients_reach_the_paths_values(gradient: str):
    c = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    x = values()
    z0 = torch.ones(3, 1, dtype=torch.float64)

    def f(t: Tensor, z: Tensor) -> Tensor:
        return z[..., None] * c

    z = cdeint(f, HermitePath(TIMES, x), z0, [0.0, 2.0], gradient=gradient, rtol=1e-5)[-1]
    to_x, to_c = torch.autograd.grad(z.sum(), [x, c])
    truth = torch.exp((x[-1] - x[0]) @ c)
    expected = torch.autograd.grad(truth.sum(), [x, c])
    torch.testing.assert_close(to_x, expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(to_c, expected[1], rtol=1e-3, atol=1e-4)


def test_shapes_and_times_are_checked():
    with pytest.raises(ValueError, match="at least two times"):
        LinearPath([0.0], torch.ones(1, 2))
    with pytest.raises(ValueError, match="increase strictly"):
        LinearPath([0.0, 0.0], torch.ones(2, 2))
    with pytest.raises(ValueError, match="channels"):
        cdeint(lambda t, z: z, LinearPath([0.0, 1.0], torch.ones(2, 2)), torch.ones(3), [0.0, 1.0])
    assert math.isclose(float(LinearPath([0.0, 1.0], torch.tensor([[0.0], [2.0]]))(0.5)), 1.0)
