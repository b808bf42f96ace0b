"""Fixed-point inversion of DDIM's steps, and its averaged form, ReNoise, as plans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ebbflow.inversion.schemes import angles
from ebbflow.plan import Plan, Stage
from ebbflow.schedules import Schedule
from ebbflow.solvers import Levels
from ebbflow.solvers.base import combination


@dataclass(frozen=True)
class FixedPoint:
    """The x_t from which DDIM's step returns x_s, by iterating on the prediction at x_t itself.

        x_t <- (r_t / r_s) x_s / cos(h) + r_t tan(h) v(x_t, t),    h = phi_t - phi_s,

    which is DDIM's step `x̂_s = cos(h) x̂_t - sin(h) v(x_t, t)` solved for the first x_t. It starts
    at the scaled x_s. `calls` of the denoiser a step; the error falls as (tan(h) |dv/dx̂|)^calls, a
    factor below 1 where the denoiser contracts and t is not the first node after sigma = 0. v is
    frozen where the papers freeze eps, because it is finite at alpha = 0; the fixed point is one.

    average: with (first, last), the step is made from the mean of v over these calls (from 1) in
    place of the last: ReNoise: Real Image Inversion Through Iterative Noising, section 3.2, without
    its noise regularisation. A converged mean is the fixed point, too.
    """

    name: str
    calls: int
    average: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        first, last = self.average or (self.calls, self.calls)
        if not 1 <= first <= last <= self.calls:
            raise ValueError(
                f"calls {self.calls} and average {self.average}: need 1 <= first <= last <= calls"
            )

    def plan(
        self, schedule: Schedule, *, times: tuple[float, ...], statistics: object = None
    ) -> Plan:
        """The plan through increasing nodes; registers: the state, x_s, the sum of v."""
        nodes = Levels.of(schedule, times)
        origin = {"solver": self.name, "calls": self.calls}
        return Plan(schedule, times[0], tuple(self.stages(nodes)), origin)

    def stages(self, levels: Levels) -> Iterator[Stage]:
        first, last = self.average or (self.calls, self.calls)
        for s, t in pairwise(angles(levels)):
            turn, scale = t.phi - s.phi, t.r / s.r
            v = t.v({"X": 1.0})
            for call in range(1, last + 1):
                x_s = {"x0": 1.0} if call == 1 else {"x1": 1.0}
                query = {"x0": scale} if call == 1 else {"x0": 1.0}
                kept = combination((scale / math.cos(turn), x_s))
                total = v if call <= first else combination((1.0, {"x2": 1.0}), (1.0, v))
                here = v
                if call == last:
                    here = combination((1 / (last - first + 1), total))
                row = combination((1.0, kept), (t.r * math.tan(turn), here))
                held = call >= first and call < last
                end = call == last
                memory = ({} if end else x_s, total if held else {})
                yield Stage(t.time, query, (row, *memory), t.time if end else None)
