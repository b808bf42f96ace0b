"""Exactly invertible schemes as plans from data to noise: BDIA, EDICT, asynchronous leapfrog.

All of them integrate `dx̂/dphi = v` over the angle `phi = atan(sigma / alpha)`, with
`x̂ = x / hypot(alpha, sigma)` and `v = cos(phi) eps - sin(phi) x_0`. The angle and v are finite at
both ends of every schedule, so the plans run from t = 0 to t = 1, and no stage is evaluated at an
end without noise or without signal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from ebbflow.plan import Plan, Row, Stage
from ebbflow.schedules import Schedule
from ebbflow.solvers import Levels
from ebbflow.solvers.base import combination


class Angle(NamedTuple):
    """A time with `alpha = r cos(phi)` and `sigma = r sin(phi)`."""

    time: float
    alpha: float
    sigma: float

    @property
    def phi(self) -> float:
        return math.atan2(self.sigma, self.alpha)

    @property
    def r(self) -> float:
        return math.hypot(self.alpha, self.sigma)

    def ddim(self, other: Angle) -> dict[str, float]:
        """The row of DDIM's step of register 0 from this time to another."""
        a = other.sigma / self.sigma
        return {"x0": a, "D": other.alpha - self.alpha * a}

    def v(self, source: Row) -> dict[str, float]:
        """The row `v = (alpha / sigma) x̂ - (r / sigma) D` of the state `source` at this time."""
        on_x = self.alpha / self.sigma / self.r
        return combination((on_x, source), (-self.r / self.sigma, {"D": 1.0}))


def angles(levels: Levels) -> list[Angle]:
    """The nodes as angles."""
    return [Angle(*node) for node in zip(levels.times, levels.alpha, levels.sigma, strict=True)]


@dataclass(frozen=True)
class Scheme:
    """A plan that ends with more than one register and is undone from all of them.

    name; order, of the state, on smooth grids; reference. Subclasses give `stages`.
    """

    name: str
    order: int
    reference: str

    @property
    def lost(self) -> int:
        """First stages that make the registers from the state alone and are not undone."""
        return 0

    def start(self, first: Angle) -> tuple[float, ...]:
        """What each register is at first, as a multiple of the state."""
        return (1.0, 1.0)

    def stages(self, nodes: list[Angle], schedule: Schedule) -> Iterator[Stage]:
        raise NotImplementedError

    def plan(self, schedule: Schedule, times: tuple[float, ...]) -> Plan:
        """The plan through increasing nodes (or decreasing ones)."""
        nodes = angles(Levels.of(schedule, times))
        return Plan(schedule, times[0], tuple(self.stages(nodes, schedule)), {"solver": self.name})

    def back(self, plan: Plan) -> Plan:
        """The plan that returns the registers to what they were after the lost stages."""
        if not self.lost:
            return plan.reverse()
        start = plan.times[self.lost]
        return Plan(plan.schedule, start, plan.stages[self.lost :], plan.origin).reverse()


@dataclass(frozen=True)
class BDIA(Scheme):
    """Bi-directional integration: DDIM's steps forth and back from the same prediction.

        z_{i+1} = z_{i-1} / g - DDIM(z_i, i -> i-1) / g + DDIM(z_i, i -> i+1),

    which is the paper's `z_{i-1} = g z_{i+1} - g DDIM(z_i, i -> i+1) + DDIM(z_i, i -> i-1)` read
    the other way. One call a step; z_1 is DDIM's step from z_0 with the prediction for the scaled
    z_0 at t_1, so that nothing is evaluated at sigma = 0. At g = 1 the order is 2. Below, it is 1,
    and what differs from the smooth solution grows as g^-N towards noise: in 50 steps g = 0.9 is
    harmless, 0.7 makes latents of 3e4, 0.5 of 4e11, and loses a sampled picture to round-off.
    Exact Diffusion Inversion via Bi-directional Integration Approximation.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {self.gamma}: 0 forgets the state")

    @property
    def lost(self) -> int:
        return 1

    def stages(self, nodes: list[Angle], schedule: Schedule) -> Iterator[Stage]:
        if len(nodes) < 3:
            raise ValueError(f"{self.name} needs two steps at least, got {len(nodes) - 1}")
        x, previous = {"x0": 1.0}, {"x1": 1.0}
        first, second = nodes[:2]
        scaled = {"x0": second.alpha / first.alpha}
        # The noise is that of the prediction for the scaled z_0.
        ahead = (second.sigma - first.sigma * scaled["x0"]) / second.sigma
        row = combination((1.0, scaled), (ahead, {"X": 1.0, "D": -second.alpha}))
        yield Stage(second.time, scaled, (row, x), second.time)
        for before, here, after in zip(nodes, nodes[1:], nodes[2:], strict=False):
            terms = (1.0, previous), (-1.0, here.ddim(before))
            row = combination(*((c / self.gamma, r) for c, r in terms), (1.0, here.ddim(after)))
            yield Stage(here.time, x, (row, x), after.time)


@dataclass(frozen=True)
class EDICT(Scheme):
    """Two coupled copies of the state, each moved by the other's prediction, and mixed.

    From data to noise, from s to t, with v at the time t of the noisier end:

        y <- (y - (1 - p) x) / p,  x <- (x - (1 - p) y) / p,  y <- a y + b v(x),  x <- a x + b v(y),

    which undoes the paper's step `x <- (x - b v(y)) / a`, `y <- (y - b v(x)) / a`, and the mixing.
    Two calls a step, order 1. The paper freezes eps, where a = alpha_t / alpha_s forgets the state
    at alpha_t = 0; here v is frozen and a is the cosine of the turn. (A frozen x_0, where
    a = sigma_t / sigma_s, is as exact and useless: its latents reach 1e7.) Where alpha_t = 0
    the prediction is that of s, so that no network is asked what it cannot say.
    The mixing is p = exp(-mixing (phi_t - phi_s)), since undoing it makes the copies differ by p^-2
    more each step: e^(pi mixing) in all, for any number of steps. The paper's constant p = 0.93
    makes that 1400 in 50 steps, and latents of 80 sigma on a mixture of 200 narrow Gaussians.
    EDICT: Exact Diffusion Inversion via Coupled Transformations.
    """

    mixing: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.mixing <= 4:
            raise ValueError(f"mixing must lie in [0, 4], got {self.mixing}; 0 is none")

    def stages(self, nodes: list[Angle], schedule: Schedule) -> Iterator[Stage]:
        for s, t in pairwise(nodes):
            p = math.exp(-self.mixing * abs(t.phi - s.phi))
            at = t if t.alpha else s
            scale, turn = at.r / s.r, t.phi - s.phi
            a, v = t.r / s.r * math.cos(turn), at.v({"X": 1.0})
            y = {"x1": 1 / p, "x0": (p - 1) / p}
            x = combination((1 / p, {"x0": 1.0}), ((p - 1) / p, y))
            b = (t.r * math.sin(turn), v)
            query = combination((scale, x))
            yield Stage(at.time, query, (x, combination((a, y), b)))
            row = combination((a, {"x0": 1.0}), b)
            # x1 was moved already: its value in the units of s is x1 / (r_t / r_s).
            yield Stage(at.time, {"x1": at.r / t.r}, (row, {"x1": 1.0}), t.time)


@dataclass(frozen=True)
class Leapfrog(Scheme):
    """Asynchronous leapfrog: clean part c and noise part e, reflected at the middle of each step.

        x_m = alpha_m c + sigma_m e,   c <- 2 D(x_m, m) - c,   e <- 2 eps(x_m, m) - e,

    with m half-way in angle; the state is `alpha c + sigma e` at any time. The registers are the
    state and `v = (alpha e - sigma c)`, which determine c and e at both ends. It starts with e = 0,
    c = x / alpha, evaluates at neither end, and is its own inverse. One call a step, order 2, exact
    for a constant prediction. The library's own form of the asynchronous leapfrog (Mutze, An
    asynchronous leap-frog method II, 2013), in the frame that turns with the angle.
    """

    def start(self, first: Angle) -> tuple[float, ...]:
        return (1.0, -first.sigma / first.alpha)

    def stages(self, nodes: list[Angle], schedule: Schedule) -> Iterator[Stage]:
        for s, t in pairwise(nodes):
            phi = (s.phi + t.phi) / 2
            time = schedule.time(torch.tensor(-2 * math.log(math.tan(phi)), dtype=torch.float64))
            m = angles(Levels.of(schedule, [float(time)]))[0]
            clean = {"x0": s.alpha / s.r**2, "x1": -s.sigma / s.r**2}
            noise = {"x0": s.sigma / s.r**2, "x1": s.alpha / s.r**2}
            query = combination((m.alpha, clean), (m.sigma, noise))
            c = combination((2.0, {"D": 1.0}), (-1.0, clean))
            e = combination((2 / m.sigma, {"X": 1.0, "D": -m.alpha}), (-1.0, noise))
            state = combination((t.alpha, c), (t.sigma, e))
            v = combination((t.alpha, e), (-t.sigma, c))
            yield Stage(m.time, query, (state, v), t.time)


bdia = BDIA("bdia", 2, "Exact Diffusion Inversion via Bi-directional Integration Approximation")
edict = EDICT("edict", 1, "EDICT: Exact Diffusion Inversion via Coupled Transformations")
leapfrog = Leapfrog("leapfrog", 2, "Ebbflow's own form of the asynchronous leapfrog")
