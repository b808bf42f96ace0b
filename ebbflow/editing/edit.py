"""`edit`: another condition on the noise of a given picture, in part or confined to a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow import grids, solvers
from ebbflow.denoiser import Denoiser, Frozen, Wrapper, convert
from ebbflow.inversion import Inversion, invert
from ebbflow.inversion.schemes import angles
from ebbflow.schedules import Schedule, TimeLike, along, as_time
from ebbflow.solvers import Levels, Solver


class Kept(Wrapper):
    """`D = mask D_inner + (1 - mask) clean`: outside of the mask the data are known.

    A solver that is exact for a constant prediction, from a state `alpha c + sigma e`, keeps e
    outside and returns `clean` there at sigma = 0. Prompts of one region, as in blended diffusion.

    mask: 1 where the inner denoiser rules, in [0, 1], broadcast against clean (B, *shape).
    """

    def __init__(self, inner: Denoiser, clean: Tensor, mask: Tensor) -> None:
        super().__init__(inner)
        self.clean, self.mask = clean, mask

    def passes(self, t: float) -> int:
        return self.net.passes(t)  # pyright: ignore

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        inner = self.net.at(t, x)  # pyright: ignore
        weights = convert("x0", target, self.schedule, as_time(t))
        a, b = (along(w, x).to(x.device, x.dtype) for w in weights)
        clean, mask = self.clean.to(x), self.mask.to(x)

        def kept(x: Tensor, **condition: Any) -> Tensor:
            return a * x + b * torch.lerp(clean, inner(x, **condition), mask)

        return kept


@dataclass(frozen=True, eq=False)
class Edit:
    """What `edit` returns.

    before, after (B, *shape); inversion: of `before`, or None where strength is 0; nfe: denoiser
    calls there and back.
    """

    before: Tensor
    after: Tensor
    inversion: Inversion | None
    nfe: int

    @property
    def difference(self) -> Tensor:
        return self.after - self.before


def edit(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    guided: Denoiser | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    method: str = "leapfrog",
    steps: int = 50,
    solver: str | Solver | None = "ddim",
) -> Edit:
    """x0 carried to noise under one condition and back under another.

    Args:
        x0: (B, *shape).
        source, target: conditions of the denoiser, such as `{"label": tensor([3])}`.
        guided: the denoiser of the way back, such as `ClassifierFree(denoiser, 2, …)`.
        strength: in [0, 1], the share of the way to noise, in angle; 0 returns x0.
        mask: 1 where x0 may change and 0 where it must not, broadcast against x0; where it is 0,
            `after` is x0 bit for bit.
        method: of the inversion, see `invert`.
        steps: each way.
        solver: of the way back, from the state alone. None goes back by the inversion's own plan,
            which returns x0 itself for target = source, but whose other registers remember the
            source; it takes no mask.

    Raises ValueError for a strength or a mask outside [0, 1], or a mask without a solver.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}: 0 changes nothing")
    if mask is not None:
        mask = torch.broadcast_to(torch.as_tensor(mask, dtype=x0.dtype, device=x0.device), x0.shape)
        if bool((mask < 0).any()) or bool((mask > 1).any()):
            raise ValueError(
                f"the mask spans {mask.min():g} to {mask.max():g}: give 1 where the picture may "
                "change, 0 where not"
            )
        if solver is None:
            raise ValueError("a mask needs a solver for the way back, such as solver='ddim'")
    if strength == 0:
        return Edit(x0, x0.clone(), None, 0)
    times = part(denoiser.schedule, steps, strength)
    found = invert(denoiser, x0, method=method, times=times, **source)
    back = denoiser if guided is None else guided
    if solver is None:
        after = found.reconstruct(back, **target)
        return Edit(x0, after, found, found.nfe + found.back.nfe)
    chosen = solvers.get(solver) if isinstance(solver, str) else solver
    if mask is not None:
        back = Kept(back, x0, mask)
    plan = chosen.plan(denoiser.schedule, times=found.times[::-1])
    with torch.no_grad():
        after = plan.run(back, found.x1, **target)
    if mask is not None:
        # The noise that a schedule leaves at t = 0 (VE) is left in the edited region only.
        after = torch.where(mask == 0, x0.to(after), after)
    return Edit(x0, after, found, found.nfe + plan.nfe)


def part(schedule: Schedule, steps: int, strength: float) -> tuple[float, ...]:
    """Increasing nodes of `steps` steps over this share of the angle, from t = 0."""
    if strength == 1:
        return grids.angle(schedule, steps)[::-1]
    first, last = (node.phi for node in angles(Levels.of(schedule, (0.0, 1.0))))
    share = torch.arange(1, grids.check_steps(steps) + 1, dtype=torch.float64) / steps
    ratios = torch.tan(first + strength * (last - first) * share)
    return (0.0, *schedule.time(-2 * torch.log(ratios)).tolist())
