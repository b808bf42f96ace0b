"""Exponential multistep methods in the data prediction: the DPM-Solver++ family.

In `lambda = log(alpha/sigma)`, with h the step and `rate = 1 + tau²` (tau = 0 the ODE, 1 the SDE),

    x' = (sigma'/sigma) e^{-tau² h} x + alpha' ∫_0^h rate e^{rate (u - h)} D(lambda + u) du
         + sigma' sqrt(1 - e^{-2 tau² h}) Z

is exact; a method is a rule for D between its known values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver
from ebbflow.solvers.interpolation import Rule, midpoint, polynomial


@dataclass(frozen=True)
class Multistep(Solver):
    """An exponential multistep method over `history` predictions, one call a step.

    The first steps use the predictions that there are. With `corrected_start`, step 2 also redoes
    step 1 with the prediction that has arrived meanwhile, which costs nothing and lifts the order
    of a third-order rule from 2 to 3. A step to sigma = 0 is of first order.
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, algorithms 2
    (2M) and appendix (SDE-2M); the third-order rule is the exact integral, where the published code
    halves one coefficient and is of second order.
    """

    rule: Rule = midpoint
    history: int = 2
    tau: float = 0.0
    corrected_start: bool = False

    def __post_init__(self) -> None:
        if self.history not in (1, 2, 3) or not 0 <= self.tau < math.inf:
            raise ValueError(
                f"history {self.history} must be 1, 2 or 3, and tau {self.tau} at least 0: "
                "tau 0 is the ODE, 1 the SDE"
            )

    @property
    def stochastic(self) -> bool:
        return self.tau > 0

    @property
    def grid(self) -> Grid:
        # Of the plain grids the best for these methods, which interpolate in log-SNR.
        return grids.log_snr

    def stages(self, levels: Levels) -> Iterator[Stage]:
        alpha, sigma, lambda_ = levels.alpha, levels.sigma, levels.lambda_
        noise = self.tau**2
        previous: list[float] = []
        for k in range(len(levels.times) - 1):
            h = lambda_[k + 1] - lambda_[k]
            known = min(k + 1, self.history) if sigma[k + 1] else 1
            u = [lambda_[k - j] - lambda_[k] if j else 0.0 for j in range(known)]
            u = [0.0, *(v for v in u[1:] if math.isfinite(v))]
            weights = self.rule(u, h, 1 + noise)
            a = sigma[k + 1] / sigma[k] * (math.exp(-noise * h) if noise else 1.0)
            row = [alpha[k + 1] * w for w in weights]
            if self.corrected_start and len(previous) == 1 and len(row) == 2:
                first = lambda_[k] - lambda_[k - 1]
                late, early = self.rule([0.0, first], first, 1 + noise)[::-1]
                row[0] += a * alpha[k] * late
                row[1] += a * alpha[k] * (early - previous[0])
            previous = weights
            update = {"x0": a} | {("D", "x1", "x2")[j]: w for j, w in enumerate(row)}
            if noise and sigma[k + 1]:
                update["Z"] = sigma[k + 1] * math.sqrt(-math.expm1(-2 * noise * h))
            shift = [{"D": 1.0}, {"x1": 1.0} if k else {}][: self.history - 1]
            yield Stage(levels.times[k], {"x0": 1.0}, (update, *shift), levels.times[k + 1])


PAPER = "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models"
two = Multistep("dpm-solver++2m", 2, 2, f"{PAPER}, algorithm 2", midpoint, 2)
three = Multistep("dpm-solver++3m", 3, 3, f"{PAPER}, order 3", polynomial, 3, corrected_start=True)
sde = Multistep("sde-dpm-solver++2m", 2, 2, f"{PAPER}, SDE-2M", midpoint, 2, tau=1.0)
