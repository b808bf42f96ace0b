"""DDIM and, at eta = 1, the ancestral sampler of DDPM."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver


@dataclass(frozen=True)
class DDIM(Solver):
    """Implicit and ancestral sampling with `eta` times the noise of the exact posterior.

        x' = alpha' D + sqrt(1 - eta² (1 - e^{-2h})) sigma' eps + eta sigma' sqrt(1 - e^{-2h}) Z

    with `h = log(alpha'/sigma') - log(alpha/sigma)` and `eps = (x - alpha D) / sigma`.
    One call a step. Order 1 (weak order 1 with noise).
    Denoising Diffusion Implicit Models, equations 12 and 16; eta = 1: Denoising Diffusion
    Probabilistic Models, algorithm 2 with the posterior variance.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}: 0 is DDIM, 1 is DDPM")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def grid(self) -> Grid:
        return grids.uniform if self.name == "ddpm" else grids.angle

    def stages(self, levels: Levels) -> Iterator[Stage]:
        for k in range(len(levels.times) - 1):
            alpha, sigma = levels.alpha[k], levels.sigma[k]
            alpha_s, sigma_s = levels.alpha[k + 1], levels.sigma[k + 1]
            fresh = -math.expm1(2 * (levels.lambda_[k] - levels.lambda_[k + 1]))
            kept = math.sqrt(1 - self.eta**2 * fresh) if self.eta else 1.0
            a = kept * sigma_s / sigma if sigma else math.nan
            row = {"x0": a, "D": alpha_s - alpha * a}
            if self.eta and sigma_s:
                row["Z"] = self.eta * sigma_s * math.sqrt(fresh)
            yield Stage(levels.times[k], {"x0": 1.0}, (row,), levels.times[k + 1])


ddim = DDIM("ddim", 1, 1, "Denoising Diffusion Implicit Models, equation 12")
ddpm = DDIM("ddpm", 1, 1, "Denoising Diffusion Probabilistic Models, algorithm 2", eta=1.0)
