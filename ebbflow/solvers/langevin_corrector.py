"""Predictor-corrector sampling: an ancestral step, then Langevin steps at the new noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ebbflow import grids
from ebbflow.schedules import Schedule
from ebbflow.solvers.adaptive import norm, times
from ebbflow.solvers.stepping import Model, Stepping, Walk, ancestral, levels


@dataclass(frozen=True)
class LangevinCorrector(Stepping):
    """Ancestral predictor, then `corrections` Langevin steps of a given signal-to-noise ratio.

        x' = (sigma'/sigma) e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) Z
        x' <- x' + e g + sqrt(2 e) Z,   g = score(x', s),   e = 2 (r |Z| / |g|)²

    h is the step in log(alpha/sigma), and `r² = snr² min(1, h)`: for steps of h >= 1 the
    paper's; for shorter ones smaller, for a Langevin step of fixed length has a law of its own and
    would leave its error however many steps are made. |Z| and |g| are norms of each sample; the
    paper takes their means over the batch, so that its samples depend on their neighbours.
    At sigma = 0 x is the prediction. 1 + corrections evaluations a step. Weak order 1.
    Score-Based Generative Modeling through Stochastic Differential Equations, algorithms 2 to 5.
    """

    snr: float = 0.16
    corrections: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.snr < math.inf or self.corrections < 0 or self.corrections % 1:
            raise ValueError(f"snr {self.snr}, corrections {self.corrections}: need at least 0")

    @property
    def stochastic(self) -> bool:
        return True

    def calls(self, schedule: Schedule, times: grids.Times) -> int:
        return sum(1 + self.corrections * bool(schedule.sigma(s)) for s in times[1:])

    def initial(self, model: Model, x: Tensor, walk: Walk) -> int:
        return 1

    def step(self, model: Model, x: Tensor, t: float, s: float, state: int) -> Any:
        (alpha_s, sigma_s), clean = levels(model.schedule, s), model(x, t)
        if not sigma_s:
            return clean, clean, state
        x = ancestral(model.schedule, x, clean, t, s, model.normal(x, state))
        h = (model.schedule.log_snr(s) - model.schedule.log_snr(t)).item() / 2
        for draw in range(state + 1, state + 1 + self.corrections):
            score, z = (alpha_s * model(x, s) - x) / sigma_s**2, model.normal(x, draw)
            length = 2 * min(1.0, h) * (self.snr * norm(z) / norm(score)) ** 2
            x = x + times(length, score) + times((2 * length).sqrt(), z)
        return x, clean, state + 1 + self.corrections


REFERENCE = "Score-Based Generative Modeling through …, algorithms 2 to 5"
langevin_corrector = LangevinCorrector("langevin-corrector", 1, 1, REFERENCE)
