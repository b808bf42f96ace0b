"""The exact flow and prior of Gaussian data: a start that costs no call.

At high noise any law is seen through its mean and covariance alone, so these carry the first part
of the way: `ef.sample(denoiser, x.shape, x_init=gaussian_flow(…, x, 1.0, t), times=[t, …, 0.0])`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.schedules import Schedule
from ebbflow.statistics import Statistics


def gaussian_flow(
    statistics: Statistics, schedule: Schedule, x: Tensor, t: float, s: float
) -> Tensor:
    """The probability flow of N(m, C) from time t to time s, exactly, in one step:

        x_s = alpha_s m + V_s^(1/2) V_t^(-1/2) (x_t - alpha_t m),   V = alpha² C + sigma²

    x: (B, *shape), the state at t; t and s in either order, with noise at t (sigma_t > 0; raises
    ValueError without). For other laws the error falls as s approaches 1.
    Diffusion Models Generate Images Like Painters: an Analytical Theory of Outline First, Details
    Later, the solution of the probability-flow ODE for a Gaussian.
    """
    _check(statistics, x)
    (alpha, sigma), (alpha_s, sigma_s) = _levels(schedule, t), _levels(schedule, s)
    if sigma == 0:
        raise ValueError(f"there is no noise at t = {t:g}: start where sigma is positive")
    mean = statistics.mean.to(x.device, x.dtype)
    white = statistics.scale(x - alpha * mean, alpha, sigma, power=-0.5)
    return alpha_s * mean + statistics.scale(white, alpha_s, sigma_s, power=0.5)


def gaussian_prior(
    statistics: Statistics,
    schedule: Schedule,
    samples: int,
    t: float = 1.0,
    seed: int = 0,
    first_index: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """States (samples, *shape) at time t of data N(m, C): `N(alpha m, alpha² C + sigma²)`.

    Where a schedule keeps signal at t = 1, N(0, sigma²) is not the law of x_1, and no solver can
    mend that; this is exact in its mean and covariance. The draws are those of `ef.sample` with the
    same seed and index, scaled and moved.
    """
    indices = range(first_index, first_index + samples)
    z = noise.normal(seed, indices, 0, statistics.mean.shape, torch.float64)
    alpha, sigma = _levels(schedule, t)
    return (alpha * statistics.mean + statistics.scale(z, alpha, sigma, power=0.5)).to(dtype)


def _levels(schedule: Schedule, t: float) -> tuple[float, float]:
    return schedule.alpha(t).item(), schedule.sigma(t).item()


def _check(statistics: Statistics, x: Tensor) -> None:
    if x.shape[1:] != statistics.mean.shape:
        raise ValueError(
            f"state of shape {tuple(x.shape)}: the statistics are those of samples of shape "
            f"{tuple(statistics.mean.shape)}"
        )
