from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ebbflow.differentiation import (
    local_heuristics,
    locally_regularized_odeint,
    odeint,
    regularized_odeint,
)

RATES = torch.tensor([3.0, 50.0], dtype=torch.float64)
START = torch.tensor([1.0, 0.2], dtype=torch.float64)
TIGHT = {"rtol": 1e-6, "atol": 1e-8}


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_the_solution_is_odeints_and_its_estimates_are_sums_over_its_steps(method: str):
    def f(t: Tensor, y: Tensor) -> Tensor:
        return -RATES * y

    found = regularized_odeint(f, START, [0.0, 0.5, 1.0], method=method, **TIGHT)
    run = odeint(f, START, [0.0, 0.5, 1.0], method=method, full=True, **TIGHT)
    assert torch.equal(found.ys, run.ys)
    assert found.evaluations == run.evaluations and len(found.times) == run.steps
    # Accepted steps have an estimate between 0 and 1, and their lengths sum to the span.
    assert 0.01 < float(found.error) < 1
    # The largest eigenvalue, in units of the stability region, is never overestimated here.
    size = {"dopri5": 3.3066, "tsit5": 3.5068}[method]
    assert 40 < float(found.stiffness) * size < 50 + 1e-6


def test_estimates_have_the_gradient_of_finite_differences_at_the_same_steps():
    """To the parameters through stages and states; the steps themselves are constants."""
    from ebbflow.differentiation.fields import Field, Structure
    from ebbflow.differentiation.heuristics import _of_step
    from ebbflow.differentiation.march import Control
    from ebbflow.differentiation.methods import tsit5

    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def replayed(rate: Tensor, sizes: list[float]) -> Tensor:
        f = Field(lambda t, y: -rate * y + torch.sin(3 * t), Structure(START, 0))
        t, total = 0.0, torch.zeros((), dtype=torch.float64)
        state = tsit5.start(f, t, START)
        for h in sizes:
            step = tsit5.step(f, t, h, state)
            total = total + _of_step(tsit5, step, Control(**TIGHT))[0] * h
            t, state = t + h, step.state
        return total

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y + torch.sin(3 * t)

    found = regularized_odeint(f, START, [0.0, 1.0], **TIGHT)
    (slope,) = torch.autograd.grad(found.error, rate)
    sizes = [b - a for a, b in pairwise([*found.times, 1.0])]
    h = 1e-5
    with torch.no_grad():
        ahead, behind = replayed(rate + h, sizes), replayed(rate - h, sizes)
    assert float(found.error) == pytest.approx(float(ahead + behind) / 2, rel=1e-6)
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-4)


def test_one_local_step_is_the_solvers_first_and_treats_its_start_as_constant():
    y = START.clone().requires_grad_()
    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y

    error, stiffness = local_heuristics(f, 0.3, y, 1.0, **TIGHT)
    assert float(stiffness) * 3.5068 == pytest.approx(2.0, rel=1e-9)
    gradients = torch.autograd.grad(error + stiffness, [y, rate], allow_unused=True)
    assert gradients[0] is None and gradients[1] is not None
    # E h falls as h⁶ / tolerance, and the solver's own starting step keeps it below its tolerance.
    assert 0 < float(error) < 0.1


def test_the_local_estimate_is_the_first_term_of_the_global_sum():
    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1] + torch.sin(t), -4 * y[0]])

    step = regularized_odeint(f, START, [0.0, 1.0], **TIGHT).times[1]
    first = regularized_odeint(f, START, [0.0, step], **TIGHT)
    error, stiffness = local_heuristics(f, 0.0, START, 1.0, **TIGHT)
    assert len(first.times) == 1
    assert float(error) == pytest.approx(float(first.error), rel=1e-9)
    assert float(stiffness) == pytest.approx(float(first.stiffness), rel=1e-9)


def driven(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([8 * y[1] + 0.1 * torch.sin(7 * t), -8 * y[0]])


@pytest.mark.parametrize("forwards", [True, False])
def test_the_mean_over_uniform_times_is_the_global_sum(forwards: bool):
    """E at a uniform time, times the span, is near `Σ E_j h_j` over many steps."""
    span = [0.0, 3.0] if forwards else [3.0, 0.0]
    whole = regularized_odeint(driven, START, span, **TIGHT)
    found = []
    for k in range(30):
        local = locally_regularized_odeint(driven, START, span, at=(k + 0.5) / 10, **TIGHT)
        assert local.evaluations == whole.evaluations and local.times == whole.times
        found.append(local.error)
    assert len(whole.times) > 20
    assert float(torch.stack(found).mean()) == pytest.approx(float(whole.error), rel=0.3)


def test_one_step_is_that_of_the_solve_at_its_beginning():
    """At a time where a step began, E is that step's own; outputs are those asked for."""
    times = [0.0, 0.4, 1.0]
    whole = regularized_odeint(driven, START, times, **TIGHT)
    k = len(whole.times) // 2
    begun, end = whole.times[k], whole.times[k + 1]
    local = locally_regularized_odeint(driven, START, times, at=begun, **TIGHT)
    assert torch.equal(local.ys, whole.ys)
    size = end - begun
    y = odeint(driven, START, [0.0, begun], method="tsit5", rtol=1e-12, atol=1e-12)[-1]
    error, stiffness = local_heuristics(driven, begun, y, 1.0, step_size=size, **TIGHT)
    assert float(local.error) == pytest.approx(float(error) / size, rel=1e-3)
    assert float(local.stiffness) == pytest.approx(float(stiffness), rel=1e-3)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "reversible"])
def test_the_local_estimate_goes_with_any_gradient(gradient: Any):
    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y + torch.sin(3 * t)

    # Of the loss and the estimate together, with nested states.
    slopes = []
    for way in ("direct", gradient):
        found = locally_regularized_odeint(
            lambda t, y: {"a": f(t, y["a"])},
            {"a": START},
            [0.0, 1.0],
            at=0.3,
            gradient=way,
            **TIGHT,
        )
        slopes += torch.autograd.grad(found.ys["a"][-1].sum() + found.error, rate)
    # A coupled method has steps of its own.
    assert float(slopes[1]) == pytest.approx(
        float(slopes[0]), rel=0.2 if way == "reversible" else 1e-4
    )


def test_a_solve_that_ends_early_says_so_instead_of_an_estimate():
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return y * torch.nan

    with pytest.raises(ArithmeticError, match=r"ended at t = 0 .*stuck"):
        regularized_odeint(broken, START, [0.0, 1.0])
    with pytest.raises(ArithmeticError, match="max_steps"):
        locally_regularized_odeint(driven, START, [0.0, 1.0], at=0.5, max_steps=3, **TIGHT)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="tsit5"):
        regularized_odeint(lambda t, y: -y, START, [0.0, 1.0], method="euler")
    with pytest.raises(ValueError, match="differ"):
        local_heuristics(lambda t, y: -y, 1.0, START, 1.0)
    with pytest.raises(ValueError, match="step_size"):
        local_heuristics(lambda t, y: -y, 0.0, START, 1.0, step_size=-0.1)
    with pytest.raises(ValueError, match="inside"):
        locally_regularized_odeint(lambda t, y: -y, START, [0.0, 1.0], at=1.0)


def fitted(kind: str, weight: float) -> tuple[float, int]:
    """Held-out error and evaluations of a field that learns to turn the plane by one radian."""
    generator = torch.Generator().manual_seed(0)
    cos, sin = math.cos(1.0), math.sin(1.0)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    points = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    sizes = ((2, 16), (16,), (16, 2))
    weights = [2 * torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    weights[2] /= 4
    for w in weights:
        w.requires_grad_()
    optimizer = torch.optim.Adam(weights, 0.05)
    control: Any = {"rtol": 1e-4, "atol": 1e-4}

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ weights[0] + t * weights[1]) @ weights[2]

    for k in range(60):
        start = points[:32]
        if kind == "global":
            found = regularized_odeint(f, start, [0.0, 1.0], **control)
        else:
            at = 0.01 + 0.98 * float(torch.rand((), generator=generator))
            found = locally_regularized_odeint(f, start, [0.0, 1.0], at=at, **control)
        optimizer.zero_grad()
        misfit = (found.ys[-1] - start @ turn.T).square().mean()
        (misfit + weight * 10 ** (1 - k / 60) * found.error).backward()
        optimizer.step()
    with torch.no_grad():
        # Tightly, as few steps count coarsely.
        control = {"rtol": 1e-8, "atol": 1e-8, "method": "tsit5"}
        run = odeint(f, points[32:], [0.0, 1.0], full=True, **control)
        return float((run.ys[-1] - points[32:] @ turn.T).square().mean()), int(run.evaluations)


def test_training_against_either_estimate_saves_evaluations_at_no_loss():
    """A lively field is calmed; the papers' claim in small (benchmarks/regularized.py in full)."""
    error, evaluations = fitted("global", 0.0)
    for kind in ("global", "local"):
        calmed_error, calmed = fitted(kind, 0.25)
        assert calmed <= 0.92 * evaluations
        assert calmed_error < 1.1 * error
