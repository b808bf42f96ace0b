"""`classify`: the class under which a denoiser removes noise best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser

STREAM = 29


@torch.no_grad()
def classify(
    denoiser: Denoiser,
    x0: Tensor,
    candidates: Sequence[Mapping[str, Any]],
    *,
    samples: int = 12,
    seed: int = 0,
    first_index: int = 0,
) -> Tensor:
    """How badly each candidate condition c explains each x0 (B, *shape): (B, K), least is best.

        error_c = mean over t of |x_0 - D(x_t, t, c)|² / mean over c of the same,

    the same x_t for all candidates, at `samples` times, the middles of equal pieces of the angle
    atan(sigma / alpha). Each level counts by its contrast, where weights of the likelihood would
    count fine noise, of which no class knows more. `samples K` calls on the whole batch.
    After Your Diffusion Model is Secretly a Zero-Shot Classifier, with relative weights.

    Args:
        candidates: conditions of the whole batch, such as `[{"label": tensor([k])}, …]` for one
            sample. Raises ValueError for fewer than two, or no samples.
    """
    if len(candidates) < 2 or samples < 1:
        raise ValueError(
            f"{len(candidates)} candidates and {samples} samples: give at least 2 and 1"
        )
    denoiser.check_input(x0)
    schedule, indices = denoiser.schedule, range(first_index, first_index + len(x0))
    total = torch.zeros(len(x0), len(candidates), dtype=torch.float64, device=x0.device)
    lowest, highest = (
        math.atan2(schedule.sigma(t).item(), schedule.alpha(t).item()) for t in (0.0, 1.0)
    )
    for k in range(samples):
        angle = lowest + (highest - lowest) * (k + 0.5) / samples
        t = schedule.time(-2 * math.log(math.tan(angle))).item()
        eps = noise.normal(seed, indices, k, x0.shape[1:], x0.dtype, stream=STREAM)
        x_t = schedule.add_noise(x0, t, eps.to(x0.device))
        gaps = [x0 - denoiser(x_t, t, **condition) for condition in candidates]
        errors = torch.stack([gap.double().square().flatten(1).sum(1) for gap in gaps], 1)
        total += errors / errors.mean(1, keepdim=True) / samples
    return total
