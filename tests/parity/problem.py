"""What both sides of a comparison sample: a mixture in three dimensions, the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule

SEED, SAMPLES = 5, 4


def denoiser(schedule: Schedule) -> ef.Denoiser:
    """The exact one of an anisotropic, off-centre mixture: nothing cancels by symmetry."""
    covariances = torch.tensor(
        [
            [[0.4, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.3]],
            [[0.1, 0, 0], [0, 0.3, 0.1], [0, 0.1, 0.5]],
        ],
        dtype=torch.float64,
    )
    means = torch.tensor([[1.0, -0.5, 0.3], [-1.2, 0.4, -0.2]], dtype=torch.float64)
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    return ef.oracles.GaussianMixture(means, covariances, weights).denoiser(schedule)


def start(schedule: Schedule, t: float) -> Tensor:
    """(4, 3): states that the process could be in at time t."""
    generator = torch.Generator().manual_seed(SEED)
    x0, noise = torch.randn(2, SAMPLES, 3, generator=generator, dtype=torch.float64)
    return schedule.add_noise(x0, t, noise)


def noise(step: int) -> Tensor:
    """Z of a plan's stage `step`, for the other side."""
    return ef.noise.normal(SEED, range(SAMPLES), step + 1, (3,), torch.float64)


def ours(solver: ef.solvers.Solver, schedule: Schedule, times: Sequence[float]) -> Tensor:
    """The endpoint of the solver through these nodes, from `start` at the first."""
    plan = solver.plan(schedule, times=times)
    return plan.run(denoiser(schedule), start(schedule, times[0]), seed=SEED)


def levels(schedule: Schedule, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """alpha and sigma at the nodes."""
    t = torch.tensor(times, dtype=torch.float64)
    return schedule.alpha(t), schedule.sigma(t)


def agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-8) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
