"""GENIE: a second-order Taylor step, with the model's derivative by forward mode."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ebbflow import grids
from ebbflow.schedules import Schedule
from ebbflow.solvers.stepping import Model, Stepping, first_order, levels


def _plain(schedule: Schedule, t: float, s: float) -> bool:
    return not (schedule.alpha(t).item() and schedule.alpha(s).item() and schedule.sigma(s).item())


@dataclass(frozen=True)
class Genie(Stepping):
    """Truncated Taylor method of order 2 on `d(x/alpha)/dgamma = eps`, `gamma = sigma/alpha`.

        x'/alpha' = x/alpha + h eps + h²/2 d eps/dgamma,   h = gamma' - gamma
        d eps/dgamma = -(dD/dgamma) / gamma,   D = E[x_0 | x_t], for `x/alpha = D + gamma eps`

    dD/dgamma is one Jacobian-vector product, in x and t together, along the ODE's own direction,
    which D gives first: a step costs three evaluations. One from or to alpha = 0, or to sigma = 0,
    is DDIM's, with one. GENIE: Higher-Order Denoising Diffusion Solvers, equations 7 and 8; the
    derivative is the model's own, not a distilled head's.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"jvp"})

    def calls(self, schedule: Schedule, times: grids.Times) -> int:
        return sum(1 if _plain(schedule, t, s) else 3 for t, s in pairwise(times))

    def step(
        self, model: Model, x: Tensor, t: float, s: float, state: None
    ) -> tuple[Tensor, Tensor, None]:
        schedule = model.schedule
        (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
        if _plain(schedule, t, s):
            clean = model(x, t)
            return first_order(schedule, x, clean, t, s), clean, None
        # u = log gamma, in which the directions are of unit size at both ends.
        fade = schedule.alpha_prime(t).item() / alpha
        t_dot = 1 / (schedule.sigma_prime(t).item() / sigma - fade)
        clean = model(x, t)
        x_dot = fade * t_dot * x + (x - alpha * clean)
        change = model.derivative(x, t, x_dot, t_dot)[1]
        gamma = sigma / alpha
        h = sigma_s / alpha_s - gamma
        eps = (x - alpha * clean) / sigma
        return alpha_s * (x / alpha + h * eps - h**2 / (2 * gamma**2) * change), clean, None


genie = Genie("genie", 2, 2, "GENIE: Higher-Order Denoising Diffusion Solvers, equation 8")
