from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ebbflow.differentiation import odeint_event

MODES = ["direct", "checkpoint", "reversible", "adjoint"]
TIMES = [0.0, 0.1, 0.5, 1.0, 2.0]


def falling(mode: Any, method: Any, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """A ball from height 2 under gravity 9.81: y = (height, speed)."""
    gravity = torch.tensor(9.81, dtype=torch.float64, requires_grad=True)
    height = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.stack([height, torch.zeros((), dtype=torch.float64)])

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -gravity])

    found = odeint_event(f, y0, TIMES, lambda t, y: y[0], method=method, gradient=mode, **more)
    return found, gravity, height


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "more"), [("tsit5", {}), ("rk4", {"steps": 4})])
def test_time_and_state_have_their_closed_form_and_its_gradients(
    mode: str, method: str, more: dict[str, int]
):
    """The ground is reached at T = √(2h/g) with speed -√(2gh)."""
    found, gravity, height = falling(mode, method, **more)
    end = math.sqrt(2 * 2 / 9.81)
    assert found.happened
    assert float(found.t.detach()) == pytest.approx(end, abs=1e-9)
    to_time = torch.autograd.grad(found.t, [gravity, height], retain_graph=True)
    expected = (-end / 2 / 9.81, end / 2 / 2)
    assert [float(g) for g in to_time] == pytest.approx(expected, rel=1e-6)
    assert float(found.y[0]) == pytest.approx(0.0, abs=1e-9)
    speed = math.sqrt(2 * 9.81 * 2)
    assert float(found.y[1]) == pytest.approx(-speed, rel=1e-9)
    to_speed = torch.autograd.grad(found.ys[-1, 1], [gravity, height])
    assert [float(g) for g in to_speed] == pytest.approx((-2 / speed, -9.81 / speed), rel=1e-6)
    # The state stays where the event was; before it the solution is as ever.
    assert found.ys.shape == (5, 2)
    assert torch.equal(found.ys[3], found.ys[4]) and torch.equal(found.ys[4], found.y)
    assert float(found.ys[2, 0]) == pytest.approx(2 - 9.81 * 0.125, rel=1e-9)


def test_the_events_own_parameters_and_the_times_have_gradients():
    """y = e^t reaches c at log c + t0, backwards e^-t as well."""
    for sign in (1.0, -1.0):
        level = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, sign * 2], dtype=torch.float64, requires_grad=True)
        y0 = torch.ones(1, dtype=torch.float64)
        found = odeint_event(lambda t, y, k=sign: k * y, y0, t, lambda t, y, c=level: y - c)
        assert float(found.t) == pytest.approx(sign * math.log(1.7), abs=1e-6)
        to_level, to_t = torch.autograd.grad(found.t, [level, t])
        assert float(to_level) == pytest.approx(sign / 1.7, rel=1e-5)
        assert to_t.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)


def test_without_an_event_the_solution_is_all_there_is():
    y0 = {"a": torch.ones(2, dtype=torch.float64)}
    found = odeint_event(lambda t, y: {"a": -y["a"]}, y0, [0.0, 1.0], lambda t, y: y["a"].sum() + 1)
    assert not found.happened and float(found.t) == 1.0
    assert torch.equal(found.y["a"], found.ys["a"][-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "more"), [("dopri5", {}), ("rk4", {"steps": 4})])
def test_each_sample_has_its_own_event(mode: Any, method: str, more: dict[str, int]):
    """Balls from four heights; one hits the ground before the first output, one never does."""
    gravity = torch.tensor(9.81, dtype=torch.float64, requires_grad=True)
    height = torch.tensor([2.0, 30.0, 0.01, 2.5], dtype=torch.float64, requires_grad=True)
    y0 = torch.stack([height, torch.zeros_like(height)], -1)

    def f(t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (4, 1)
        return torch.stack([y[:, 1], -gravity.expand(4)], -1)

    found = odeint_event(
        f,
        y0,
        TIMES,
        lambda t, y: y[:, 0],
        method=method,
        gradient=mode,
        batch_dims=1,
        **cast(Any, more),
    )
    assert isinstance(found.happened, Tensor)
    assert found.happened.tolist() == [True, False, True, True]
    ends = (2 * height.detach() / 9.81).sqrt()
    ends[1] = TIMES[-1]
    torch.testing.assert_close(found.t.detach(), ends, rtol=0, atol=1e-9)
    to_gravity, to_height = torch.autograd.grad(found.t.sum(), [gravity, height], retain_graph=True)
    moving = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(to_height, moving * ends / 2 / height.detach(), rtol=1e-6, atol=1e-9)
    assert float(to_gravity) == pytest.approx(float(-(moving * ends).sum()) / 2 / 9.81, rel=1e-6)
    assert found.ys.shape == (5, 4, 2)
    for k, t in enumerate(TIMES):
        s = ends.clamp(max=t)
        truth = torch.stack([height.detach() - 9.81 * s * s / 2, -9.81 * s], -1)
        torch.testing.assert_close(found.ys[k].detach(), truth, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.y, found.ys[-1])
    (to_height,) = torch.autograd.grad(found.ys[-1, :, 1].sum(), height)
    truth = -moving * 9.81 / (2 * 9.81 * height.detach()).sqrt()
    torch.testing.assert_close(to_height, truth, rtol=1e-6, atol=1e-9)


def test_what_is_no_event_is_refused():
    y0 = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="one real number"):
        odeint_event(lambda t, y: -y, y0, [0.0, 1.0], lambda t, y: y)
    with pytest.raises(ValueError, match="tangent"):
        # Its sign changes, and its slope there is none.
        odeint_event(
            lambda t, y: -y, y0, [0.0, 1.0], lambda t, y: torch.sign(t - 0.5), method="rk4", steps=4
        )
