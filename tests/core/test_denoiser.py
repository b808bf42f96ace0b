"""The denoiser: what it refuses, and what it says at the ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebbflow as ef
from ebbflow.denoiser import PREDICTIONS, Wrapper
from ebbflow.schedules import Schedule

VP, COSINE, VE = ef.schedules.VP(), ef.schedules.Cosine(), ef.schedules.VE()


def same(x: Tensor, t: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"net": None}, TypeError, r"callable as net\(x, t\), got NoneType"),
        ({"schedule": "VP"}, TypeError, "must be one of ef.schedules, such as VP"),
        ({"schedule": ef.schedules.VP}, TypeError, "must be one of ef.schedules"),
        ({"prediction": "nosie"}, ValueError, "unknown prediction 'nosie'; did you mean 'noise'"),
        ({"prediction": "epsilon"}, ValueError, "known: x0, noise, v, score, velocity, edm"),
        ({"prediction": None}, ValueError, "unknown prediction None"),
        ({"time": "angel"}, ValueError, "unknown time 'angel'; did you mean 'angle'"),
        ({"time": "step"}, ValueError, "needs a Betas schedule, got VP"),
        ({"prediction": "edm"}, ValueError, r"such as 0\.5"),
        ({"sigma_data": 0.5}, ValueError, "the others take none"),
        ({"prediction": "edm", "sigma_data": 0.0}, ValueError, "must be positive, got 0"),
        ({"prediction": "edm", "sigma_data": -1.0}, ValueError, "must be positive"),
    ],
)
def test_bad_settings_are_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ef.Denoiser(**{"net": same, "schedule": VP, **arguments})


@pytest.mark.parametrize("t", [-0.1, 1.1, 999, math.nan])
def test_times_outside_are_refused(t: float) -> None:
    x = torch.zeros(2, 3)
    for ask in (ef.Denoiser(same, VP), lambda x, t: VP.add_noise(x, t, x)):
        for time in (t, torch.tensor([0.5, t])):
            with pytest.raises(
                ValueError, match=r"lies outside \[0, 1\]; 0 is data and 1 is noise"
            ):
                ask(x, time)


def test_the_shape_of_a_sample_is_checked() -> None:
    denoiser = ef.Denoiser(same, VP, shape=(3, 2))
    for shape in ((4, 3), (4, 2, 3), (3, 2), (4, 3, 2, 1)):
        with pytest.raises(ValueError, match=r"this denoiser takes \(batch, \*\(3, 2\)\)"):
            denoiser(torch.zeros(shape), 0.5)
    assert denoiser(torch.zeros(4, 3, 2), 0.5).shape == (4, 3, 2)


# At which ends a prediction tells x_0: noise and score lose it at zero signal, the others do not.
WORKS_WITHOUT_SIGNAL = {"x0", "v", "velocity", "edm"}


def made(kind: str, schedule: Schedule) -> ef.Denoiser:
    return ef.Denoiser(same, schedule, kind, sigma_data=0.5 if kind == "edm" else None)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_zero_signal_refuses_what_cannot_work_and_names_what_can(kind: str) -> None:
    """A noise prediction at alpha = 0 is 0/0: refused before any call, not clamped."""
    x = torch.randn(2, 3, dtype=torch.float64)
    one = torch.tensor([0.5, 1.0], dtype=torch.float64)
    for schedule in (COSINE, ef.schedules.Linear(), ef.schedules.Betas([0.5, 1.0])):
        denoiser = made(kind, schedule)
        if kind in WORKS_WITHOUT_SIGNAL:
            assert bool(torch.isfinite(denoiser(x, 1.0)).all())
            assert bool(torch.isfinite(denoiser(x, one)).all())
            assert bool(torch.isfinite(ef.sample(denoiser, (2, 3), steps=3)).all())
            continue
        message = rf"'x0' cannot be had from a '{kind}' .* t = 1, .*work there: x0, v, velocity"
        for ask in (
            lambda d=denoiser: d(x, 1.0),
            lambda d=denoiser: d(x, one),
            lambda d=denoiser: ef.sample(d, (2, 3), solver="ddim", steps=3),
        ):
            with pytest.raises(ValueError, match=message):
                ask()
    assert bool(torch.isfinite(made(kind, VP)(x, 1.0)).all())


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_without_noise_the_state_is_the_answer(kind: str) -> None:
    """x_0 = x_t at sigma = 0, whatever the network says, unless it predicts x_0 itself."""
    x = torch.randn(2, 3, dtype=torch.float64)
    for schedule in (VP, COSINE, ef.schedules.Linear(), ef.schedules.Betas([0.1, 0.2])):
        denoiser = made(kind, schedule)
        denoiser.net = lambda x, t: torch.full_like(x, 7.0)
        found = denoiser(x, 0.0)
        expected = torch.full_like(x, 7.0) if kind == "x0" else x
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", ["noise", "score"])
def test_noise_cannot_be_told_from_x0_without_noise(target: str) -> None:
    denoiser = ef.Denoiser(same, VP, "x0")
    with pytest.raises(ValueError, match=rf"'{target}' cannot be had from a 'x0' .* at t = 0"):
        getattr(denoiser, target)(torch.zeros(2, 3), 0.0)


def test_limits_are_approached() -> None:
    """What is said at the ends is where the values nearby go."""
    x = torch.randn(2, 3, dtype=torch.float64)
    for kind in WORKS_WITHOUT_SIGNAL:
        for schedule in (COSINE, ef.schedules.Linear()):
            denoiser = made(kind, schedule)
            near = denoiser(x, torch.tensor(1 - 1e-9, dtype=torch.float64))
            torch.testing.assert_close(near, denoiser(x, 1.0), rtol=1e-6, atol=1e-6)
    for kind in set(PREDICTIONS) - {"score"}:
        near = made(kind, COSINE)(x, torch.tensor(1e-9, dtype=torch.float64))
        torch.testing.assert_close(near, made(kind, COSINE)(x, 0.0), rtol=1e-6, atol=1e-6)


def test_ve_is_finite_at_both_ends() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    for kind in PREDICTIONS:
        for t in (0.0, 1.0):
            for target in ("noise", "score", "velocity", "v"):
                assert bool(torch.isfinite(getattr(made(kind, VE), target)(x, t)).all())


def test_a_network_is_a_part_of_its_denoiser() -> None:
    net = nn.Linear(3, 3)
    denoiser = ef.Denoiser(net, VP)
    assert denoiser.net is net and list(denoiser.parameters()) == list(net.parameters())
    assert denoiser.passes(0.5) == 1
    assert not denoiser.eval().net.training


def test_a_wrapper_must_say_what_it_does() -> None:
    inner = ef.Denoiser(same, VP, shape=(3,))
    inner.statistics = ef.Statistics.exact(torch.zeros(3), torch.eye(3))
    wrapper = Wrapper(inner)
    assert (wrapper.schedule, wrapper.shape, wrapper.statistics) == (VP, (3,), None)
    with pytest.raises(NotImplementedError, match=r"Wrapper must define at\(t, x, target\)"):
        wrapper(torch.zeros(2, 3), 0.5)


def test_numbers_and_tensors_of_time_give_the_same() -> None:
    """A Python number goes through the table of a plan, a tensor does not."""
    x = torch.randn(2, 3, dtype=torch.float64)
    for kind in PREDICTIONS:
        denoiser = made(kind, VP)
        for t in (0.0, 0.25, 0.9, 1.0):
            by_tensor = denoiser(x, torch.tensor(t, dtype=torch.float64))
            torch.testing.assert_close(denoiser(x, t), by_tensor, rtol=1e-12, atol=1e-12)
