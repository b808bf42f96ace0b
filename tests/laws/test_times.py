"""Law 8: a time of shape () and times of shape (B,) mean the same thing, also when B is the feature
size; distinct times a sample are a loop over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow import denoiser as module
from ebbflow.denoiser import CLOCKS, PREDICTIONS
from ebbflow.schedules import Betas, Schedule
from tests.laws import cases
from tests.laws.test_conversions import TARGETS, call

SCHEDULES: dict[str, Schedule] = {**cases.SCHEDULES, "Betas": Betas([0.02] * 50)}
# As many samples as features; as many samples as channels, rows and columns; one of each.
SHAPES = [(5, 5), (3, 3, 3, 3), (4, 2), (1, 1), (2, 3, 4, 5)]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def network(x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
    """Feels its time, mixes its features and can be told of a class, each sample by itself."""
    assert t.shape == (len(x),)
    wide = t.reshape(-1, *(1,) * (x.ndim - 1)) / 10
    if shift is not None:
        wide = wide + shift.reshape(wide.shape)
    return torch.sin(x + wide) + wide * x.flip(-1)


Ask = Callable[[Tensor, Tensor], Tensor]


def check_times(ask: Ask, shape: tuple[int, ...]) -> None:
    """Raise AssertionError unless one time, equal times and a loop agree."""
    x = torch.randn(shape, dtype=torch.float64)
    one = torch.tensor(0.37, dtype=torch.float64)
    torch.testing.assert_close(ask(x, one.expand(len(x))), ask(x, one), **TIGHT)
    times = torch.linspace(0.15, 0.85, len(x), dtype=torch.float64)
    loop = [ask(x[i : i + 1], times[i]) for i in range(len(x))]
    torch.testing.assert_close(ask(x, times), torch.cat(loop), **TIGHT)
    alone = [ask(x[i : i + 1], times[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(torch.cat(alone), torch.cat(loop), **TIGHT)


def made(schedule: str, kind: str, clock: str) -> ef.Denoiser:
    sigma_data = 0.5 if kind == "edm" else None
    return ef.Denoiser(network, SCHEDULES[schedule], kind, time=clock, sigma_data=sigma_data)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_prediction_clock_and_target(kind: str, schedule: str) -> None:
    for clock in CLOCKS:
        if clock == "step" and schedule != "Betas":
            continue
        denoiser = made(schedule, kind, clock)
        for target in TARGETS:
            check_times(call(denoiser, target), (4, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_shape(kind: str, shape: tuple[int, ...]) -> None:
    denoiser = made("VP", kind, "angle")
    check_times(denoiser, shape)
    check_times(denoiser.noise, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adding_noise(schedule: str, shape: tuple[int, ...]) -> None:
    check_times(lambda x, t: SCHEDULES[schedule].add_noise(x, t, x.flip(-1)), shape)


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_oracles(schedule: str) -> None:
    """A mixture of as many components as samples and features; and data sets of pictures."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(4, 4, generator=random, dtype=torch.float64)
    mixture = ef.oracles.GaussianMixture(means, torch.rand(4) + 0.1, torch.ones(4))
    check_times(mixture.denoiser(SCHEDULES[schedule]), (4, 4))
    pictures = torch.randn(3, 3, 3, 3, generator=random)
    empirical = ef.oracles.Empirical(pictures, bandwidth=0.3)
    check_times(empirical.denoiser(SCHEDULES[schedule]), (3, 3, 3, 3))


@pytest.mark.parametrize("shape", [(4, 4), (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance(scale: float, shape: tuple[int, ...]) -> None:
    guided = ef.guidance.ClassifierFree(made("VP", "v", "t"), scale, {"shift": 0.0})
    check_times(lambda x, t: guided(x, t, shift=torch.full((len(x),), 0.7)), shape)


@pytest.mark.parametrize("function", ["alpha", "sigma", "log_snr", "alpha_prime", "sigma_prime"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_keep_the_shape_of_time(schedule: str, function: str) -> None:
    ask = getattr(SCHEDULES[schedule], function)
    for shape in ((), (1,), (3,), (2, 3)):
        t = torch.full(shape, 0.3, dtype=torch.float64)
        value = ask(t)
        assert value.shape == shape and value.dtype == torch.float64
        assert bool((value == ask(0.3)).all())


right = module.along


@contextmanager
def along(wrong: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    module.along = wrong
    try:
        yield
    finally:
        module.along = right


WRONG = {
    "along the features": lambda values, x: values,
    "along the last axis but one": lambda values, x: values.unsqueeze(-1),
    "the first for all": lambda values, x: values.flatten()[0],
    "their mean": lambda values, x: values.mean(),
    "reversed": lambda values, x: right(values.flip(0), x) if values.ndim else values,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["noise", "v", "edm", "velocity", "score"])
def test_mutants_that_broadcast_silently_are_seen(kind: str, wrong: str) -> None:
    with along(WRONG[wrong]), pytest.raises(AssertionError):
        check_times(made("VP", kind, "t"), (4, 4))
        check_times(made("VP", kind, "t"), (3, 3, 3, 3))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (5, 5)])
def test_other_shapes_of_time_are_refused(shape: tuple[int, ...]) -> None:
    t = torch.full(shape, 0.4)
    x = torch.zeros(5, 3)
    for ask in (made("VP", "noise", "t"), lambda x, t: ef.schedules.VP().add_noise(x, t, x)):
        with pytest.raises(ValueError, match=r"one time, shape \(\), or one a sample"):
            ask(x, t)
