"""The probability flow in the angle, and the prior at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.schedules import along
from ebbflow.solvers.stepping import cut
from ebbflow.statistics import Statistics

SIGNAL_LEFT = 1e-3
"""The angle before pi/2 at which a prediction that is 0/0 without signal is left."""


@dataclass(frozen=True)
class AngleFlow:
    """`du/dangle = E[cos eps - sin x_0 | u]` with `u = x_t / hypot(alpha, sigma)`.

    The angle is `atan(sigma / alpha)`: 0 is data, pi/2 noise, whatever the schedule, and the field
    is smooth at both. Below the angle `first` the field is extended as that of a smooth density,
    in proportion to the angle, so that a flow from 0 starts at the data themselves; the error in
    log p is of the order `first⁴ / variance²` a coordinate. `last` is the angle of the noise end.

    Args:
        denoiser: on any schedule.
        dtype: in which it is evaluated; u and the angle are float64.
        first: sigma/alpha below which the denoiser is not asked; no smaller than the schedule's.
        end: the time of the noise end.
        size: number of coordinates.
    """

    denoiser: Denoiser
    dtype: torch.dtype
    first: float
    last: float
    end: float
    size: int

    @staticmethod
    def of(denoiser: Denoiser, x0: Tensor, floor: float, end: float) -> AngleFlow:
        """The flow for samples like x0; raises ValueError for arguments out of range."""
        schedule = denoiser.schedule
        if not 0 < floor < 1:
            raise ValueError(f"floor is a sigma/alpha in (0, 1), such as 1e-3, got {floor}")
        if not 0 < end <= 1:
            raise ValueError(f"end is a time in (0, 1], 1 is noise, got {end}")
        lowest = math.atan2(schedule.sigma(0.0).item(), schedule.alpha(0.0).item())
        first = max(lowest, math.atan(floor))
        last = math.atan2(schedule.sigma(end).item(), schedule.alpha(end).item())
        if schedule.alpha(end).item() == 0:
            try:
                denoiser.at(torch.full((1,), end, dtype=torch.float64), x0[:1], "v")
            except ValueError:  # 0/0 there, as of a noise prediction
                last = math.pi / 2 - SIGNAL_LEFT
                end = schedule.time(-2 * math.log(math.tan(last))).item()
        if first >= last:
            raise ValueError(f"end = {end} lies at an angle of {last:g}, below that of the floor")
        dtype = torch.promote_types(x0.dtype, torch.float32)
        return AngleFlow(denoiser, dtype, first, last, end, x0[0].numel())

    def time(self, angle: Tensor) -> Tensor:
        """The time of each angle, float64."""
        angle = angle.double().clamp(self.first, self.last)
        inside = torch.where(angle < self.last, angle, self.first)
        t = self.denoiser.schedule.time(-2 * torch.log(torch.tan(inside)))
        return torch.where(angle < self.last, t, torch.full_like(t, self.end))

    def __call__(self, angle: Tensor, u: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """The slope (n, *shape) at angles (n,) and states u (n, *shape)."""
        angle = angle.detach()
        t = self.time(angle.cpu())
        schedule = self.denoiser.schedule
        level = along(torch.hypot(schedule.alpha(t), schedule.sigma(t)), u).to(u.device)
        x = (level * u).to(self.dtype)
        v = self.denoiser.at(t, x, "v")(x, **condition)
        share = along((angle / self.first).clamp(max=1.0), u).to(u.dtype)
        return share * v.to(u.dtype) / level


def per_sample(condition: Mapping[str, Any], batch: int, rows: Tensor) -> dict[str, Any]:
    """The condition of some samples: tensors whose first axis is the batch are sliced."""
    return {name: cut(value, rows, batch) for name, value in condition.items()}


def log_prior(
    flow: AngleFlow, u: Tensor, condition: Mapping[str, Any], angle: float | None = None
) -> Tensor:
    """Log-density (B,) at the noise end: of the data's own Gaussian where it is known.

    `N(cos m, cos² C + sin²)` with the statistics of the condition, else `N(0, sin²)`.
    """
    cosine, sine = _levels(flow, angle)
    out = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for rows, statistics in _laws(flow.denoiser, len(u), condition):
        value = _gaussian(u[rows.to(u.device)], statistics, cosine, sine)
        out = out.index_copy(0, rows.to(u.device), value.to(u.device))
    return out


def prior_precision(
    flow: AngleFlow, angle: float, batch: int, condition: Mapping[str, Any]
) -> Tensor:
    """The trace of the prior's inverse covariance for each sample, (B,)."""
    cosine, sine = _levels(flow, angle)
    out = torch.zeros(batch, dtype=torch.float64)
    for rows, statistics in _laws(flow.denoiser, batch, condition):
        if statistics is None:
            out[rows] = flow.size / sine**2
        else:
            left = (flow.size - statistics.variance.numel()) / (
                cosine**2 * statistics.residual + sine**2
            )
            out[rows] = left + (1 / (cosine**2 * statistics.variance + sine**2)).sum()
    return out


def _levels(flow: AngleFlow, angle: float | None) -> tuple[float, float]:
    if angle is None and flow.denoiser.schedule.alpha(flow.end).item() == 0:
        return 0.0, 1.0
    angle = flow.last if angle is None else angle
    return math.cos(angle), math.sin(angle)


def _laws(
    denoiser: Denoiser, batch: int, condition: Mapping[str, Any]
) -> list[tuple[Tensor, Statistics | None]]:
    """The statistics of each label, with the samples that have it."""
    every = torch.arange(batch)
    statistics, label = denoiser.statistics, condition.get("label")
    if statistics is None or label is None or not statistics.classes:
        return [(every, statistics)]
    labels = torch.as_tensor(label).cpu()
    if labels.is_floating_point():  # weights of classes, whose mixture has no one Gaussian
        return [(every, None)]
    labels = labels.expand(batch)
    return [(every[labels == c], statistics.given(label=c)) for c in labels.unique()]


def _gaussian(u: Tensor, statistics: Statistics | None, alpha: float, sigma: float) -> Tensor:
    d = u[0].numel()
    if statistics is None:
        squares = (u / sigma).square().flatten(1).sum(1)
        return -0.5 * (squares + d * math.log(2 * math.pi * sigma**2))
    centred = u.cpu() - alpha * statistics.mean
    squares = statistics.scale(centred, alpha, sigma, -0.5).square().flatten(1).sum(1)
    total = torch.log(alpha**2 * statistics.variance + sigma**2).sum().item()
    left = d - statistics.variance.numel()
    total += left * math.log(alpha**2 * statistics.residual + sigma**2)
    return -0.5 * (squares + total + d * math.log(2 * math.pi))
