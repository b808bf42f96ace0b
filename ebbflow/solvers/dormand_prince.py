"""Dormand and Prince's pair of orders 5 and 4 on the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ebbflow.solvers.adaptive import Attempt, Pair, Place, times
from ebbflow.solvers.stepping import Model

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class DormandPrince(Pair):
    """Runge-Kutta 5(4) on `dy/dtheta = (alpha E[eps | x] - sigma E[x_0 | x]) / r`, y = x/r.

    `theta = atan(sigma/alpha)` and `r = hypot(alpha, sigma)`: for variance-preserving schedules
    the right side is the v-prediction. It is regular at alpha = 0; a step to sigma = 0 takes
    `open_step`. Six evaluations an attempt, the last of which begins the next step.
    A family of embedded Runge-Kutta formulae, table 2.
    """

    weaker: ClassVar[int] = 4
    cost: ClassVar[int] = 7

    def attempt(
        self, model: Model, rows: Tensor, x: Tensor, clean: Tensor, here: Place, there: Place
    ) -> Attempt:
        h, y, query, place = there.angle - here.angle, times(1 / here.level, x), x, here
        slopes = []
        for node, weights in zip((*NODES, None), (*WEIGHTS, ()), strict=True):
            eps = times(1 / place.sigma, query - times(place.alpha, clean))
            v = times(place.alpha / place.level, eps) - times(place.sigma / place.level, clean)
            slopes.append(times(h, v))
            if node is None:
                break
            place = there if node == 1 else Place.of_angle(model.schedule, here.angle + node * h)
            rise = sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
            query = times(place.level, y + rise)
            clean = model(query, place.time, rows)
        error = sum(w * k for w, k in zip(ERROR, slopes, strict=True) if w)
        return Attempt(query, times(there.level, torch.as_tensor(error)), clean)


dormand_prince = DormandPrince("dormand-prince", 5, 5, "A family of embedded Runge-Kutta formulae")
