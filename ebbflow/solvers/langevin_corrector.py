"""Predictor-corrector sampling: an ancestral step, then Langevin steps at the new noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ebbflow import grids
from ebbflow.schedules import Schedule, along
from ebbflow.solvers.adaptive import norm
from ebbflow.solvers.stepping import Model, Stepping, Walk, levels


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
            raise ValueError(
                f"snr must be at least 0 and corrections an integer of at least 0, got {self.snr} "
                f"and {self.corrections}"
            )

    @property
    def stochastic(self) -> bool:
        return True

    def calls(self, schedule: Schedule, times: grids.Times) -> int:
        quiet = not schedule.sigma(times[-1]).item()
        return (len(times) - 1) * (1 + self.corrections) - quiet * self.corrections

    def initial(self, model: Model, x: Tensor, walk: Walk) -> int:
        return 1

    def step(
        self, model: Model, x: Tensor, t: float, s: float, state: int
    ) -> tuple[Tensor, Tensor, int]:
        (alpha, sigma), (alpha_s, sigma_s) = levels(model.schedule, t), levels(model.schedule, s)
        clean = model(x, t)
        if not sigma_s:
            return clean, clean, state
        kept = alpha * sigma_s / (alpha_s * sigma)
        x = kept * sigma_s / sigma * x + alpha_s * (1 - kept**2) * clean
        x = x + sigma_s * math.sqrt(1 - kept**2) * model.normal(x, state)
        ratio = self.snr * math.sqrt(min(1.0, -math.log(kept) if kept else 1.0))
        for i in range(self.corrections):
            score = (alpha_s * model(x, s) - x) / sigma_s**2
            z = model.normal(x, state + 1 + i)
            length = 2 * (ratio * norm(z) / norm(score)) ** 2
            x = x + _times(length, score) + _times((2 * length).sqrt(), z)
        return x, clean, state + 1 + self.corrections


def _times(values: Tensor, x: Tensor) -> Tensor:
    return along(values, x).to(x.device, x.dtype) * x


langevin_corrector = LangevinCorrector(
    "langevin-corrector", 1, 1, "Score-Based Generative Modeling through …, algorithms 2 to 5"
)
