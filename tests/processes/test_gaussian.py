"""The analytic Gaussian start: exact for Gaussian data, and what it gains on a mixture."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.laws import cases, reference
from tests.laws.cases import LAWS, SCHEDULES


def carried(law: str, schedule: str, t: float, s: float) -> Tensor:
    x = cases.tensor(cases.start(law, schedule))
    return ef.gaussian_flow(cases.exact_statistics(law), SCHEDULES[schedule], x, t, s)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_the_flow_of_a_gaussian(schedule: str) -> None:
    """Against a solution of the probability-flow ODE, which knows no closed form."""
    found = carried("gaussian", schedule, 0.95, 0.05)
    np.testing.assert_allclose(found, cases.exact_end("gaussian", schedule), rtol=0, atol=1e-9)


def test_wrong_flows_are_seen() -> None:
    """A power, a mean or a level that is wrong misses by far more than the tolerance."""
    right = cases.exact_end("gaussian", "VP")
    law = LAWS["gaussian"]
    mean, covariance = cases.tensor(law.mean), cases.tensor(law.covariance)
    wrong = {
        "covariance": ef.Statistics.exact(mean, 1.001 * covariance),
        "mean": ef.Statistics.exact(1.001 * mean, covariance),
        "sign": ef.Statistics.exact(-mean, covariance),
    }
    x = cases.tensor(cases.start("gaussian", "VP"))
    for name, statistics in wrong.items():
        found = ef.gaussian_flow(statistics, SCHEDULES["VP"], x, 0.95, 0.05)
        assert np.abs(found.numpy() - right).max() > 1e-5, name


def test_it_is_a_flow() -> None:
    """There and back is the identity, and two parts are the whole."""
    process, known = SCHEDULES["Cosine"], cases.exact_statistics()
    x = cases.tensor(cases.start("gaussian", "Cosine"))
    half = ef.gaussian_flow(known, process, x, 0.95, 0.4)
    whole = ef.gaussian_flow(known, process, x, 0.95, 0.1)
    torch.testing.assert_close(ef.gaussian_flow(known, process, half, 0.4, 0.1), whole)
    torch.testing.assert_close(ef.gaussian_flow(known, process, half, 0.4, 0.95), x)


def test_from_pure_noise_to_data() -> None:
    """Both ends of the straight path, by hand: x_0 = m + C^(1/2) eps."""
    known = ef.Statistics.exact(torch.tensor([3.0]), torch.tensor([[0.25]]))
    found = ef.gaussian_flow(known, SCHEDULES["Linear"], torch.tensor([[2.0]]), 1.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([[4.0]]))
    with pytest.raises(ValueError, match="no noise at t = 0"):
        ef.gaussian_flow(known, SCHEDULES["Linear"], found, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        ef.gaussian_flow(known, SCHEDULES["Linear"], torch.zeros(1, 2), 1.0, 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_a_mixture_the_error_falls_towards_noise(schedule: str) -> None:
    """Measured against the reference solution, from t = 0.95 to rising s."""
    x = cases.start("mixture", schedule)
    errors = [
        np.abs(
            carried("mixture", schedule, 0.95, s).numpy()
            - reference.flow(LAWS["mixture"], schedule, x, 0.95, s)
        ).max()
        / float(SCHEDULES[schedule].sigma(s))
        for s in (0.2, 0.4, 0.6, 0.8)
    ]
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.05 < errors[0]


def solve(schedule: str, first: float, calls: int, solver: str) -> tuple[float, float]:
    """Root mean square error of `calls` calls from 0.95, and from `first` with the start."""
    process = SCHEDULES[schedule]
    denoiser = cases.oracle("mixture").denoiser(process)
    x = cases.tensor(cases.start("mixture", schedule, samples=64))
    exact = reference.flow(LAWS["mixture"], schedule, x.numpy(), 0.95, 0.05)

    def nodes(t: float) -> list[float]:
        ends = process.log_snr(torch.tensor([t, 0.05], dtype=torch.float64))
        inner = torch.linspace(*ends.tolist(), calls + 1, dtype=torch.float64)[1:-1]
        return [t, *process.time(inner).tolist(), 0.05]

    def error(x: Tensor, t: float) -> float:
        end = ef.sample(denoiser, x.shape, solver=solver, times=nodes(t), x_init=x)
        return float(np.sqrt(((end.numpy() - exact) ** 2).sum(1).mean()))

    start = ef.gaussian_flow(cases.exact_statistics("mixture"), process, x, 0.95, first)
    return error(x, 0.95), error(start, first)


@pytest.mark.parametrize("schedule", ["VP", "Linear", "VE"])
def test_eight_calls_go_further_with_the_start(schedule: str) -> None:
    """From sigma/alpha = 4 rather than from t = 0.95, at equal calls: half the error."""
    first = SCHEDULES[schedule].time(-2 * np.log(4.0)).item()
    plain, started = solve(schedule, first, 8, "dpm-solver++2m")
    assert started < 0.5 * plain


@pytest.mark.parametrize("schedule", ["VP", "Cosine"])
def test_the_prior_has_the_law_of_the_process(schedule: str) -> None:
    """Mean and covariance of N(alpha m, alpha² C + sigma²), at a time that keeps signal."""
    process, known = SCHEDULES[schedule], cases.exact_statistics()
    x = ef.gaussian_prior(known, process, 40_000, t=0.3, dtype=torch.float64)
    law, alpha, sigma = LAWS["gaussian"], process.alpha(0.3).item(), process.sigma(0.3).item()
    covariance = alpha**2 * law.covariance + sigma**2 * np.eye(2)
    deviation = np.sqrt(covariance.diagonal() / len(x))
    assert (np.abs(x.mean(0).numpy() - alpha * law.mean) < 4 * deviation).all()
    spread = np.sqrt((np.outer(covariance.diagonal(), covariance.diagonal()) * 2) / len(x))
    assert (np.abs(np.cov(x.numpy().T) - covariance) < 4 * spread).all()
    later = ef.gaussian_prior(known, process, 2, t=0.3, first_index=5, dtype=torch.float64)
    torch.testing.assert_close(later, x[5:7])


def test_a_true_prior_mends_what_no_solver_can() -> None:
    """A process that keeps signal: the start N(0, sigma²) leaves a bias that 400 steps keep."""
    short = ef.schedules.VP(beta_min=0.1, beta_max=1.5)
    law = LAWS["gaussian"]
    mean, covariance = cases.tensor(law.mean), cases.tensor(law.covariance)
    plan = ef.solvers.get("dpm-solver++3m").plan(short, 400)
    sigma = short.sigma(1.0)
    wrong = (torch.zeros(2), sigma**2 * torch.eye(2, dtype=torch.float64))
    assert (plan.moments(mean, covariance, start=wrong).mean - mean).abs().max() > 0.2
    alpha = short.alpha(1.0)
    right = (alpha * mean, alpha**2 * covariance + wrong[1])
    known = cases.exact_statistics()
    x = ef.gaussian_prior(known, short, 40_000, dtype=torch.float64)
    assert (x.mean(0) - right[0]).abs().max() < 0.03
    assert (plan.moments(mean, covariance, start=right).mean - mean).abs().max() < 1e-3
