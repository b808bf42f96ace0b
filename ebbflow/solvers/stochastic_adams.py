"""Stochastic Adams methods: a predictor and a corrector that share one call and one noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Levels, Solver
from ebbflow.solvers.interpolation import polynomial


@dataclass(frozen=True)
class StochasticAdams(Solver):
    """Adams-Bashforth, then Adams-Moulton once its call has arrived, on the SDE of noise `tau`.

        y  = a c + alpha' sum_j w_j D_{k-j} + b Z              predicted at k + 1, from c at k
        c' = a c + alpha' (v D(y) + sum_j v_j D_{k-j}) + b Z   corrected, with the same Z

    `a = (sigma'/sigma) e^{-tau² h}`, `b = sigma' sqrt(1 - e^{-2 tau² h})`; w and v integrate the
    polynomials through `predictor` past predictions, and through `corrector` of them and D(y),
    against `(1 + tau²) e^{(1 + tau²)(u - h)}`. One call a step, at y, which is the state at the
    node. Weak order 2; the paper's order is min(predictor, corrector + 1) as tau goes to 0. Below
    about 20 steps its extrapolation of rate 1 + tau² is unstable: take tau 0.5 or less there.
    SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models, algorithm 1.
    """

    predictor: int = 3
    corrector: int = 2
    tau: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.corrector <= self.predictor <= 3 or not 0 <= self.tau < math.inf:
            raise ValueError(f"{self}: need 1 <= corrector <= predictor <= 3 and tau >= 0, finite")

    stochastic = property(lambda self: self.tau > 0)
    grid = property(lambda self: grids.log_snr)

    def stages(self, levels: Levels) -> Iterator[Stage]:
        alpha, sigma, lambda_, noise = levels.alpha, levels.sigma, levels.lambda_, self.tau**2
        late = 0.0  # the weight of the coming prediction, which register 1, corrected, lacks
        for k in range(len(levels.times) - 1):
            h = lambda_[k + 1] - lambda_[k]
            a = sigma[k + 1] / sigma[k] * math.exp(-noise * h if noise else 0.0)
            past = lambda_[:k][: -self.predictor : -1]
            u = [0.0, *(v - lambda_[k] for v in past if math.isfinite(v))]
            base = {"x1": a, "D": a * alpha[k] * late}
            if noise and sigma[k + 1]:
                base["Z"] = sigma[k + 1] * math.sqrt(-math.expm1(-2 * noise * h))
            predicted = corrected = polynomial(u if sigma[k + 1] else [0.0], h, 1 + noise)
            if math.isfinite(h):  # otherwise the first step, which has none, or the last
                *corrected, late = polynomial([*u[: self.corrector], h], h, 1 + noise)
            rows = []
            for ws in (predicted, corrected):
                taken = {n: alpha[k + 1] * w for n, w in zip(("D", "x2", "x3"), ws, strict=False)}
                rows.append({**base, **taken, "D": base["D"] + taken["D"]})
            shift = [{"D": 1.0}, {"x2": 1.0} if k else {}][: self.predictor - 1]
            yield Stage(levels.times[k], {"x0": 1.0}, (*rows, *shift), levels.times[k + 1])


sa = StochasticAdams("sa-solver", 2, 3, "SA-Solver: Stochastic Adams Solver …, algorithm 1")
