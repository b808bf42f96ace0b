"""Endpoints against the published update formulas, written out here and run on every machine.

The comparisons with other libraries in this folder need those libraries; these need nothing.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from tests.parity.problem import agree, denoiser, levels, noise, ours, start

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
CHAIN = ef.schedules.Betas(BETAS)
INDICES = tuple(range(999, 0, -100))
NODES = (*((i + 1) / 1000 for i in INDICES), 0.0)
SCHEDULES: list[Schedule] = [ef.schedules.VP(), ef.schedules.Linear(), ef.schedules.VE()]
TIMES = (0.98, 0.9, 0.75, 0.6, 0.5, 0.32, 0.2, 0.1, 0.03)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_in_products_of_betas(eta: float) -> None:
    """Denoising Diffusion Implicit Models, equations 12 and 16."""
    product = torch.cumprod(1 - BETAS, 0)
    f, x = denoiser(CHAIN), start(CHAIN, NODES[0])
    for k, i in enumerate(INDICES):
        now = product[i]
        then = product[i - 100] if i >= 100 else torch.ones((), dtype=torch.float64)
        x0 = f(x, NODES[k])
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        deviation = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        x = then.sqrt() * x0 + (1 - then - deviation**2).sqrt() * eps + deviation * noise(k)
    agree(ours(ef.solvers.get("ddim", eta=eta), CHAIN, NODES), x)


def test_ddpm_in_single_steps_of_the_chain() -> None:
    """Denoising Diffusion Probabilistic Models, equations 6 and 7, over the last 50 indices."""
    product = torch.cumprod(1 - BETAS, 0)
    indices = range(49, -1, -1)
    nodes = [(i + 1) / 1000 for i in indices] + [0.0]
    f, x = denoiser(CHAIN), start(CHAIN, nodes[0])
    for k, i in enumerate(indices):
        now, beta = product[i], BETAS[i]
        then = product[i - 1] if i else torch.ones((), dtype=torch.float64)
        x0 = f(x, nodes[k])
        mean = then.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - then) / (1 - now) * x
        x = mean + ((1 - then) / (1 - now) * beta).sqrt() * noise(k)
    agree(ours(ef.solvers.get("ddpm"), CHAIN, nodes), x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_dpm_solver_plus_plus_2m(schedule: Schedule) -> None:
    """DPM-Solver++, algorithm 2: D = (1 + 1/2r) x0 - 1/2r x0_old."""
    alpha, sigma = levels(schedule, TIMES)
    lambda_ = torch.log(alpha / sigma)
    f, x, old = denoiser(schedule), start(schedule, TIMES[0]), torch.zeros(())
    for k in range(len(TIMES) - 1):
        x0 = f(x, TIMES[k])
        h = lambda_[k + 1] - lambda_[k]
        d = x0
        if k:
            r = (lambda_[k] - lambda_[k - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * torch.expm1(-h) * d
        old = x0
    agree(ours(ef.solvers.get("dpm-solver++2m"), schedule, TIMES), x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_sde_dpm_solver_plus_plus_2m(schedule: Schedule) -> None:
    """DPM-Solver++, SDE-DPM-Solver++(2M)."""
    alpha, sigma = levels(schedule, TIMES)
    lambda_ = torch.log(alpha / sigma)
    f, x, old = denoiser(schedule), start(schedule, TIMES[0]), torch.zeros(())
    for k in range(len(TIMES) - 1):
        x0 = f(x, TIMES[k])
        h = lambda_[k + 1] - lambda_[k]
        slope = 0.0 if k == 0 else (x0 - old) * h / (lambda_[k] - lambda_[k - 1])
        x = (
            sigma[k + 1] / sigma[k] * torch.exp(-h) * x
            + alpha[k + 1] * (1 - torch.exp(-2 * h)) * (x0 + slope / 2)
            + sigma[k + 1] * (1 - torch.exp(-2 * h)).sqrt() * noise(k)
        )
        old = x0
    agree(ours(ef.solvers.get("sde-dpm-solver++2m"), schedule, TIMES), x)


def velocity(f: ef.Denoiser, x: Tensor, t: float) -> Tensor:
    """Of rectified flow: `eps - x0`, from the model's x0."""
    return (x - f(x, t)) / t


def test_euler_on_rectified_flow() -> None:
    """Flow Straight and Fast, algorithm 1."""
    schedule = ef.schedules.Linear()
    times = (1.0, *TIMES, 0.0)
    f, x = denoiser(schedule), start(schedule, 1.0)
    for t, s in pairwise(times):
        x = x + (s - t) * velocity(f, x, t)
    agree(ours(ef.solvers.get("euler"), schedule, times), x)


def test_heun_on_rectified_flow() -> None:
    """Heun's method; its last step, to t = 0, is Euler's."""
    schedule = ef.schedules.Linear()
    times = (1.0, *TIMES, 0.0)
    f, x = denoiser(schedule), start(schedule, 1.0)
    for t, s in pairwise(times):
        v = velocity(f, x, t)
        guess = x + (s - t) * v
        x = guess if s == 0 else x + (s - t) / 2 * (v + velocity(f, guess, s))
    agree(ours(ef.solvers.get("heun"), schedule, times), x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_edm_heun_in_the_ratio_of_noise_to_signal(schedule: Schedule) -> None:
    """Elucidating the Design Space, algorithm 1 on x/alpha."""
    alpha, sigma = levels(schedule, TIMES)
    r = sigma / alpha
    f, y = denoiser(schedule), start(schedule, TIMES[0]) / alpha[0]
    for k in range(len(TIMES) - 1):
        slope = (y - f(y * alpha[k], TIMES[k])) / r[k]
        guess = y + (r[k + 1] - r[k]) * slope
        late = (guess - f(guess * alpha[k + 1], TIMES[k + 1])) / r[k + 1]
        y = y + (r[k + 1] - r[k]) * (slope + late) / 2
    agree(ours(ef.solvers.get("edm"), schedule, TIMES), y * alpha[-1])


def test_edm_with_churn() -> None:
    """Elucidating the Design Space, algorithm 2, its noise and Heun's method."""
    schedule, churn = ef.schedules.VE(), 3.0
    _, sigma = levels(schedule, TIMES)
    steps = len(TIMES) - 1
    gamma = min(churn / steps, math.sqrt(2) - 1)
    f, x, calls = denoiser(schedule), start(schedule, TIMES[0]), 0
    for k in range(steps):
        raised = min(sigma[k].item() * (1 + gamma), 80.0)
        x = x + math.sqrt(raised**2 - sigma[k].item() ** 2) * noise(calls)
        t = schedule.time(-2 * math.log(raised)).item()
        slope = (x - f(x, t)) / raised
        guess = x + (sigma[k + 1] - raised) * slope
        late = (guess - f(guess, TIMES[k + 1])) / sigma[k + 1]
        x = x + (sigma[k + 1] - raised) * (slope + late) / 2
        calls += 2
    agree(ours(ef.solvers.get("edm-churn", churn=churn), schedule, TIMES), x)


def test_a_coefficient_off_by_a_thousandth_is_seen() -> None:
    """The mutant of the comparisons above: 2M with 1/2r scaled by 1.001."""
    schedule = ef.schedules.VP()
    plan = ef.solvers.get("dpm-solver++2m").plan(schedule, times=TIMES)
    stages = list(plan.stages)
    row = dict(stages[3].update[0])
    row["x1"] *= 1.001
    row["D"] -= 0.001 * row["x1"] / 1.001
    stages[3] = ef.plan.Stage(
        stages[3].time, stages[3].query, (row, *stages[3].update[1:]), stages[3].node
    )
    wrong = ef.Plan(schedule, TIMES[0], tuple(stages))
    right = ours(ef.solvers.get("dpm-solver++2m"), schedule, TIMES)
    spoilt = wrong.run(denoiser(schedule), start(schedule, TIMES[0]))
    with pytest.raises(AssertionError):
        agree(spoilt, right)
