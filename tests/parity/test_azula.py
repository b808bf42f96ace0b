"""Endpoints against azula at the same noise and the same grid, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from tests.parity import peers
from tests.parity.problem import agree, denoiser, noise, ours, start
from tests.parity.test_formulas import SCHEDULES

try:
    azula: Any = peers.azula()
except ImportError as error:
    pytest.skip(
        f"compares with azula itself ({error}; see tests/parity/peers.py); "
        "test_formulas.py compares with formulas",
        allow_module_level=True,
    )

FIRST, LAST, STEPS = 0.95, 0.05, 9
GRID = tuple(torch.linspace(FIRST, LAST, STEPS + 1, dtype=torch.float64).tolist())


def theirs(name: str, schedule: Schedule, **options: Any) -> Tensor:
    f = denoiser(schedule)

    class Process(azula.noise.Schedule):
        def alpha(self, t: Tensor) -> Tensor:
            return schedule.alpha(t)

        def sigma(self, t: Tensor) -> Tensor:
            return schedule.sigma(t)

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.alpha(t), self.sigma(t)

    class Exact(azula.denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = Process()

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            return azula.denoise.DiracPosterior(mean=f(x_t, t))

    sampler = getattr(azula.sample, f"{name}Sampler")(
        Exact(), start=FIRST, stop=LAST, steps=STEPS, silent=True, dtype=torch.float64, **options
    )
    return sampler(start(schedule, FIRST))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ddim(schedule: Schedule) -> None:
    agree(ours(ef.solvers.get("ddim"), schedule, GRID), theirs("DDIM", schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ddpm(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(STEPS))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(next(steps)))
    agree(ours(ef.solvers.get("ddpm"), schedule, GRID), theirs("DDPM", schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_heun_in_the_ratio_of_noise_to_signal(schedule: Schedule) -> None:
    agree(ours(ef.solvers.get("edm"), schedule, GRID), theirs("Heun", schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_third_order_exponential_multistep(schedule: Schedule) -> None:
    """azula starts without correcting its first step; its linear solve loses some digits."""
    solver = ef.solvers.get("dpm-solver++3m", corrected_start=False)
    agree(ours(solver, schedule, GRID), theirs("xEAB", schedule, order=3), 1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("sampler", "order", "name"),
    [
        ("zAB", 2, "deis-rhoab1"),
        ("zAB", 3, "deis-rhoab2"),
        ("zEAB", 2, "deis-logrhoab1"),
        ("zEAB", 3, "dpm-solver-3m"),
    ],
)
def test_adams(sampler: str, order: int, name: str, schedule: Schedule) -> None:
    """The same linear solves lose digits here, too."""
    solver = ef.solvers.get(name, corrected_start=False)
    agree(ours(solver, schedule, GRID), theirs(sampler, schedule, order=order), 1e-7)
