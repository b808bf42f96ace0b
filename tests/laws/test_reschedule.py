"""Law 5: one network seen through two schedules is one model.

Only sigma/alpha matters: a network trained on one schedule, fed the same input in another's scale,
gives the same posterior mean, and on matched grids the same samples, up to that scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule, along
from tests.laws import cases
from tests.laws.cases import SEES_TIME, SOLVERS
from tests.laws.test_betas import DDPM, zero_terminal

SCHEDULES: dict[str, Schedule] = {
    **cases.SCHEDULES,
    "Betas": ef.schedules.Betas(DDPM.tolist()),
    "Betas to no signal": ef.schedules.Betas(zero_terminal(DDPM).tolist()),
}
CLOCKS = ("angle", "log_snr")
PAIRS = list(itertools.permutations(("VP", "Linear", "VE", "Betas"), 2))
Net = Callable[[Tensor, Tensor], Tensor]


def scale(schedule: Schedule, t: float | Tensor) -> Tensor:
    """Length of (alpha, sigma): a state divided by it is the same for every schedule."""
    return torch.hypot(schedule.alpha(t), schedule.sigma(t))


def trained(x: Tensor, t: Tensor) -> Tensor:
    """What some network on some schedule came to compute, as seen by its own time and scale."""
    t = along(t, x)
    return torch.sin(2 * x + t) + 0.3 * x.roll(1, -1) * torch.cos(3 * t)


def adapted(net: Net, own: Schedule, other: Schedule, clock: str) -> Net:
    """`net` of schedule `own` for states of `other`, told of time by a clock they share."""

    def seen(x: Tensor, told: Tensor) -> Tensor:
        log_snr = -2 * torch.log(torch.tan(told)) if clock == "angle" else told
        t_own, t_other = own.time(log_snr), other.time(log_snr)
        return net(along(scale(own, t_own) / scale(other, t_other), x) * x, t_own)

    return seen


def matched(own: Schedule, other: Schedule, times: list[float]) -> list[float]:
    """Times at which `other` has the log-SNR that `own` has at `times`."""
    return other.time(own.log_snr(torch.tensor(times, dtype=torch.float64))).tolist()


def pair(own: str, other: str, prediction: str, clock: str) -> tuple[ef.Denoiser, ef.Denoiser]:
    a, b = SCHEDULES[own], SCHEDULES[other]
    first = ef.Denoiser(trained, a, prediction)
    return first, ef.Denoiser(adapted(trained, a, b, clock), b, prediction, time=clock)


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
INSIDE = [0.8, 0.55, 0.42, 0.3]


def check_posterior_mean(first: ef.Denoiser, second: ef.Denoiser) -> None:
    a, b = first.schedule, second.schedule
    t = torch.tensor(INSIDE, dtype=torch.float64)
    s = b.time(a.log_snr(t))
    x = X * along(scale(a, t), X)
    y = X * along(scale(b, s), X)
    torch.testing.assert_close(second(y, s), first(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second.noise(y, s), first.noise(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("prediction", ["x0", "noise"])
@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_the_posterior_mean_is_the_same(own: str, other: str, prediction: str, clock: str) -> None:
    check_posterior_mean(*pair(own, other, prediction, clock))


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("prediction", ["x0", "noise"])
def test_a_wrong_clock_or_scale_is_seen(prediction: str, clock: str) -> None:
    first, second = pair("VP", "Linear", prediction, clock)
    right = second.net
    for wrong in (
        lambda x, told: right(x * 1.001, told),
        lambda x, told: right(x, told + 1e-3),
        lambda x, told: -right(x, told),
        lambda x, told: trained(x, told),
    ):
        with pytest.raises(AssertionError):
            mutant = ef.Denoiser(wrong, second.schedule, prediction, time=clock)
            check_posterior_mean(first, mutant)


def check_samples(first: ef.Denoiser, second: ef.Denoiser, name: str, times: list[float]) -> None:
    a, b = first.schedule, second.schedule
    nodes = matched(a, b, times)
    solver = SOLVERS[name]
    one = solver.plan(a, times=times, statistics=cases.some_statistics(3))
    two = solver.plan(b, times=nodes, statistics=cases.some_statistics(3))
    x, y = X * scale(a, times[0]), X * scale(b, nodes[0])
    pairs = zip(one.execute(first, x, seed=3), two.execute(second, y, seed=3), strict=True)
    for step, other in pairs:
        node, same = one.stages[step.stage].node, two.stages[other.stage].node
        if node is None or same is None:
            assert node is same
            continue
        state, seen = step.state, other.state
        assert state is not None and seen is not None
        expected = state / scale(a, node)
        torch.testing.assert_close(seen / scale(b, same), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in SEES_TIME])
def test_samples_on_matched_grids_are_the_same(name: str, own: str, other: str) -> None:
    check_samples(*pair(own, other, "noise", "log_snr"), name, INSIDE)


@pytest.mark.parametrize("name", sorted(SEES_TIME))
def test_methods_in_time_are_not(name: str) -> None:
    """They depend on how fast a schedule runs: the law tells them apart."""
    with pytest.raises(AssertionError):
        check_samples(*pair("VP", "Linear", "noise", "log_snr"), name, INSIDE)


@pytest.mark.parametrize(
    ("own", "other"), [("Cosine", "Linear"), ("Betas to no signal", "Cosine")], ids="-".join
)
@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in SEES_TIME])
def test_from_no_signal_to_no_noise(name: str, own: str, other: str) -> None:
    """Where both ends are infinite, with a clock that is finite there."""
    check_samples(*pair(own, other, "x0", "angle"), name, [1.0, 0.7, 0.4, 0.2, 0.0])


def test_shifted_grids_are_scaled_noise() -> None:
    """On the straight path a shift by s multiplies sigma/alpha by s."""
    linear = SCHEDULES["Linear"]
    plain, shifted = (
        torch.tensor(grid[1:-1], dtype=torch.float64)
        for grid in (ef.grids.uniform(linear, 8), ef.grids.shifted(linear, 8, 3.0))
    )
    ratio = linear.sigma(shifted) / linear.alpha(shifted)
    torch.testing.assert_close(ratio, 3 * linear.sigma(plain) / linear.alpha(plain))
