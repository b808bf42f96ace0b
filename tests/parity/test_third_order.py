"""The third-order rule: ours is exact for quadratic predictions; the published coefficient is not.

For D a polynomial of degree 2 in lambda, the step of the probability-flow ODE has the closed form

    x' = sigma'/sigma x + alpha' ∫_0^h e^{u - h} D(lambda + u) du.

DPM-Solver++ and the codes that follow it multiply the second divided difference of D, which is
D''/2, by the coefficient that belongs to D'': half of that term is lost, and the order is 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.parity import peers
from tests.parity.problem import agree, denoiser, levels, start

SCHEDULE = ef.schedules.VP()
NODES = (0.7, 0.6, 0.52, 0.4)


def quadratic(lambda_: float) -> float:
    return 0.3 - 0.7 * lambda_ + 0.45 * lambda_**2


def closed_form(x: Tensor) -> Tensor:
    """The exact step from the third node to the fourth."""
    alpha, sigma = (values.tolist() for values in levels(SCHEDULE, NODES))
    lambda_ = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = lambda_[3] - lambda_[2]
    d, d1, d2 = quadratic(lambda_[2]), -0.7 + 0.9 * lambda_[2], 0.9
    # ∫ e^{u - h} du, ∫ u e^{u - h} du, ∫ u² e^{u - h} du over the step, by parts.
    zeroth = -math.expm1(-h)
    first = h - zeroth
    second = h**2 - 2 * first
    integral = d * zeroth + d1 * first + d2 / 2 * second
    return sigma[3] / sigma[2] * x + alpha[3] * integral


def lost() -> float:
    """Half the term of D'', which the published coefficient leaves out."""
    alpha, sigma = (values.tolist() for values in levels(SCHEDULE, NODES))
    lambda_ = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = lambda_[3] - lambda_[2]
    return alpha[3] * 0.9 / 4 * (h**2 - 2 * (h + math.expm1(-h)))


def predictions() -> list[Tensor]:
    alpha, sigma = levels(SCHEDULE, NODES)
    return [torch.full((2, 3), quadratic(v), dtype=torch.float64) for v in torch.log(alpha / sigma)]


def state() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


def last_step(update: Any) -> Tensor:
    """An update row of the third step, applied to `state` and to the quadratic's values."""
    d = predictions()
    values = {"x0": state(), "D": d[2], "x1": d[1], "x2": d[0]}
    return torch.stack([values[name] * weight for name, weight in update.items()]).sum(0)


def test_ours_is_exact_for_quadratics() -> None:
    plan = ef.solvers.get("dpm-solver++3m").plan(SCHEDULE, times=NODES)
    agree(last_step(plan.stages[2].update[0]), closed_form(state()), 1e-12)


def published(x: Tensor, d: list[Tensor]) -> Tensor:
    """The third-order multistep update as DPM-Solver's code has it, written out."""
    alpha, sigma = levels(SCHEDULE, NODES)
    lambda_ = torch.log(alpha / sigma)
    h, h_0, h_1 = (lambda_[k + 1] - lambda_[k] for k in (2, 1, 0))
    r0, r1 = h_0 / h, h_1 / h
    late, early = (d[2] - d[1]) / r0, (d[1] - d[0]) / r1
    first = late + r0 / (r0 + r1) * (late - early)
    second = (late - early) / (r0 + r1)
    phi_1 = torch.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    step = sigma[3] / sigma[2] * x - alpha[3] * phi_1 * d[2]
    return step + alpha[3] * phi_2 * first - alpha[3] * phi_3 * second


def test_the_published_coefficient_loses_half_of_the_second_derivative() -> None:
    theirs = published(state(), predictions())
    assert abs(lost()) > 1e-3
    agree(theirs + lost(), closed_form(state()), 1e-12)


def test_diffusers_has_the_published_coefficient() -> None:
    try:
        diffusers: Any = peers.diffusers()
    except ImportError as error:
        pytest.skip(f"looks at diffusers itself ({error}); the test above has its formula")
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3, prediction_type="sample")
    alpha, sigma = levels(SCHEDULE, NODES)
    scheduler.sigmas = sigma / alpha
    scheduler._step_index = 2
    theirs = scheduler.multistep_dpm_solver_third_order_update(predictions()[:3], sample=state())
    agree(theirs, published(state(), predictions()), 1e-12)


def halving(endpoint: Callable[[tuple[float, ...]], Tensor]) -> float:
    """log2 of how much the error falls from 128 to 256 steps uniform in lambda."""

    def nodes(steps: int) -> tuple[float, ...]:
        ends = SCHEDULE.log_snr(torch.tensor([0.9, 0.1], dtype=torch.float64))
        grid = torch.linspace(ends[0].item(), ends[1].item(), steps + 1, dtype=torch.float64)
        return tuple(SCHEDULE.time(grid).tolist())

    plan = ef.solvers.get("dpm-solver++3m").plan(SCHEDULE, times=nodes(2048))
    exact = plan.run(denoiser(SCHEDULE), start(SCHEDULE, nodes(2)[0]))
    errors = [(endpoint(nodes(steps)) - exact).abs().max() for steps in (128, 256)]
    return torch.log2(errors[0] / errors[1]).item()


def test_ours_is_of_third_order() -> None:
    def endpoint(times: tuple[float, ...]) -> Tensor:
        plan = ef.solvers.get("dpm-solver++3m").plan(SCHEDULE, times=times)
        return plan.run(denoiser(SCHEDULE), start(SCHEDULE, times[0]))

    assert halving(endpoint) == pytest.approx(3, abs=0.25)


def test_k_diffusion_s_third_order_is_of_second() -> None:
    """dpmpp_3m_sde with eta = 0, which is the deterministic method."""
    try:
        sampling: Any = peers.k_diffusion()
    except ImportError as error:
        pytest.skip(f"looks at k-diffusion itself ({error}); a test above has its formula")
    f = denoiser(SCHEDULE)

    def endpoint(times: tuple[float, ...]) -> Tensor:
        alpha, sigma = levels(SCHEDULE, times)
        ratios = sigma / alpha

        def model(y: Tensor, ratio: Tensor) -> Tensor:
            k = int((ratios - ratio[0]).abs().argmin())
            return f(y * alpha[k], times[k])

        y = start(SCHEDULE, times[0]) / alpha[0]
        y = sampling.sample_dpmpp_3m_sde(
            model, y, ratios, disable=True, eta=0.0, noise_sampler=lambda *sigmas: None
        )
        return y * alpha[-1]

    assert halving(endpoint) == pytest.approx(2, abs=0.25)
