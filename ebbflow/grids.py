"""Grids of times: n + 1 strictly monotone nodes make n steps, from noise (1) to data (0).

Every function here returns float64 times as a tuple of Python floats; ends are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ebbflow.schedules import Schedule

Times = tuple[float, ...]


def given(times: Sequence[float] | Tensor) -> Times:
    """The caller's own nodes, bit for bit.

    Raises ValueError for fewer than two nodes, values outside [0, 1], or nodes that are not
    strictly monotone, naming the index.
    """
    values = tuple(float(t) for t in times)
    if len(values) < 2:
        raise ValueError(f"times has {len(values)} node(s): a step needs two")
    for i, t in enumerate(values):
        if not 0 <= t <= 1:
            raise ValueError(f"times[{i}] = {t:g} lies outside [0, 1]; 0 is data and 1 is noise")
    falling = values[1] < values[0]
    for i, (t, s) in enumerate(pairwise(values)):
        if t == s or (s < t) != falling:
            raise ValueError(
                f"times[{i + 1}] = {s:g} after times[{i}] = {t:g}: nodes must be strictly "
                + ("decreasing" if falling else "increasing")
            )
    return values


def check_steps(steps: int) -> int:
    """`steps` itself; raises ValueError unless it is a positive integer."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    return steps


def uniform(schedule: Schedule, steps: int) -> Times:
    """Uniform in t."""
    return tuple(1 - i / steps for i in range(check_steps(steps) + 1))


def angle(schedule: Schedule, steps: int) -> Times:
    """Uniform in the angle atan(sigma / alpha), which is finite at both ends of any schedule.

    Its density in log(sigma/alpha) is that of a curve between data and noise of equal variance,
    where a denoiser of unit-variance data changes most; for `Cosine` it is uniform in t.
    """
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    high, low = torch.atan2(schedule.sigma(ends), schedule.alpha(ends)).tolist()
    share = torch.arange(1, check_steps(steps), dtype=torch.float64) / steps
    inner = schedule.time(-2 * torch.log(torch.tan(high + (low - high) * share)))
    return (1.0, *inner.tolist(), 0.0)


def log_snr(
    schedule: Schedule, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Times:
    """Uniform in log-SNR between sigma/alpha = sigma_max and sigma_min, where the schedule reaches
    them; then on to its own end if that has no noise."""
    return _ratios(schedule, steps, sigma_min, sigma_max, math.log, math.exp)


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Times:
    """Uniform in (sigma/alpha)^(1/rho).

    Elucidating the Design Space of Diffusion-Based Generative Models, equation 5.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    return _ratios(
        schedule, steps, sigma_min, sigma_max, lambda x: x ** (1 / rho), lambda x: x**rho
    )


def shifted(schedule: Schedule, steps: int, shift: float = 3.0) -> Times:
    """Uniform in t, then `t -> shift t / (1 + (shift - 1) t)`; shift > 1 spends more on noise.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, equation 23.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return tuple(shift * t / (1 + (shift - 1) * t) for t in uniform(schedule, steps))


def _ratios(schedule, steps, sigma_min, sigma_max, forward, backward) -> Times:
    """Nodes uniform in forward(sigma/alpha), with the schedule's ends kept exact."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    check_steps(steps)
    noisy, clean = schedule.log_snr(1.0).item(), schedule.log_snr(0.0).item()
    # A first or last step from or to an infinite log-SNR lies outside the formula's range.
    before = 1 if math.isinf(noisy) else 0
    after = 1 if math.isinf(clean) else 0
    inside = steps - before - after
    if inside < 1:
        return uniform(schedule, steps)
    high = sigma_max if before else math.exp(-noisy / 2)
    low = sigma_min if after else math.exp(-clean / 2)
    ends = forward(high), forward(low)
    ratios = [backward(ends[0] + (ends[1] - ends[0]) * i / inside) for i in range(inside + 1)]
    times = schedule.time(-2 * torch.log(torch.tensor(ratios, dtype=torch.float64))).tolist()
    times = times if before else [1.0, *times[1:]]
    times = times if after else [*times[:-1], 0.0]
    return given([1.0] * before + times + [0.0] * after)
