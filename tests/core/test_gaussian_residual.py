"""The Gaussian residual: what it knows exactly, what its default nodes are, what auto chooses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import ebbflow as ef
from ebbflow.plan import Plan, Stage
from ebbflow.schedules import Schedule
from ebbflow.solvers import gaussian

SCHEDULES = [
    ef.schedules.VP(),
    ef.schedules.Linear(),
    ef.schedules.Cosine(),
    ef.schedules.VE(),
    ef.schedules.Betas([1e-3] * 99 + [1.0]),
]
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.3, 0.5], [0.5, 0.4]], dtype=torch.float64)
KNOWN = ef.Statistics.exact(MEAN, COVARIANCE)
RESIDUAL = ef.solvers.get("gaussian-residual")
X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check_exact_for_gaussian(plan: Plan, schedule: Schedule) -> None:
    """Every state at a node is the Gaussian flow's, in one step or in many."""
    denoiser = ef.oracles.GaussianMixture(MEAN[None], COVARIANCE[None], torch.ones(1)).denoiser(
        schedule
    )
    x = X * schedule.sigma(1.0)
    variance, basis = torch.linalg.eigh(COVARIANCE)

    def coordinates(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (x - alpha * MEAN) @ basis / (alpha**2 * variance + sigma**2).sqrt()

    nodes = plan.times[1:]
    for node, step in zip(nodes, plan.execute(denoiser, x), strict=True):
        assert step.state is not None
        torch.testing.assert_close(coordinates(step.state, node), coordinates(x, 1.0))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 40])
def test_gaussian_data_are_exact_in_any_number_of_steps(schedule: Schedule, steps: int) -> None:
    plan = RESIDUAL.plan(schedule, steps, statistics=KNOWN)
    assert plan.nfe == steps and plan.times[0] == 1 and plan.times[-1] == 0
    check_exact_for_gaussian(plan, schedule)


@pytest.mark.parametrize("stage", range(3))
def test_a_wrong_coefficient_is_not_exact(stage: int) -> None:
    plan = RESIDUAL.plan(SCHEDULES[0], 3, statistics=KNOWN)

    def wrong(old: Stage, name: str) -> Stage:
        state = {**old.update[0], name: old.update[0][name] * (1 + 1e-3)}
        return replace(old, update=(state, *old.update[1:]))

    for name in ("X", "D", "1"):
        stages = list(plan.stages)
        stages[stage] = wrong(stages[stage], name)
        with pytest.raises(AssertionError):
            check_exact_for_gaussian(replace(plan, stages=tuple(stages)), SCHEDULES[0])


def test_other_statistics_are_not_exact() -> None:
    other = ef.Statistics.exact(MEAN, 1.1 * COVARIANCE)
    with pytest.raises(AssertionError):
        check_exact_for_gaussian(RESIDUAL.plan(SCHEDULES[0], 3, statistics=other), SCHEDULES[0])


def midpoint_in_the_angle(denoiser: ef.Denoiser, x: torch.Tensor, steps: int) -> torch.Tensor:
    """dy/dtheta = cos(theta) eps - sin(theta) D from pi/2 to 0, on the straight path, where
    y = x_t / sqrt(alpha² + sigma²) and sigma/alpha = tan(theta)."""

    def rate(y: torch.Tensor, theta: float) -> torch.Tensor:
        c, s = math.cos(theta), math.sin(theta)
        t = s / (c + s)
        prediction = denoiser(y / (c + s), t)
        return c * (y - c * prediction) / s - s * prediction

    h = math.pi / 2 / steps
    for k in range(steps):
        theta = math.pi / 2 - k * h
        x = x - h * rate(x - h / 2 * rate(x, theta), theta - h / 2)
    return x


@pytest.mark.parametrize("informed", [True, False])
def test_auto_converges_to_the_flow_on_its_own_nodes(informed: bool) -> None:
    """A mixture on the straight path, with statistics of 1,000 samples and without."""
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.8]])
    mixture = ef.oracles.GaussianMixture(means, torch.tensor([0.2, 0.3]), torch.tensor([0.6, 0.4]))
    schedule = ef.schedules.Linear()
    denoiser = mixture.denoiser(schedule)
    known = ef.Statistics.from_data(mixture.sample(1000, seed=2)) if informed else None
    exact = midpoint_in_the_angle(denoiser, X, 3000)
    errors = []
    for steps in (5, 10, 20, 40, 80):
        plan = ef.solvers.get("auto").plan(schedule, steps, statistics=known)
        errors.append((plan.run(denoiser, X) - exact).norm().item())
    assert all(b < 0.6 * a for a, b in pairwise(errors)), errors


def test_auto_uses_statistics_where_there_are_any() -> None:
    auto, schedule = ef.solvers.get("auto"), ef.schedules.VP()
    low = ef.Statistics.from_data(torch.randn(50, 2000), kind="low-rank")
    for statistics, expected in ((KNOWN, gaussian.residual), (None, gaussian.unit)):
        found = auto.plan(schedule, 5, statistics=statistics)
        assert found == expected.plan(schedule, 5, statistics=statistics)
    assert auto.plan(schedule, 5, statistics=low) == gaussian.unit.plan(schedule, 5)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_nodes_follow_the_scale_of_the_data(scale: float) -> None:
    """s/(deviation of the data) at the nodes does not change where the schedule has room."""
    schedule = ef.schedules.Linear()

    def ratios(statistics: ef.Statistics) -> torch.Tensor:
        nodes = torch.tensor(RESIDUAL.plan(schedule, 6, statistics=statistics).times[1:-1])
        return torch.exp(-schedule.log_snr(nodes.double()) / 2)

    wide = ef.Statistics.exact(MEAN, scale**2 * COVARIANCE)
    torch.testing.assert_close(ratios(wide), scale * ratios(KNOWN), rtol=1e-5, atol=0.0)


def test_what_is_missing_is_said() -> None:
    low = ef.Statistics.from_data(torch.randn(50, 2000), kind="low-rank")
    with pytest.raises(ValueError, match="needs the data's statistics"):
        RESIDUAL.plan(ef.schedules.VP(), 5)
    with pytest.raises(ValueError, match="low rank"):
        RESIDUAL.plan(ef.schedules.VP(), 5, statistics=low)
    with pytest.raises(ValueError, match="history is 0"):
        ef.solvers.get("gaussian-residual", history=0)
