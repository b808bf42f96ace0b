"""SA-Solver: its rows against the paper's algorithm written as a loop, and what it reduces to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import ebbflow as ef
from ebbflow.plan import Plan
from tests.laws import cases, mutants
from tests.laws.cases import SCHEDULES, uneven

SCHEDULE = SCHEDULES["Cosine"]


def lagrange(nodes: list[float], j: int, u: float) -> float:
    return math.prod((u - v) / (nodes[j] - v) for i, v in enumerate(nodes) if i != j)


def weight(nodes: list[float], j: int, low: float, high: float, tau: float) -> float:
    """Of prediction j: its polynomial against `(1 + tau²) e^u e^{-tau² (high - u)}`."""

    def integrand(u: float) -> float:
        return (1 + tau**2) * math.exp(u - tau**2 * (high - u)) * lagrange(nodes, j, u)

    return quad(integrand, low, high, epsabs=1e-13, epsrel=1e-13)[0]


def adams(predictor: int, corrector: int, tau: float, times: list[float], x: Tensor) -> Tensor:
    """Algorithm 1 as a loop over a buffer, its coefficients by quadrature; the noise of step k is
    `ef.noise.normal(0, …, k + 1)`."""
    denoiser = cases.oracle("mixture").denoiser(SCHEDULE)
    t = torch.tensor(times, dtype=torch.float64)
    sigma, lambda_ = SCHEDULE.sigma(t).tolist(), (SCHEDULE.log_snr(t) / 2).tolist()
    buffer = [(lambda_[0], denoiser(x, times[0]))]
    for k in range(len(times) - 1):
        low, high = lambda_[k], lambda_[k + 1]
        z = ef.noise.normal(0, range(len(x)), k + 1, x.shape[1:], torch.float64)
        linear = sigma[k + 1] / sigma[k] * math.exp(-(tau**2) * (high - low)) * x
        spread = sigma[k + 1] * math.sqrt(-math.expm1(-2 * tau**2 * (high - low)))

        points = buffer[:predictor]
        nodes = [point[0] for point in points]
        guess = linear + spread * z
        for j, (_, prediction) in enumerate(points):
            guess = guess + sigma[k + 1] * weight(nodes, j, low, high, tau) * prediction
        if k + 2 == len(times):
            return guess

        points = [(high, denoiser(guess, times[k + 1])), *buffer[:corrector]]
        nodes = [point[0] for point in points]
        x = linear + spread * z
        for j, (_, prediction) in enumerate(points):
            x = x + sigma[k + 1] * weight(nodes, j, low, high, tau) * prediction
        buffer = [points[0], *buffer]
    raise AssertionError


def start() -> Tensor:
    return cases.tensor(cases.start("mixture", "Cosine"))


def check(plan: Plan, predictor: int, corrector: int, tau: float) -> None:
    expected = adams(predictor, corrector, tau, uneven(6), start())
    found = plan.run(cases.oracle("mixture").denoiser(SCHEDULE), start())
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)])
def test_the_plan_is_the_paper_s_loop(predictor: int, corrector: int, tau: float) -> None:
    solver = ef.solvers.get("sa-solver", predictor=predictor, corrector=corrector, tau=tau)
    plan = solver.plan(SCHEDULE, times=uneven(6))
    assert plan.nfe == 6 and plan.stochastic == (tau > 0)
    check(plan, predictor, corrector, tau)


def test_its_mutants_are_seen() -> None:
    """All but the sign of the noise in both rows, which keeps the law."""
    plan = ef.solvers.get("sa-solver").plan(SCHEDULE, times=uneven(6))
    check(plan, 3, 2, 1.0)
    for mutant in mutants.systematic("sa-solver", 2):
        with pytest.raises(AssertionError):
            check(mutant.rewrite(plan), 3, 2, 1.0)
            pytest.fail(f"{mutant} survives", pytrace=False)


def test_the_corrector_pays() -> None:
    """Against the predictor alone, at one call a step each: a smaller error of the moments."""
    law = cases.LAWS["gaussian"]
    mean, covariance = cases.tensor(law.mean), cases.tensor(law.covariance)

    def error(solver: ef.solvers.Solver) -> float:
        found = solver.plan(SCHEDULE, times=cases.interior(48)).moments(mean, covariance)
        alpha, sigma = SCHEDULE.alpha(0.05), SCHEDULE.sigma(0.05)
        exact = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return (found.covariance - exact).abs().max().item()

    alone = ef.solvers.get("sde-dpm-solver++2m")
    assert error(ef.solvers.get("sa-solver", predictor=2, corrector=1)) < 0.8 * error(alone)


@pytest.mark.parametrize(
    "wrong", [{"predictor": 4}, {"predictor": 1, "corrector": 2}, {"corrector": 0}, {"tau": -0.1}]
)
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="corrector <= predictor"):
        ef.solvers.get("sa-solver", **wrong)
