"""The adaptive solver of the reverse SDE of Gotta Go Fast, on a Brownian path that it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ebbflow.schedules import along
from ebbflow.solvers.adaptive import Adaptive, Place, Run, put
from ebbflow.solvers.brownian import BrownianPath, improved_euler
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
        every, path, before, draw = torch.arange(len(x)), BrownianPath.like(x), x, 0
        nodes = torch.tensor(walk.times, dtype=torch.float64)[:, None].expand(2, len(x))
        start, end = (Place.of_time(walk.schedule, t) for t in nodes)
        quiet = not bool(end.sigma[0])
        limit = end.angle.clamp(min=math.atan(self.absolute)) if quiet else end.angle
        run = Run(x, x, start, (limit - start.angle) / 100, every >= 0)
        on = start.angle > limit
        while len(rows := every[on & (model.evaluations + 2 + quiet <= self.cap)]):
            run, draw = run.informed(model, rows), draw + 1
            aim = (run.place.angle + run.length)[rows].maximum(limit[rows])
            tried = improved_euler(model, rows, run, aim, path, draw)
            taken, length = tried.judged(before[rows], self.absolute, self.tolerance)
            run = run.after(rows, tried.attempt, tried.there, taken, length)
            before = put(before, rows[taken], tried.low[taken])
            path.keep(rows[~taken], tried.span[~taken], tried.increment[~taken])
            on = run.place.angle > limit * (1 + 1e-12)
        run = run.informed(model, every[~on]) if quiet else run
        x = torch.where(along(~on, x).to(x.device), run.clean, run.x) if quiet else run.x
        model.times = torch.where(on, run.place.time, nodes[1])
        yield Point(walk.times[1], x, run.clean)


gotta_go_fast = GottaGoFast("gotta-go-fast", 1, 1, "Gotta Go Fast When Generating Data with …")
