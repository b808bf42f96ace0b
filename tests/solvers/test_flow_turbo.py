"""FlowTurbo's pseudo-corrector as a plan, against its algorithm written anew and against Heun."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule, along
from tests.laws import cases
from tests.laws.cases import SCHEDULES

Velocity = Callable[[np.ndarray, float], np.ndarray]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def by_hand(velocity: Velocity, x: np.ndarray, grid: list[float], steps: str) -> np.ndarray:
    """The paper's algorithm in its own time, 0 noise and 1 data; `steps` is a word over H and P."""
    cache = None
    for letter, (t, s) in zip(steps, pairwise(grid), strict=True):
        dt = s - t
        if letter == "H" or cache is None:
            cache = velocity(x, t)
        guess = x + dt * cache
        after = velocity(guess, s)
        x, cache = x + dt / 2 * (cache + after), after
    return x


def check_by_hand(schedule: Schedule, words: dict[int, str], make: Callable[..., ef.Plan]) -> None:
    """On the straight path `y = x/(alpha + sigma)`, whatever the schedule."""
    denoiser = cases.oracle("mixture").denoiser(schedule)
    nodes = torch.tensor(cases.uneven(5), dtype=torch.float64)
    size = schedule.alpha(nodes) + schedule.sigma(nodes)
    tau = schedule.sigma(nodes) / size

    def velocity(y: np.ndarray, paper_time: float) -> np.ndarray:
        k = int((tau - (1 - paper_time)).abs().argmin())
        x, t = torch.from_numpy(y) * size[k], nodes[k]
        noise, clean = denoiser.noise(x, t), denoiser(x, t)
        return (clean - noise).numpy()  # towards the data

    x = torch.randn(5, 2, dtype=torch.float64)
    for heun, word in words.items():
        expected = by_hand(velocity, x.numpy(), (1 - tau).tolist(), word)
        found = make(schedule, nodes.tolist(), heun).run(denoiser, x * size[0]) / size[-1]
        torch.testing.assert_close(found, torch.from_numpy(expected), **TIGHT)


def right(schedule: Schedule, nodes: list[float], heun: int) -> ef.Plan:
    return ef.solvers.get("flow-turbo", heun=heun).plan(schedule, times=nodes)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_the_paper_s_algorithm_on_the_straight_path(schedule: str) -> None:
    words = {1: "HPPPP", 2: "HHPPP", 5: "HHHHH"}
    check_by_hand(SCHEDULES[schedule], words, right)


def test_another_word_is_seen() -> None:
    for wrong in ({1: "HHPPP"}, {2: "HPPPP"}, {5: "HHHHP"}):
        with pytest.raises(AssertionError):
            check_by_hand(SCHEDULES["VP"], wrong, right)


def test_all_heun_is_heun_on_the_linear_flow() -> None:
    """`heun` of this library works in t, which is tau there."""
    linear, nodes = SCHEDULES["Linear"], [1.0, 0.8, 0.55, 0.2, 0.0]
    ours, heun = right(linear, nodes, 4), ef.solvers.get("heun").plan(linear, times=nodes)
    denoiser, x = cases.oracle("mixture").denoiser(linear), torch.randn(6, 2, dtype=torch.float64)
    inside = ef.solvers.get("heun").plan(linear, times=nodes[1:-1])
    torch.testing.assert_close(
        right(linear, nodes[1:-1], 4).run(denoiser, x), inside.run(denoiser, x), **TIGHT
    )
    torch.testing.assert_close(ours.run(denoiser, x), heun.run(denoiser, x), **TIGHT)
    assert ours.nfe == heun.nfe == 7


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_half_the_calls_and_still_of_second_order(schedule: str) -> None:
    """One Heun step, then one call a step: N + 1 calls against 2 N, slope 2."""
    process = SCHEDULES[schedule]
    denoiser, law = cases.denoiser("mixture", schedule), "mixture"
    x, exact = cases.start(law, schedule), cases.exact_end(law, schedule)
    slopes = {}
    for heun in (1, 10**6):
        errors = []
        for n in (64, 128):
            plan = right(process, cases.interior(n), heun)
            assert plan.nfe == (n + 1 if heun == 1 else 2 * n)
            errors.append(np.linalg.norm(plan.run(denoiser, cases.tensor(x)).numpy() - exact))
        slopes[heun] = math.log2(errors[0] / errors[1])
    assert min(slopes.values()) > 1.75


def test_one_call_a_step_costs_two_and_a_bit_in_error() -> None:
    """A mixture in one dimension on the linear flow, from .98 to .05: half the calls at the same
    step is about twice the error, so at equal calls the pseudo-corrector is ahead."""
    linear = SCHEDULES["Linear"]
    mixture = ef.oracles.GaussianMixture(
        torch.tensor([[-1.5], [1.0]]), torch.tensor([0.4, 0.6]) ** 2, torch.tensor([0.3, 0.7])
    )
    denoiser = mixture.denoiser(linear)
    x = torch.tensor([[-1.3], [-0.4], [0.2], [0.9], [1.7]], dtype=torch.float64)

    def end(solver: ef.solvers.Solver, n: int) -> Tensor:
        return solver.plan(linear, times=np.linspace(0.98, 0.05, n + 1)).run(denoiser, x)

    exact = end(ef.solvers.get("deis-rho-rk4"), 400)
    heun, turbo = ef.solvers.get("heun"), ef.solvers.get("flow-turbo")
    for n in (40, 80):
        two_calls, one_call = ((end(s, n) - exact).abs().max() for s in (heun, turbo))
        assert 1.5 < one_call / two_calls < 3
        assert (end(turbo, 2 * n - 1) - exact).abs().max() < 0.8 * two_calls


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_straight_flow_needs_one_step(schedule: str) -> None:
    """x_0 = A eps along straight lines: `D = A (tau + (1 - tau) A)^-1 y`, which Euler solves
    exactly, and so do Heun and the pseudo-corrector in any number of steps."""
    process = SCHEDULES[schedule]
    a = torch.tensor([0.3, 2.0, -0.1], dtype=torch.float64)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = along(process.alpha(t), x), along(process.sigma(t), x)
        return a * x / (sigma + alpha * a)

    t, s = 0.9, 0.3
    eps = torch.randn(4, 3, dtype=torch.float64)
    x = (process.sigma(t) + process.alpha(t) * a) * eps
    exact = (process.sigma(s) + process.alpha(s) * a) * eps
    denoiser = ef.Denoiser(predict, process)
    for nodes in ([t, s], [t, 0.7, 0.55, s]):
        for heun in (1, 3):
            found = right(process, nodes, heun).run(denoiser, x)
            torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


def test_calls_and_ends() -> None:
    turbo = ef.solvers.get("flow-turbo")
    for schedule, process in SCHEDULES.items():
        for n in (1, 2, 5):
            # The last step to sigma = 0 costs one call, to VE's sigma_min as the others.
            first = 1 if schedule != "VE" and n == 1 else 2
            assert turbo.plan(process, n).nfe == first + n - 1
    there = turbo.plan(SCHEDULES["Linear"], times=[0.1, 0.5, 1.0])
    denoiser = cases.oracle("mixture").denoiser(SCHEDULES["Linear"])
    assert bool(torch.isfinite(there.run(denoiser, torch.zeros(2, 2))).all())
    with pytest.raises(ValueError, match="heun is 0"):
        ef.solvers.get("flow-turbo", heun=0)


def test_its_grid_is_uniform_on_the_straight_path() -> None:
    turbo = ef.solvers.get("flow-turbo")
    torch.testing.assert_close(
        torch.tensor(turbo.plan(SCHEDULES["Linear"], 7).times), 1 - torch.arange(8) / 7
    )
    for process in SCHEDULES.values():
        nodes = torch.tensor(turbo.plan(process, 7).times, dtype=torch.float64)
        tau = process.sigma(nodes) / (process.alpha(nodes) + process.sigma(nodes))
        gaps = -tau.diff()
        torch.testing.assert_close(gaps, gaps.mean().expand(7), rtol=1e-9, atol=1e-9)
