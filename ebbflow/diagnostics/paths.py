"""How straight the paths of sampling are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation import odeint
from ebbflow.likelihood.angle import AngleFlow, per_sample


@dataclass(frozen=True)
class Paths:
    """Figures of each path (n,), in `z = x / (alpha + sigma)` over `s = sigma / (alpha + sigma)`.

    Args:
        straightness: `∫ |dz/ds - (z_1 - z_0)|² ds / |z_1 - z_0|²`: 0 for a straight path at an even
            pace, which one Euler step solves.
        length: of the path over the distance of its ends, at least 1.
        turning: radians by which the direction turns on the way, 0 for a straight path at any pace.
        curvature: (n, m) the turning rate `|d direction / ds|` at the middle of m pieces of s.
        shares: (m,) those s.
    """

    straightness: Tensor
    length: Tensor
    turning: Tensor
    curvature: Tensor
    shares: Tensor


@torch.no_grad()
def paths(
    flow: AngleFlow,
    x1: Tensor,
    condition: Mapping[str, Any],
    pieces: int = 32,
    rtol: float = 1e-4,
) -> Paths:
    """Paths from x1 (n, *shape), standard normal noise, to data.

    In these coordinates every schedule is the one of rectified flow, `z = (1 - s) x_0 + s eps`.
    Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, equation 5.
    """
    begin, stop = (torch.tensor(a).double() for a in (flow.last, flow.first))
    s = [torch.sin(a) / (torch.sin(a) + torch.cos(a)) for a in (begin, stop)]
    grid = torch.lerp(s[0], s[1], torch.linspace(0, 1, pieces + 1, dtype=torch.float64))
    angles = torch.atan2(grid, 1 - grid)
    angles[0], angles[-1] = flow.last, flow.first
    batch = len(x1)

    def field(angle: Tensor, u: Tensor, rows: Tensor) -> Tensor:
        return flow(angle.reshape(-1), u, per_sample(condition, batch, rows))

    us = odeint(
        field, x1.double(), angles, rtol=rtol, atol=rtol, batch_dims=1, compact=True
    )  # (m + 1, n, *shape)
    slopes = []
    for angle, u in zip(angles, us, strict=True):
        v = flow(angle.expand(batch), u, condition)
        sine, cosine = torch.sin(angle), torch.cos(angle)
        slopes.append((sine - cosine) * u + (sine + cosine) * v)
    slope = torch.stack(slopes).flatten(2)
    scale = (torch.sin(angles) + torch.cos(angles)).to(us.device)
    z = us.flatten(2) / scale[:, None, None]
    chord = (z[0] - z[-1]) / (grid[0] - grid[-1])
    apart = (slope - chord).square().sum(2)
    step = (grid[0] - grid[-1]) / pieces
    ends = torch.ones(pieces + 1, dtype=torch.float64)
    ends[0] = ends[-1] = 0.5
    weights = (step * ends / (grid[0] - grid[-1])).to(us.device)
    straightness = weights @ apart / chord.square().sum(1)
    length = weights @ slope.norm(dim=2) / chord.norm(dim=1)
    direction = slope / slope.norm(dim=2, keepdim=True)
    # 2 asin(|a - b| / 2) keeps small angles that a cosine rounds away.
    turn = 2 * torch.asin(((direction[1:] - direction[:-1]).norm(dim=2) / 2).clamp(max=1.0))
    return Paths(
        straightness.cpu(),
        length.cpu(),
        turn.sum(0).cpu(),
        (turn / step).T.cpu(),
        (grid[1:] + grid[:-1]) / 2,
    )
