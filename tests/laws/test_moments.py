"""Law 2: stochastic solvers. The propagated moments converge to the exact law at the stated weak
order; they are those of the machine that runs; and a Monte Carlo run agrees within its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import ebbflow as ef
from ebbflow.plan import Plan
from tests.laws import cases, mutants, reference
from tests.laws.cases import DETERMINISTIC, LAWS, SCHEDULES, SOLVERS, STOCHASTIC
from tests.laws.mutants import Mutant
from tests.laws.test_machine import machines
from tests.laws.test_order import QUICK_STEPS_OF_ORDER_1, STEPS, check_decay

LAW = LAWS["gaussian"]
MEAN, COVARIANCE = cases.tensor(LAW.mean), cases.tensor(LAW.covariance)
Noise = Callable[..., Tensor]


def exact(schedule: str, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x_t."""
    now = reference.LEVELS[schedule](t)
    return now.alpha * LAW.mean, now.alpha**2 * LAW.covariance + now.sigma**2 * np.eye(2)


def moment_errors(plans: Sequence[Plan], schedule: str) -> list[np.ndarray]:
    mean, covariance = exact(schedule, 0.05)
    found = [plan.moments(MEAN, COVARIANCE) for plan in plans]
    errors = [np.vstack([f.mean.numpy() - mean, f.covariance.numpy() - covariance]) for f in found]
    worst = np.abs(errors[0]).max()
    assert worst < 1, f"{schedule}: the error of the fewest steps, {worst:.2g}, exceeds the law"
    return errors


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_stated_weak_order_is_the_observed_one(name: str) -> None:
    make, order = cases.maker(SOLVERS[name]), SOLVERS[name].order
    slopes = []
    for schedule, process in SCHEDULES.items():
        plans = [make(process, cases.interior(steps)) for steps in STEPS]
        slopes.append(check_decay(moment_errors(plans, schedule), order, schedule))
    least = min(slopes)
    assert least < order + 0.25, f"weak order {least:.2f} everywhere, stated {order}"


@pytest.mark.parametrize("name", STOCHASTIC)
def test_mutants_lose_their_weak_order(name: str) -> None:
    """On some schedule: each is made on the next one only if it survives the last."""
    order, make = SOLVERS[name].order, cases.maker(SOLVERS[name])
    steps = STEPS if order > 1 else QUICK_STEPS_OF_ORDER_1
    alive = mutants.systematic(name, order)
    for schedule, process in SCHEDULES.items():
        plans = [make(process, cases.interior(n)) for n in steps]
        check_decay(moment_errors(plans, schedule), order, schedule)

        def survives(mutant: Mutant, plans: Sequence[Plan] = plans, on: str = schedule) -> bool:
            try:
                check_decay(moment_errors([mutant.rewrite(plan) for plan in plans], on), order, on)
            except AssertionError:
                return False
            return True

        alive = [mutant for mutant in alive if survives(mutant)]
        if not alive:
            return
    pytest.fail(f"{', '.join(map(str, alive))} survive", pytrace=False)


def simulated_moments(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Mean and covariance by running the plan: its response to each start and to each noise.

    Row 0 starts at zero without noise; the next d rows start at the unit vectors; then one row for
    each coordinate of each stage's noise.
    """
    d, n = len(MEAN), plan.nfe
    start = torch.zeros(1 + d + n * d, d, dtype=torch.float64)
    start[1 : 1 + d] = torch.eye(d, dtype=torch.float64)

    def one_at_a_time(seed: int, indices: Sequence[int], step: int, *rest: object) -> Tensor:
        z = torch.zeros_like(start)
        first = 1 + d + (step - 1) * d
        z[first : first + d] = torch.eye(d, dtype=torch.float64)
        return z

    monkeypatch.setattr("ebbflow.noise.normal", one_at_a_time)

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = plan.schedule.alpha(t[0]), plan.schedule.sigma(t[0])
        total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(d, dtype=torch.float64)
        gain = alpha * COVARIANCE @ torch.linalg.inv(total)
        return MEAN + (x - alpha * MEAN) @ gain.T

    end = plan.run(ef.Denoiser(posterior_mean, plan.schedule), start)
    monkeypatch.undo()
    shift, response = end[0], end[1:] - end[0]
    gain, noise = response[:d].T, response[d:]
    alpha, sigma = plan.schedule.alpha(plan.start), plan.schedule.sigma(plan.start)
    first = alpha**2 * COVARIANCE + sigma**2 * torch.eye(d, dtype=torch.float64)
    return gain @ (alpha * MEAN) + shift, gain @ first @ gain.T + noise.T @ noise


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_moments_are_those_of_the_machine_that_runs(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = SOLVERS[name]
    for times in (None, cases.uneven(7)):
        plan = solver.plan(SCHEDULES[schedule], times=times, statistics=cases.statistics())
        found = plan.moments(MEAN, COVARIANCE)
        mean, covariance = simulated_moments(plan, monkeypatch)
        torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.covariance, covariance, rtol=1e-9, atol=1e-11)


@given(plan=machines())
def test_any_machine_has_the_moments_of_its_runs(plan: Plan) -> None:
    """Constants, several registers, noise in queries: what no solver uses yet."""
    found = plan.moments(MEAN, COVARIANCE)
    mean, covariance = simulated_moments(plan, pytest.MonkeyPatch())
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_moments_of_a_mutant_are_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = mutants.example(name)
    mean, covariance = simulated_moments(plan, monkeypatch)
    for mutant in mutants.systematic(name, 1):
        found = mutant.rewrite(plan).moments(MEAN, COVARIANCE)
        moved = torch.cat([(found.mean - mean), (found.covariance - covariance).flatten()])
        assert moved.abs().max() > 1e-6, mutant.name


def z_scores(end: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Of the mean and the covariance of normal samples (n, d)."""
    n, variance = len(end), covariance.diagonal()
    of_mean = (end.mean(0) - mean) / (variance / n).sqrt()
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    return torch.cat([of_mean, ((torch.cov(end.T) - covariance) / error).flatten()])


def scores(plan: Plan, n: int = 6000) -> Tensor:
    """z-scores of one Monte Carlo run from the process' own law against the propagated moments."""
    schedule = plan.schedule
    random = torch.Generator().manual_seed(7)
    z = torch.randn(2, n, 2, generator=random, dtype=torch.float64)
    x0 = MEAN + z[0] @ torch.linalg.cholesky(COVARIANCE).T
    start = schedule.add_noise(x0, plan.start, z[1])
    end = plan.run(cases.oracle("gaussian").denoiser(schedule), start, seed=11)
    return z_scores(end, *plan.moments(MEAN, COVARIANCE))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_monte_carlo_run_agrees_within_its_error(name: str, schedule: str) -> None:
    plan = cases.maker(SOLVERS[name])(SCHEDULES[schedule], cases.interior(12))
    assert scores(plan).abs().max() < 4


def _same_every_step(normal: Noise) -> Noise:
    return lambda seed, indices, step, *rest: normal(seed, indices, 1, *rest)


def _same_every_sample(normal: Noise) -> Noise:
    return lambda seed, indices, step, *rest: normal(seed, [0] * len(indices), step, *rest)


def _five_percent(normal: Noise) -> Noise:
    return lambda *arguments: normal(*arguments) * 1.05


def _shared_by_coordinates(normal: Noise) -> Noise:
    return lambda *arguments: normal(*arguments)[:, :1].expand(-1, 2)


@pytest.mark.parametrize(
    "wrong", [_same_every_step, _same_every_sample, _five_percent, _shared_by_coordinates]
)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_wrong_noise_is_seen(name: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.maker(SOLVERS[name])(SCHEDULES["VP"], cases.interior(12))
    monkeypatch.setattr("ebbflow.noise.normal", wrong(ef.noise.normal))
    assert scores(plan).abs().max() > 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["ddim", "sde-dpm-solver++2m"])
def test_samples_from_the_prior_have_its_moments(name: str, schedule: str) -> None:
    """`sample` starts from N(0, sigma(1)²), whatever the law of x_1."""
    process = SCHEDULES[schedule]
    plan = SOLVERS[name].plan(process, 8)
    prior = process.sigma(1.0) ** 2 * torch.eye(2, dtype=torch.float64)
    known = plan.moments(MEAN, COVARIANCE, start=(torch.zeros(2, dtype=torch.float64), prior))
    x = ef.sample(cases.oracle("gaussian").denoiser(process), (5000, 2), plan=plan, seed=3)
    assert z_scores(x.double(), *known).abs().max() < 4.5


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_mixture_is_sampled_within_the_bias_of_a_gaussian(name: str) -> None:
    """Mean and covariance of a law that is not normal, after 80 steps from t = 0.95 to 0.05.

    The allowance is four standard errors and twice the propagated bias for a Gaussian of
    the same moments.
    """
    law, now = LAWS["mixture"], reference.LEVELS["VP"](0.05)
    plan = cases.maker(SOLVERS[name])(SCHEDULES["VP"], cases.interior(80))
    mean, covariance = (
        now.alpha * law.mean,
        now.alpha**2 * law.covariance + now.sigma**2 * np.eye(2),
    )
    told = plan.moments(cases.tensor(law.mean), cases.tensor(law.covariance))
    x = cases.tensor(cases.start("mixture", "VP", samples=3000))
    end = plan.run(cases.oracle("mixture").denoiser(plan.schedule), x, seed=2).numpy()
    centred = end - mean
    products = np.einsum("ni,nj->nij", centred, centred)
    for found, expected, bias, spread in (
        (end.mean(0), mean, told.mean.numpy() - mean, end.std(0)),
        (products.mean(0), covariance, told.covariance.numpy() - covariance, products.std(0)),
    ):
        allowed = 4 * spread / len(end) ** 0.5 + 2 * np.abs(bias).max()
        assert (np.abs(found - expected) < allowed).all()
        assert np.abs(bias).max() < 0.15, "too large an allowance to mean anything"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_whole_way_ends_at_the_law_of_the_data(name: str, schedule: str) -> None:
    """From 1 to 0 on the solver's own grid; VE keeps its sigma_min."""
    solver = SOLVERS[name]
    mean, covariance = exact(schedule, 0.0)
    if schedule == "VE":
        assert covariance[0, 0] == LAW.covariance[0, 0] + 0.002**2
    bias = []
    for steps in (50, 200):
        plan = solver.plan(SCHEDULES[schedule], steps, statistics=cases.statistics())
        found = plan.moments(MEAN, COVARIANCE)
        away = found.mean.numpy() - mean, found.covariance.numpy() - covariance
        bias.append(max(np.abs(part).max() for part in away))
    # A grid that leaves no signal by one long step keeps the error of that step.
    assert bias[0] < 1
    assert bias[1] < max(bias[0] / 2.5, 1e-3)


def test_one_gaussian_step_by_hand() -> None:
    """DDPM's one step from pure noise to t = 0.5 of the linear path, with a scalar Gaussian."""
    plan = ef.solvers.get("ddpm").plan(ef.schedules.Linear(), times=[1.0, 0.5])
    mean, variance = 3.0, 0.25
    # alpha = 0 at the start: D is the mean, the posterior N(alpha' D, sigma'²).
    found = plan.moments(torch.tensor([mean]), torch.tensor([[variance]]))
    torch.testing.assert_close(found.mean, torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(found.covariance, torch.tensor([[0.25]], dtype=torch.float64))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_start_of_ones_own_is_propagated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.maker(SOLVERS[name])(SCHEDULES["Cosine"], cases.uneven(5))
    point = torch.tensor([0.3, -1.1], dtype=torch.float64)
    found = plan.moments(MEAN, COVARIANCE, start=(point, torch.zeros(2, 2)))
    end = plan.run(cases.oracle("gaussian").denoiser(plan.schedule), point[None])
    torch.testing.assert_close(found.mean, end[0], rtol=1e-10, atol=1e-12)
    assert found.covariance.abs().max() < 1e-14
