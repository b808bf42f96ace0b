"""Endpoints against k-diffusion at the same noise and the same grid, in float64.

k-diffusion lives on `sigma/alpha` with alpha = 1; other schedules are compared on x/alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from tests.parity import peers
from tests.parity.problem import agree, denoiser, levels, noise, ours, start
from tests.parity.test_formulas import SCHEDULES, TIMES

try:
    sampling: Any = peers.k_diffusion()
except ImportError as error:
    pytest.skip(
        f"compares with k-diffusion itself ({error}; see tests/parity/peers.py); "
        "test_formulas.py compares with its formulas",
        allow_module_level=True,
    )


def theirs(
    name: str, schedule: Schedule, times: tuple[float, ...] = TIMES, **options: Any
) -> Tensor:
    """The endpoint of `sample_<name>` through the nodes."""
    alpha, sigma = levels(schedule, times)
    ratios = sigma / alpha
    f = denoiser(schedule)

    def model(y: Tensor, ratio: Tensor) -> Tensor:
        t = schedule.time(-2 * torch.log(ratio[0])).item()  # also between the nodes
        return f(y * schedule.alpha(t), t)

    y = start(schedule, times[0]) / alpha[0]
    sample = getattr(sampling, f"sample_{name}")
    return sample(model, y, ratios, disable=True, **options) * alpha[-1]


def draws() -> Callable[[Tensor, Tensor], Tensor]:
    """A noise sampler that gives the plan's own noise, one a step."""
    steps = iter(range(1000))
    return lambda sigma, sigma_next: noise(next(steps))


@pytest.mark.parametrize("times", [TIMES, (*TIMES, 0.0)], ids=["to noise", "to data"])
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=repr)
@pytest.mark.parametrize(
    ("peer", "solver"),
    [
        ("euler", "ddim"),
        ("heun", "edm"),
        ("dpmpp_2m", "dpm-solver++2m"),
        ("dpm_2", "dpm-solver-2"),
    ],
)
def test_deterministic(
    peer: str, solver: str, schedule: Schedule, times: tuple[float, ...]
) -> None:
    agree(ours(ef.solvers.get(solver), schedule, times), theirs(peer, schedule, times))


@pytest.mark.parametrize(
    ("peer", "solver"), [("euler", "ddim"), ("heun", "edm"), ("dpmpp_2m", "dpm-solver++2m")]
)
def test_deterministic_where_the_process_explodes(peer: str, solver: str) -> None:
    schedule = ef.schedules.VE()
    agree(ours(ef.solvers.get(solver), schedule, TIMES), theirs(peer, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_dpm_solver_plus_plus_2s(schedule: Schedule) -> None:
    """Without the noise that it may add."""
    endpoint = theirs("dpmpp_2s_ancestral", schedule, eta=0.0, noise_sampler=draws())
    agree(ours(ef.solvers.get("dpm-solver++2s"), schedule, TIMES), endpoint)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("order", "name"), [(2, "deis-rhoab1"), (3, "deis-rhoab2"), (4, "deis-rhoab3")]
)
def test_linear_multistep(order: int, name: str, schedule: Schedule) -> None:
    solver = ef.solvers.get(name, corrected_start=False)
    agree(ours(solver, schedule, TIMES), theirs("lms", schedule, order=order))


@pytest.mark.parametrize("times", [TIMES, (*TIMES, 0.0)], ids=["to noise", "to data"])
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=repr)
@pytest.mark.parametrize(
    ("peer", "solver"), [("euler_ancestral", "ddpm"), ("dpmpp_2m_sde", "sde-dpm-solver++2m")]
)
def test_stochastic(peer: str, solver: str, schedule: Schedule, times: tuple[float, ...]) -> None:
    endpoint = theirs(peer, schedule, times, noise_sampler=draws())
    agree(ours(ef.solvers.get(solver), schedule, times), endpoint)


def test_churn(monkeypatch: pytest.MonkeyPatch) -> None:
    """sample_heun draws from `randn_like` once a step; a step of ours has two stages.

    The first step has no churn: it would leave the schedule, where ours stops.
    """
    schedule, stages = ef.schedules.VE(), iter(range(0, 1000, 2))
    f = denoiser(schedule)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return f(x, schedule.time(-2 * torch.log(sigma[0])).item())

    monkeypatch.setattr(torch, "randn_like", lambda x: noise(next(stages)))
    _, sigma = levels(schedule, TIMES)
    most = (sigma[0] * sigma[1]).sqrt().item()
    x = start(schedule, TIMES[0])
    x = sampling.sample_heun(model, x, sigma, disable=True, s_churn=3.0, s_tmax=most)
    agree(ours(ef.solvers.get("edm-churn", churn=3.0, churn_max=most), schedule, TIMES), x)
