"""The exponential pair of orders 3 and 2 of DPM-Solver, which chooses its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ebbflow.solvers.adaptive import Attempt, Pair, Place, times
from ebbflow.solvers.stepping import Model

NODES = (1 / 3, 2 / 3)
WEIGHTS = (2.0, 1.5, 1.5)
"""Of phi_2 in u_2 and in x', of phi_1 in x'_low: r_2/r_1, 1/r_2 and 1/(2 r_1)."""


@dataclass(frozen=True)
class DPMSolver23(Pair):
    """Single-step DPM-Solver++ of order 3 (r_1 = 1/3, r_2 = 2/3) with its own order 2 inside.

        u_1 = (sigma_1/sigma) x - alpha_1 phi_1(h/3) D,   D_1 = D(u_1)
        u_2 = (sigma_2/sigma) x - alpha_2 (phi_1(2h/3) D - 2 phi_2(2h/3) (D_1 - D)),   D_2 = D(u_2)
        x'  = (sigma'/sigma) x - alpha' (phi_1(h) D - 3/2 phi_2(h) (D_2 - D))
        x'_low = (sigma'/sigma) x - alpha' phi_1(h) (D + 3/2 (D_1 - D))

    h is the step in log(alpha/sigma), `phi_1(h) = e^-h - 1`, `phi_2(h) = phi_1(h)/h + 1`. Three
    evaluations a step, two more when it is refused. Steps from or to an infinite log-SNR take
    `open_step`. DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around
    10 Steps, appendix C; in the data prediction of DPM-Solver++, which alone is stable from
    alpha = 0.
    """

    weaker: ClassVar[int] = 2
    cost: ClassVar[int] = 3

    def singular(self, here: Place, there: Place) -> Tensor:
        return (there.sigma == 0) | (here.alpha == 0) | (there.alpha == 0)

    def attempt(
        self, model: Model, rows: Tensor, x: Tensor, clean: Tensor, here: Place, there: Place
    ) -> Attempt:
        start = torch.log(here.alpha / here.sigma)
        h = torch.log(there.alpha / there.sigma) - start

        def reach(place: Place, share: float, change: Tensor, weight: float) -> Tensor:
            one = torch.expm1(-share * h)
            two = one / (share * h) + 1
            part = times(one, clean) - times(weight * two, change)
            return times(place.sigma / here.sigma, x) - times(place.alpha, part)

        ratios = [torch.exp(-start - share * h) for share in NODES]
        first, second = (Place.of_angle(model.schedule, torch.atan(ratio)) for ratio in ratios)
        change = model(reach(first, NODES[0], clean, 0), first.time, rows) - clean
        query = reach(second, NODES[1], change, WEIGHTS[0])
        state = reach(there, 1, model(query, second.time, rows) - clean, WEIGHTS[1])
        low = reach(there, 1, clean, 0) - times(WEIGHTS[2] * there.alpha * torch.expm1(-h), change)
        return Attempt(state, state - low)


REFERENCE = "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model …, appendix C"
dpm_solver_23 = DPMSolver23("dpm-solver-23", 3, 3, REFERENCE)
