"""The straight path: any process is a linear flow in `y = x/(alpha + sigma)`.

`y = (1 - tau) x_0 + tau eps` with `tau = sigma/(alpha + sigma)`, which runs from 0 (data) to 1.
"""

from __future__ import annotations

import torch

from ebbflow import grids
from ebbflow.schedules import Schedule


def span(schedule: Schedule) -> tuple[float, float]:
    """tau at the ends of a schedule, noise first."""
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    high, low = (sigma / (alpha + sigma)).tolist()
    return high, low


def straight(schedule: Schedule, steps: int) -> grids.Times:
    """Nodes uniform in tau."""
    high, low = span(schedule)
    tau = high + (low - high) * torch.arange(1, grids.check_steps(steps)).double() / steps
    return (1.0, *schedule.time(2 * torch.log((1 - tau) / tau)).tolist(), 0.0)
