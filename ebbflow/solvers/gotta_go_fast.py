"""The adaptive solver of the reverse SDE of Gotta Go Fast, on a Brownian path that it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ebbflow.solvers.adaptive import Adaptive, Place, growth, norm, put, times
from ebbflow.solvers.brownian import BrownianPath
from ebbflow.solvers.stepping import Model, Point, Walk


@dataclass(frozen=True)
class GottaGoFast(Adaptive):
    """Euler-Maruyama against improved Euler with the same noise, on the reverse SDE.

        w = x alpha/sigma²,  s = alpha²/sigma²,  dw = D(x) ds + dB_s
        w_1 = w + D ds + dB,   w' = w + (D + D_1)/2 ds + dB,   D_1 = D(x_1)
        E = rms((x' - x_1) / max(absolute, tolerance max(|x_1|, |x_1 of the last step|)))

    In the signal-to-noise ratio as time the linear part is exact, the noise has rate 1, and
    alpha = 0 is w = 0. A step is taken, with x', when E <= 1; the next is longer by 0.9 E^-0.9.
    A refused increment of B is kept and split by a Brownian bridge, where the paper draws anew:
    noise that is drawn until E is small is no longer normal. Before sigma = 0, x is the
    prediction at sigma/alpha = absolute. Two evaluations an attempt, one when it is repeated.
    Gotta Go Fast When Generating Data with Score-Based Models, algorithm 1.
    """

    tolerance: float = 0.02
    absolute: float = 0.0078

    @property
    def stochastic(self) -> bool:
        return True

    def walk(self, model: Model, x: Tensor, walk: Walk) -> Iterator[Point]:
        schedule, every, draw = walk.schedule, torch.arange(len(x)), 0
        nodes = torch.tensor(walk.times, dtype=torch.float64)[:, None].expand(2, len(x))
        here, end = (Place.of_time(schedule, t) for t in nodes)
        quiet = not bool(end.sigma[0])
        limit = torch.full_like(end.angle, math.atan(self.absolute)) if quiet else end.angle
        path, before, clean, known = BrownianPath.like(x), x, x, every < 0
        length, on = (here.angle - limit) / 100, here.angle > limit
        while len(rows := every[on & (model.evaluations + 2 + quiet <= self.cap)]):
            draw += 1
            new = rows[~known[rows]]
            if len(new):
                clean, known = put(clean, new, model(x[new], here.time[new], new)), known | True
            now, state, first = here.at(rows), x[rows], clean[rows]
            aim = (now.angle - length[rows]).maximum(limit[rows])
            # s' - s without cancellation, for a short step.
            span = torch.sin(now.angle - aim) * torch.sin(now.angle + aim)
            span = span / (torch.sin(now.angle) * torch.sin(aim)) ** 2
            ds, db = path.next(rows, span, model.normal(state, draw, rows))
            s = (now.alpha / now.sigma) ** 2 + ds
            angle = torch.where(ds == span, aim, torch.atan(s.rsqrt()))
            there = Place.of_angle(schedule, angle)
            unit = there.sigma**2 / there.alpha
            low = times(unit, times(now.alpha / now.sigma**2, state) + times(ds, first) + db)
            rise = times(unit * ds / 2, model(low, there.time, rows) - first)
            scale = torch.maximum(low.abs(), times(there.level / now.level, before[rows]).abs())
            bound = times(there.level, torch.full_like(x[rows], self.absolute))
            error = norm(rise / torch.maximum(bound, self.tolerance * scale))
            taken, next_length = error <= 1, (now.angle - angle) * growth(error, 0.9)
            # A piece of the path that ended a step early says nothing against its length.
            early = taken & (ds < span)
            length[rows] = torch.where(early, next_length.maximum(now.angle - aim), next_length)
            moved, back = rows[taken], rows[~taken]
            path.keep(back, ds[~taken], db[~taken])
            x, before = put(x, moved, (low + rise)[taken]), put(before, moved, low[taken])
            here, known[moved] = here.put(moved, there.at(taken)), False
            on[moved] = angle[taken] > limit[moved] * (1 + 1e-12)
        done = every[~on]
        if quiet and len(done):
            clean = put(clean, done, model(x[done], here.time[done], done))
            x = put(x, done, clean[done])
        model.times = torch.where(on, here.time, nodes[1])
        yield Point(walk.times[1], x, clean)


REFERENCE = "Gotta Go Fast When Generating Data with Score-Based Models, algorithm 1"
gotta_go_fast = GottaGoFast("gotta-go-fast", 1, 1, REFERENCE)
