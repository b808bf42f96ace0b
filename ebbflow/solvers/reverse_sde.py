"""The reverse SDE discretised without an exact linear part, in the score or the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver

Step = tuple[float, float, float]
"""(a, b, c) of `x' = a x + b eps + c Z`, with `eps = (x - alpha D) / sigma`."""

Rule = Callable[[Levels, int], Step]


def euler_maruyama(levels: Levels, k: int) -> Step:
    """`x' = x + (s - t) (f x - g² score) + g sqrt(t - s) Z`, `dx = f x dt + g dW` the process.

    `f = alpha'/alpha` and `g² = 2 sigma (sigma' - f sigma)`, primes for d/dt; score = -eps/sigma.
    """
    t = torch.tensor(levels.times[k], dtype=torch.float64)
    sigma, h = levels.sigma[k], levels.times[k + 1] - levels.times[k]
    f = levels.schedule.alpha_prime(t).item() / levels.alpha[k]
    g_squared = 2 * sigma * (levels.schedule.sigma_prime(t).item() - f * sigma)
    return 1 + h * f, h * g_squared / sigma, math.sqrt(-h * g_squared)


def reverse_diffusion(levels: Levels, k: int) -> Step:
    """`x' = (2 - r) x + b score + sqrt(b) Z`: the forward step, r x + sqrt(b) Z, turned round."""
    r = levels.alpha[k] / levels.alpha[k + 1]
    b = levels.sigma[k] ** 2 * -math.expm1(2 * (levels.lambda_[k] - levels.lambda_[k + 1]))
    return 2 - r, -b / levels.sigma[k], math.sqrt(b)


def exponential_noise(levels: Levels, k: int) -> Step:
    """`x' = (alpha'/alpha) x - 2 sigma' (e^h - 1) eps + sigma' sqrt(e^{2h} - 1) Z`."""
    h, sigma = levels.lambda_[k + 1] - levels.lambda_[k], levels.sigma[k + 1]
    a = levels.alpha[k + 1] / levels.alpha[k]
    return a, -2 * sigma * math.expm1(h), sigma * math.sqrt(math.expm1(2 * h))


@dataclass(frozen=True)
class ReverseSDE(Solver):
    """One step of a rule: `x' = a x + b eps + c Z`, one call a step, weak order 1.

    A step from alpha = 0 or to sigma = 0, where the rules have no limit, is the exact posterior's,
    `x' = alpha' D + sigma' Z`. No rule keeps the variance of a point mass; DDPM's step does.
    """

    rule: Rule = euler_maruyama
    spacing: Grid = grids.uniform

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def grid(self) -> Grid:
        return self.spacing

    def stages(self, levels: Levels) -> Iterator[Stage]:
        for k in range(len(levels.times) - 1):
            alpha, sigma = levels.alpha[k], levels.sigma[k]
            row = {"D": levels.alpha[k + 1], "Z": levels.sigma[k + 1]}
            if alpha and levels.sigma[k + 1]:
                a, b, c = self.rule(levels, k)
                row = {"x0": a + b / sigma, "D": -b * alpha / sigma, "Z": c}
            row = {name: value for name, value in row.items() if value}
            yield Stage(levels.times[k], {"x0": 1.0}, (row,), levels.times[k + 1])


SCORE = "Score-Based Generative Modeling through Stochastic Differential Equations"
maruyama = ReverseSDE("euler-maruyama", 1, 1, f"{SCORE}, equation 6, Euler-Maruyama")
diffusion = ReverseSDE("reverse-diffusion", 1, 1, f"{SCORE}, appendix E", reverse_diffusion)
dpm = ReverseSDE(
    "sde-dpm-solver-1",
    1,
    1,
    "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion …, SDE-DPM-Solver-1",
    exponential_noise,
    grids.log_snr,
)
