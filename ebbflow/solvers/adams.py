"""Adams-Bashforth methods on the noise prediction: DEIS, multistep DPM-Solver and iPNDM.

With `rho = sigma/alpha` the probability-flow ODE is `d(x/alpha)/d rho = eps`, so that

    x' = (alpha'/alpha) x + alpha' ∫ eps d rho

is exact; a method is a rule for eps between its last values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver, first_order
from ebbflow.solvers.interpolation import interpolated, midpoint, polynomial

Rule = Callable[[Levels, int, Sequence[int]], list[float]]
"""`rule(levels, k, nodes)`: weights of eps at the nodes in `∫ eps d rho` from node k to k + 1."""

POINTS = 32  # of Gauss-Legendre: round-off accuracy for steps of several e-folds


def in_time(levels: Levels, k: int, nodes: Sequence[int]) -> list[float]:
    """eps is a polynomial in t."""
    import numpy
    import torch

    points, weights = numpy.polynomial.legendre.leggauss(POINTS)
    half = (levels.lambda_[k + 1] - levels.lambda_[k]) / 2
    lambda_ = levels.lambda_[k] + half * (points + 1)
    t = levels.schedule.time(2 * torch.from_numpy(lambda_)).numpy() - levels.times[k]
    measure = -half * weights * numpy.exp(-lambda_)
    moments = [float((measure * t**p).sum()) for p in range(len(nodes))]
    return interpolated([levels.times[j] - levels.times[k] for j in nodes], moments)


def in_ratio(levels: Levels, k: int, nodes: Sequence[int]) -> list[float]:
    """eps is a polynomial in rho."""
    rho = [math.exp(-levels.lambda_[j]) for j in (k, k + 1, *nodes)]
    step = rho[1] - rho[0]
    moments = [step ** (p + 1) / (p + 1) for p in range(len(nodes))]
    return interpolated([r - rho[0] for r in rho[2:]], moments)


def in_log_ratio(levels: Levels, k: int, nodes: Sequence[int]) -> list[float]:
    """eps is a polynomial in lambda = -log rho."""
    return _noise_form(polynomial, levels, k, nodes)


def in_the_middle(levels: Levels, k: int, nodes: Sequence[int]) -> list[float]:
    """eps is its linear extrapolation in lambda at the middle of the step."""
    return _noise_form(midpoint, levels, k, nodes)


def equal_steps(levels: Levels, k: int, nodes: Sequence[int]) -> list[float]:
    """eps has the weights of Adams and Bashforth for equal steps, whatever the steps."""
    step = math.exp(-levels.lambda_[k + 1]) - math.exp(-levels.lambda_[k])
    return [step * weight for weight in ADAMS_BASHFORTH[len(nodes) - 1]]


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _noise_form(rule: Callable, levels: Levels, k: int, nodes: Sequence[int]) -> list[float]:
    lambda_ = levels.lambda_
    u = [lambda_[j] - lambda_[k] for j in nodes]
    scale = math.exp(-lambda_[k + 1])
    return [scale * weight for weight in rule(u, lambda_[k + 1] - lambda_[k], -1.0)]


@dataclass(frozen=True)
class NoiseAdams(Solver):
    """`history` values of eps under a rule; one call a step.

        x' = (alpha'/alpha) x + alpha' sum_j w_j eps_j,   w_j = ∫ l_j d rho

    The first steps use the values that there are, which caps the order at 2. With
    `corrected_start`, a step whose past is not full yet also redoes the steps before it with the
    predictions that have arrived meanwhile: that costs nothing, is in none of the papers, and lifts
    the cap to 3. A step to sigma = 0 or from alpha = 0 is the exact one for its prediction.
    `order` is what shows from 48 steps on. Polynomials in rho or lambda through three values get
    there late where a grid's first steps are long in these variables (cosine, uniform in t: 2.1 to
    2.5 of the 3 that they approach). `equal_steps` has the weights of steps that are equal in rho,
    which grids seldom are: at most 2, and 1.5 with three or four values on the linear schedule.
    Fast Sampling of Diffusion Models with Exponential Integrator, equations 14-15 (tAB), section
    3.4 (rhoAB) and appendix H (iPNDM); DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic
    Model Sampling in Around 10 Steps, whose code has the multistep forms; its third-order one
    halves a coefficient and is of order 2, this one is the exact integral.
    """

    rule: Rule = in_time
    history: int = 2
    corrected_start: bool = False

    @property
    def grid(self) -> Grid:
        return grids.log_snr if self.rule in (in_log_ratio, in_the_middle) else grids.angle

    def stages(self, levels: Levels) -> Iterator[Stage]:
        first = 0 if levels.alpha[0] else 1
        applied: dict[int, float] = {}
        for k in range(len(levels.times) - 1):
            nodes = range(k, max(k - self.history, first - 1), -1)
            weights: list[float] = []
            if nodes and levels.sigma[k + 1]:
                weights = self.rule(levels, k, nodes)
                if self.corrected_start and len(nodes) < self.history:
                    every = [self.rule(levels, m, nodes) for m in range(first, k + 1)]
                    due = [sum(column) for column in zip(*every, strict=True)]
                    weights = [w - applied.get(j, 0.0) for j, w in zip(nodes, due, strict=True)]
                    applied = dict(zip(nodes, due, strict=True))
            yield adams_stage(levels, k, weights[1:], self.history)


def adams_stage(
    levels: Levels, k: int, past: Sequence[float], history: int, spare: int = 0
) -> Stage:
    """The step from node k with `∫ eps d rho` of these weights on the past values of eps.

    After the state and `spare` empty registers come the last `history` - 1 values of eps, the
    newest first. The step is written as the exact one for eps_k and differences to the past, so
    that no difference of large numbers is left.
    """
    a, b = first_order(levels, k)
    row = {"x0": a, "D": b}
    alpha, sigma = levels.alpha[k], levels.sigma[k]
    if past:
        weights = [levels.alpha[k + 1] * w for w in past]
        row["x0"] -= sum(weights) / sigma
        row["D"] += sum(weights) * alpha / sigma
        row |= {f"x{spare + j}": w for j, w in enumerate(weights, start=1)}
    keep = [noise_row(levels, k) if alpha else {}]
    keep += [{f"x{spare + j}": 1.0} if j <= len(past) else {} for j in range(1, history)]
    update = (row, *[{}] * spare, *keep[: history - 1])
    return Stage(levels.times[k], {"x0": 1.0}, update, levels.times[k + 1])


def noise_row(levels: Levels, k: int) -> dict[str, float]:
    """eps = (X - alpha D) / sigma as a row."""
    return {"X": 1 / levels.sigma[k], "D": -levels.alpha[k] / levels.sigma[k]}


DEIS = "Fast Sampling of Diffusion Models with Exponential Integrator"
DPM = "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps"
deis_tab1 = NoiseAdams("deis-tab1", 2, 2, f"{DEIS}, equation 15", in_time, 2)
deis_tab2 = NoiseAdams("deis-tab2", 3, 3, f"{DEIS}, equation 15", in_time, 3, True)
deis_tab3 = NoiseAdams("deis-tab3", 3, 4, f"{DEIS}, equation 15", in_time, 4, True)
deis_rhoab1 = NoiseAdams("deis-rhoab1", 2, 2, f"{DEIS}, section 3.4", in_ratio, 2)
deis_rhoab2 = NoiseAdams("deis-rhoab2", 2, 3, f"{DEIS}, section 3.4", in_ratio, 3)
deis_rhoab3 = NoiseAdams("deis-rhoab3", 3, 4, f"{DEIS}, section 3.4", in_ratio, 4, True)
deis_logrhoab1 = NoiseAdams("deis-logrhoab1", 2, 2, f"{DEIS}, in log rho", in_log_ratio, 2)
dpm_2m = NoiseAdams("dpm-solver-2m", 2, 2, f"{DPM}, multistep", in_the_middle, 2)
dpm_3m = NoiseAdams("dpm-solver-3m", 2, 3, f"{DPM}, multistep", in_log_ratio, 3)
ipndm2 = NoiseAdams("ipndm2", 2, 2, f"{DEIS}, appendix H", equal_steps, 2)
ipndm3 = NoiseAdams("ipndm3", 1, 3, f"{DEIS}, appendix H", equal_steps, 3)
ipndm4 = NoiseAdams("ipndm4", 1, 4, f"{DEIS}, appendix H", equal_steps, 4)
