"""The denoising loss and the noise levels at which it is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.schedules import Schedule, along


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, **condition: Any
) -> Tensor:
    """Mean squared error of a network's own output, by sample: (B, ...), (B,) -> (B,).

    The error of x0 is divided by q², with x0 = p x_t + q F, so that every prediction and noise
    level has weight one in the network's output F.

    Source: "Elucidating the Design Space of Diffusion-Based Generative Models", equation 8.
    """
    x_t = denoiser.schedule.add_noise(x0, t, noise)
    error = denoiser(x_t, t, **condition) - x0
    _, q, _ = denoiser.coefficients(t)
    return (error / along(q.to(error), error)).square().flatten(1).mean(1)


def noise_times(schedule: Schedule, quantiles: Tensor, mean: float, std: float) -> Tensor:
    """Times, float64, at which log(sigma/alpha) has these quantiles (in (0, 1)) of N(mean, std²).

    Levels beyond the schedule's own ends become the ends.

    Source: "Elucidating the Design Space of Diffusion-Based Generative Models", table 1 (p_train).
    """
    log_sigma = mean + std * torch.special.ndtri(quantiles.double())
    log_snr = (-2 * log_sigma).clamp(float(schedule.log_snr(1.0)), float(schedule.log_snr(0.0)))
    return schedule.time(log_snr)
