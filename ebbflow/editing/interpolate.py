"""Interpolation between data through the noise that makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebbflow import solvers
from ebbflow.denoiser import Denoiser
from ebbflow.inversion import invert
from ebbflow.solvers import Solver


def spherical(one: Tensor, two: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Weights (a, b), of shape (B, 1, …), of the great circle from one to two, each (B, *shape).

    `a = sin((1 - share) theta) / sin(theta)`, `b = sin(share theta) / sin(theta)` with theta the
    angle between them: two independent draws of the schedule's prior have a mean of its own
    variance, where a straight line has half of it. Parallel latents are joined by a line.
    Animating Rotation with Quaternion Curves, for vectors of any length.
    """
    flat = [x.double().flatten(1) for x in (one, two)]
    norms = flat[0].norm(dim=1) * flat[1].norm(dim=1)
    theta = torch.acos(((flat[0] * flat[1]).sum(1) / norms).clamp(-1, 1))
    sine = torch.sin(theta)
    straight = sine < 1e-6
    safe = torch.where(straight, torch.ones_like(sine), sine)
    shape = (-1, *[1] * (one.ndim - 1))
    return (
        torch.where(straight, 1 - share, torch.sin((1 - share) * theta) / safe).reshape(shape),
        torch.where(straight, share, torch.sin(share * theta) / safe).reshape(shape),
    )


def interpolate(
    denoiser: Denoiser,
    one: Tensor,
    two: Tensor,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    method: str = "leapfrog",
    steps: int = 50,
    solver: str | Solver | None = None,
    **condition: Any,
) -> list[Tensor]:
    """Data between `one` and `two` (B, *shape), one tensor a share in [0, 1].

    The latents lie on the great circle between those of the ends (`spherical`). With solver=None
    all registers of an exact method are mixed alike and the ends come back exactly; a solver takes
    the state alone. condition: of both ends, and of everything between.
    """
    if any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares must lie in [0, 1], got {list(shares)}: 0 is the first picture")
    ends = [invert(denoiser, x, method=method, steps=steps, **condition) for x in (one, two)]
    back: Any = ends[0].back
    if solver is not None:
        chosen = solvers.get(solver) if isinstance(solver, str) else solver
        back = chosen.plan(denoiser.schedule, times=ends[0].times[::-1])
    out = []
    for share in shares:
        a, b = spherical(ends[0].x1, ends[1].x1, share)
        pairs = zip(ends[0].latents, ends[1].latents, strict=True)
        mixed = tuple(a.to(x) * x + b.to(y) * y for x, y in pairs)
        if solver is None:
            out.append(ends[0].decode(mixed))
        else:
            with torch.no_grad():
                out.append(back.run(denoiser, mixed[0], **condition))
    return out
