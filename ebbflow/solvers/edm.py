"""The sampler of EDM: Heun's method in sigma/alpha, with optional churn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver, first_order


@dataclass(frozen=True)
class EDM(Solver):
    """Heun's method on `y = x/alpha` in `r = sigma/alpha`, after raising r by churn.

        r^ = r (1 + min(churn / steps, sqrt(2) - 1)),  X = (x/alpha + sqrt(r^² - r²) Z) alpha^
        y' = y^ + (r' - r^)/2 ((y^ - D)/r^ + (y_1 - D_1)/r'),  y_1 the Euler step to r'

    Two calls a step, order 2; a step from alpha = 0 or to sigma = 0 is the exact one for its first
    prediction, with one call. Churn applies for r in [churn_min, churn_max] and stops at the
    schedule's largest r; `noise_scale` multiplies Z (1 keeps the law).
    Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 2.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.churn < 0 or self.noise_scale < 0:
            raise ValueError(f"churn {self.churn} and noise_scale {self.noise_scale} must be >= 0")

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    @property
    def grid(self) -> Grid:
        return grids.karras

    def stages(self, levels: Levels) -> Iterator[Stage]:
        steps = len(levels.times) - 1
        r = [math.exp(-lambda_) for lambda_ in levels.lambda_]
        top = math.exp(-levels.schedule.log_snr(1.0).item() / 2)
        for k in range(steps):
            t, s, query, r_hat, alpha_hat = (
                levels.times[k],
                levels.times[k + 1],
                {"x0": 1.0},
                *((r[k], levels.alpha[k])),
            )
            inside = self.churn_min <= r[k] <= self.churn_max and 0 < r[k] < math.inf
            gamma = min(self.churn / steps, math.sqrt(2) - 1) if inside else 0.0
            if gamma and r[k] < top:
                r_hat = min(r[k] * (1 + gamma), top)
                t = levels.time(r_hat) if r_hat < top else 1.0
                alpha_hat = levels.schedule.alpha(t).item()
                noise = self.noise_scale * alpha_hat * math.sqrt(r_hat**2 - r[k] ** 2)
                query = {"x0": alpha_hat / levels.alpha[k], "Z": noise}
            if not levels.sigma[k + 1] or not alpha_hat or not levels.sigma[k]:
                a, b = first_order(levels, k)
                exact = {"D": levels.alpha[k + 1]} if not levels.sigma[k + 1] else {"X": a, "D": b}
                yield Stage(t, query, (exact, {}), s)
                continue
            alpha_s, half = levels.alpha[k + 1], (r[k + 1] - r_hat) / 2
            part = {"X": alpha_s / alpha_hat * (1 + half / r_hat), "D": -alpha_s * half / r_hat}
            ratio = r[k + 1] / r_hat
            euler = {"X": alpha_s / alpha_hat * ratio, "D": alpha_s * (1 - ratio)}
            yield Stage(t, query, (part, euler))
            slope = half / r[k + 1]
            yield Stage(s, {"x1": 1.0}, ({"x0": 1.0, "X": slope, "D": -alpha_s * slope}, {}), s)


REFERENCE = "Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 2"
edm = EDM("edm", 2, 2, REFERENCE)
edm_churn = EDM("edm-churn", 2, 2, REFERENCE, churn=10.0)
