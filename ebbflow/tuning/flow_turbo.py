"""FlowTurbo: a sampler whose last steps call a small refiner instead of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from ebbflow import grids
from ebbflow.schedules import Schedule
from ebbflow.solvers.base import Grid
from ebbflow.solvers.stepping import Model, Stepping, Walk, levels
from ebbflow.solvers.straight import straight
from ebbflow.statistics import Statistics
from ebbflow.tuning.refiner import Refiner

PAPER = "FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner"


class _State(NamedTuple):
    """The steps to come, as letters, and the last slope."""

    word: str
    slope: Tensor | None


@dataclass(frozen=True)
class FlowTurbo(Stepping):
    """Heun steps, then pseudo-corrector steps, then refined steps that never call the denoiser.

        R:  d = v_before + r(y, v_before, tau),  y~ = y + h d,  d' = d + r(y~, d, tau'),
            y' = y + h/2 (d + d')

    v_before is the slope that the step before left, d'. With the exact difference for r, R is
    Heun's step. Calls of the denoiser: two for H, one for P, none for R; R costs two calls of the
    refiner. The step to sigma = 0 returns the (refined) prediction. Its stated order is 1: the
    refiner's error does not vanish with the step.
    FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner, section 3.

    Args:
        refiner: from `train_refiner`.
        heun: steps H, at least 1.
        pseudo: steps P; as many as the nodes leave unless given.
        refined: steps R.
    """

    name: str = field(default="flow-turbo-refined", init=False)
    order: int = field(default=1, init=False)
    nominal_order: int = field(default=2, init=False)
    reference: str = field(default=f"{PAPER}, section 3", init=False)
    refiner: Refiner = field(repr=False, compare=False)
    heun: int = 1
    pseudo: int | None = None
    refined: int = 1

    def __post_init__(self) -> None:
        if self.heun < 1 or self.refined < 0 or (self.pseudo is not None and self.pseudo < 0):
            raise ValueError(
                f"heun {self.heun} must be at least 1, pseudo {self.pseudo} and refined "
                f"{self.refined} at least 0"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"training"})

    @property
    def grid(self) -> Grid:
        return straight

    def word(self, steps: int) -> str:
        """One letter a step, such as "HPPRR"; raises ValueError unless they fit the nodes."""
        left = steps - self.heun - self.refined
        if left < 0 or self.pseudo not in (None, left):
            wanted = f"{self.heun} H + {self.pseudo or 0} P + {self.refined} R"
            raise ValueError(f"{steps} steps do not hold {wanted}: change steps, or pseudo to None")
        return "H" * self.heun + "P" * left + "R" * self.refined

    def plan(
        self,
        schedule: Schedule,
        steps: int | None = None,
        *,
        times: Sequence[float] | Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> Walk:
        """As every solver's; as many steps as there are letters where pseudo is given."""
        if steps is None and times is None and self.pseudo is not None:
            steps = self.heun + self.pseudo + self.refined
        walk = super().plan(schedule, steps, times=times, statistics=statistics)
        self.word(len(walk.times) - 1)
        if self.refined and walk.times[1] > walk.times[0]:
            raise ValueError("a refiner knows steps towards data only: use decreasing times")
        return walk

    def largest(self, schedule: Schedule, nfe: int, statistics: Any = None) -> Walk:
        """The plan with the most pseudo-corrector steps whose calls fit the budget `nfe`."""
        fewest = self.heun + (self.pseudo or 0) + self.refined
        most = fewest if self.pseudo is not None else max(fewest, fewest + nfe - 2 * self.heun + 1)
        plans = (self.plan(schedule, steps) for steps in range(most, fewest - 1, -1))
        found = next((walk for walk in plans if (walk.nfe or 0) <= nfe), None)
        if found is None:
            least = self.plan(schedule, fewest).nfe
            raise ValueError(f"{self.name} needs {least} calls, the budget is {nfe}")
        return found

    def calls(self, schedule: Schedule, times: grids.Times) -> int:
        return self._cost(schedule, times, {"H": 2, "P": 1, "R": 0}, last=1)

    def refiner_calls(self, schedule: Schedule, times: grids.Times) -> int:
        """Calls of the refiner between these nodes."""
        return self._cost(schedule, times, {"H": 0, "P": 0, "R": 2}, last=1)

    def _cost(
        self, schedule: Schedule, times: grids.Times, costs: dict[str, int], last: int
    ) -> int:
        pairs = zip(self.word(len(times) - 1), pairwise(times), strict=True)
        return sum(
            costs[letter] if schedule.sigma(s).item() else min(costs[letter], last)
            for letter, (_, s) in pairs
        )

    def initial(self, model: Model, x: Tensor, walk: Walk) -> _State:
        return _State(self.word(len(walk.times) - 1), None)

    def step(
        self, model: Model, x: Tensor, t: float, s: float, state: _State
    ) -> tuple[Tensor, Tensor, _State]:
        (alpha, sigma), (alpha_s, sigma_s) = levels(model.schedule, t), levels(model.schedule, s)
        letter, slope, rest = state.word[0], state.slope, state.word[1:]
        size, size_s = alpha + sigma, alpha_s + sigma_s
        y, tau, tau_s = x / size, sigma / size, sigma_s / size_s
        if letter == "R" and slope is not None:
            slope = self.refiner(y, slope, tau, **model.condition)
        elif letter == "H" or slope is None or not sigma_s:
            slope = (y - model(x, t)) / tau
        if not sigma_s:
            clean = y - tau * slope
            return clean, clean, _State(rest, None)
        guess = y + (tau_s - tau) * slope
        if letter == "R":
            after = self.refiner(guess, slope, tau_s, **model.condition)
        else:
            after = (guess - model(size_s * guess, s)) / tau_s
        y = y + (tau_s - tau) / 2 * (slope + after)
        return size_s * y, guess - tau_s * after, _State(rest, after)
