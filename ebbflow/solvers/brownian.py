"""Steps of the reverse SDE along Brownian paths that remember what was drawn and not used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebbflow.schedules import along
from ebbflow.solvers.adaptive import Attempt, Place, Run, growth, norm, put, times
from ebbflow.solvers.stepping import Model


@dataclass
class BrownianPath:
    """One path of rate 1 a sample; what a refused step had drawn of it is not drawn again.

    spans (depth, B): lengths of the kept pieces, the next on top; increments (depth, B, *shape):
    over these lengths; height (B,): how many are kept.
    """

    spans: Tensor
    increments: Tensor
    height: Tensor

    @staticmethod
    def like(x: Tensor) -> BrownianPath:
        empty = torch.zeros(0, len(x), dtype=torch.float64)
        height = torch.zeros(len(x), dtype=torch.int64)
        return BrownianPath(empty, x.new_zeros(0, *x.shape), height)

    def next(self, rows: Tensor, span: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """The next piece of each of `rows`, of length `span` or less: (length, increment).

        A fresh piece is `sqrt(span) normal`. A kept piece W of a length T <= span comes whole; of a
        longer one comes the first part, `(s/T) W + sqrt(s (T - s)/T) normal` for s = span, and the
        rest stays: a Brownian bridge.
        """
        kept = self.height[rows] > 0
        fresh = along(span.sqrt(), normal).to(normal) * normal
        if not bool(kept.any()):
            return span, fresh
        top = (self.height[rows] - 1).clamp(min=0)
        whole, increment = self.spans[top, rows], self.increments[top, rows]
        part = torch.minimum(span, whole)
        share = part / whole
        spread = (part * (1 - share)).clamp(min=0).sqrt()
        bridge = along(share, normal).to(normal) * increment
        bridge = torch.where(
            along(share == 1, normal).to(normal.device),
            increment,
            bridge + along(spread, normal).to(normal) * normal,
        )
        split = kept & (share < 1)
        self.spans = self.spans.index_put((top[split], rows[split]), (whole - part)[split])
        self.increments = self.increments.index_put(
            (top[split], rows[split]), (increment - bridge)[split]
        )
        self.height = put(self.height, rows, self.height[rows] - (kept & ~split).long())
        length = torch.where(kept, part, span)
        return length, torch.where(along(kept, normal).to(normal.device), bridge, fresh)

    def keep(self, rows: Tensor, span: Tensor, increment: Tensor) -> None:
        """Put pieces back, which come next."""
        height = self.height[rows]
        if len(rows) and int(height.max()) == len(self.spans):
            level = self.spans.new_zeros(1, len(self.height))
            self.spans = torch.cat([self.spans, level])
            level = self.increments.new_zeros(1, *self.increments.shape[1:])
            self.increments = torch.cat([self.increments, level])
        self.spans = self.spans.index_put((height, rows), span)
        self.increments = self.increments.index_put((height, rows), increment)
        self.height = put(self.height, rows, height + 1)


def snr_between(angle: Tensor, aim: Tensor) -> Tensor:
    """cot²(aim) - cot²(angle), what alpha²/sigma² grows by, without cancellation."""
    product = torch.sin(angle - aim) * torch.sin(angle + aim)
    return product / (torch.sin(angle) * torch.sin(aim)) ** 2


class Trial(NamedTuple):
    """Where a step came: Euler-Maruyama's state, what improved Euler adds to it, and its noise."""

    here: Place
    aim: Tensor
    there: Place
    low: Tensor
    rise: Tensor
    span: Tensor
    increment: Tensor

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.low + self.rise, self.rise)

    def judged(self, before: Tensor, absolute: float, relative: float) -> tuple[Tensor, Tensor]:
        """Whether the step is taken, and the next one's length; `before` is the last low."""
        scale = torch.maximum(
            self.low.abs(), times(self.there.level / self.here.level, before).abs()
        )
        bound = times(self.there.level, torch.full_like(scale, absolute))
        error = norm(self.rise / torch.maximum(bound, relative * scale))
        length = (self.there.angle - self.here.angle) * growth(error, 0.9)
        # A piece of the path that ended a step early says nothing against its length.
        early = (error <= 1) & (self.there.angle > self.aim)
        wanted = self.aim - self.here.angle  # negative, as every step towards data is
        return error <= 1, torch.where(early, length.minimum(wanted), length)


def improved_euler(
    model: Model, rows: Tensor, run: Run, aim: Tensor, path: BrownianPath, draw: int
) -> Trial:
    """A step of `dw = D ds + dB` towards the angle `aim`, as far as the path's next piece.

    w = x alpha/sigma², s = alpha²/sigma².
    """
    here, clean = run.place.at(rows), run.clean[rows]
    span = snr_between(here.angle, aim)
    ds, db = path.next(rows, span, model.normal(clean, draw, rows))
    s = (here.alpha / here.sigma) ** 2 + ds
    angle = torch.where(ds == span, aim, torch.atan(s.rsqrt()))
    there = Place.of_angle(model.schedule, angle)
    unit = there.sigma**2 / there.alpha
    w = times(here.alpha / here.sigma**2, run.x[rows]) + times(ds, clean) + db
    low = times(unit, w)
    rise = times(unit * ds / 2, model(low, there.time, rows) - clean)
    return Trial(here, aim, there, low, rise, ds, db)
