"""What every solver is: a compiler from a schedule and its times to a plan, with stated facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ebbflow import grids
from ebbflow.plan import Plan, Row, Stage
from ebbflow.schedules import Schedule
from ebbflow.statistics import Statistics

Grid = Callable[..., grids.Times]
"""`grid(schedule, steps)`: the nodes from 1 to 0."""


@dataclass(frozen=True)
class Levels:
    """alpha, sigma and `lambda_ = log(alpha/sigma)` at the nodes, Python floats from float64."""

    schedule: Schedule
    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    lambda_: tuple[float, ...]

    @staticmethod
    def of(schedule: Schedule, times: Sequence[float]) -> Levels:
        t = torch.tensor(times, dtype=torch.float64)
        columns = (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t) / 2)
        return Levels(schedule, tuple(times), *(tuple(c.tolist()) for c in columns))

    def time(self, ratio: float) -> float:
        """The time at which sigma/alpha has this value."""
        return self.schedule.time(-2 * math.log(ratio)).item()


@dataclass(frozen=True)
class Solver:
    """A sampler. Subclasses give the parameters, the facts and `stages`.

    Facts: `order`, the asymptotic (weak, if stochastic) order with the method's own start, the
    least over schedules; `nominal_order`, the paper's; `stochastic`; `adaptive`; `needs`, what it
    must be given ("statistics", "jvp", …); `reference`.
    """

    name: str
    order: int
    nominal_order: int
    reference: str

    @property
    def stochastic(self) -> bool:
        return False

    @property
    def adaptive(self) -> bool:
        return False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def about_mean(self, statistics: Statistics | None) -> bool:
        """Whether its plans are better centred, where the mean of each sample is known and is not
        in these statistics."""
        return False

    @property
    def grid(self) -> Grid:
        """Where the nodes go unless the caller gives them."""
        return grids.angle

    def stages(self, levels: Levels) -> Iterable[Stage]:
        """The stages of the plan through these nodes."""
        raise NotImplementedError

    def plan(
        self,
        schedule: Schedule,
        steps: int | None = None,
        *,
        times: Sequence[float] | Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> Any:
        """Compile for `steps` steps (10 unless given) from 1 to 0, or through the nodes `times`.

        Returns a Plan; solvers that are not linear return a `Walk`, which runs the same way.
        Raises ValueError for both, for nodes that are not strictly monotone, and for increasing
        nodes (towards noise) when the solver is stochastic.
        """
        if times is not None and steps is not None:
            raise ValueError(f"give steps or times, not both (steps={steps})")
        if times is None:
            nodes = self.nodes(schedule, 10 if steps is None else steps, statistics)
        else:
            nodes = grids.given(times)
        if self.stochastic and nodes[1] > nodes[0]:
            raise ValueError(
                f"{self.name} is stochastic: it cannot run towards noise (times increase from "
                f"{nodes[0]:g} to {nodes[-1]:g}); use a deterministic solver such as ddim"
            )
        if "statistics" in self.needs and statistics is None:
            raise ValueError(f"{self.name} needs the data's statistics: ef.Statistics.from_data")
        return self.compile(schedule, nodes, statistics)

    def nodes(self, schedule: Schedule, steps: int, statistics: Statistics | None) -> grids.Times:
        """The nodes of `steps` steps from 1 to 0."""
        return self.grid(schedule, grids.check_steps(steps))

    def compile(self, schedule: Schedule, nodes: grids.Times, statistics: Statistics | None) -> Any:
        """The plan through checked nodes."""
        return Plan(schedule, nodes[0], tuple(self.stages(Levels.of(schedule, nodes))), self.origin)

    @property
    def origin(self) -> dict[str, Any]:
        """The name and the parameters, for the plan's record."""
        facts = {field.name for field in fields(Solver)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in facts}
        # An infinite bound is no bound, and no JSON either.
        kept = {k: v for k, v in own.items() if isinstance(v, int | float | str) and v != math.inf}
        return {"solver": self.name, **kept}

    def largest(self, schedule: Schedule, nfe: int, statistics: Statistics | None = None) -> Any:
        """The plan with the most steps whose calls fit the budget `nfe`."""
        if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
            raise ValueError(f"nfe must be an integer of at least 1, got {nfe!r}")
        low, high = 1, nfe
        best = self.plan(schedule, 1, statistics=statistics)
        if best.nfe > nfe:
            raise ValueError(
                f"{self.name} needs {best.nfe} calls for one step, the budget is {nfe}"
            )
        while low < high:
            middle = (low + high + 1) // 2
            plan = self.plan(schedule, middle, statistics=statistics)
            if plan.nfe <= nfe:
                low, best = middle, plan
            else:
                high = middle - 1
        return best


def first_order(levels: Levels, k: int) -> tuple[float, float]:
    """(a, b) of the exact step from node k to k + 1 for a constant prediction: `x' = a x + b D`.

    `a = sigma'/sigma`, `b = alpha' - alpha a`, finite from alpha = 0 and to sigma = 0.
    """
    a = levels.sigma[k + 1] / levels.sigma[k] if levels.sigma[k] else math.nan
    h = levels.lambda_[k + 1] - levels.lambda_[k]
    return a, -levels.alpha[k + 1] * math.expm1(-h)


def combination(*terms: tuple[Any, Row]) -> dict[str, Any]:
    """The sum of factor times row."""
    total: dict[str, Any] = {}
    for factor, row in terms:
        for name, value in row.items():
            total[name] = total[name] + factor * value if name in total else factor * value
    return total
