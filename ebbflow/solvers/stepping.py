"""Solvers that are no plan: a step is not linear in the state, or chooses its own length.

Such a solver compiles to a `Walk`, which runs like a plan; `sample` drives both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import grids, noise
from ebbflow.centred import centre, restore
from ebbflow.denoiser import Denoiser
from ebbflow.finite import require_finite
from ebbflow.rows import require_start
from ebbflow.schedules import Schedule
from ebbflow.solvers.base import Solver
from ebbflow.statistics import Statistics


class Point(NamedTuple):
    """A node that was reached: its time, the state there, and the last prediction."""

    time: float
    state: Tensor
    prediction: Tensor


@dataclass
class Model:
    """The denoiser during one run, which counts its calls and knows the samples' noise.

    evaluations: (B,), what each sample has spent; passes: network passes of the costliest sample;
    times: (B,), how far each sample came, set by solvers that may stop early.
    """

    denoiser: Denoiser
    condition: Mapping[str, Any]
    seed: int
    indices: range
    evaluations: Tensor = field(init=False)
    times: Tensor | None = None
    passes: int = 0

    def __post_init__(self) -> None:
        self.evaluations = torch.zeros(len(self.indices), dtype=torch.int64)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: float | Tensor, rows: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t] of all samples, or of the samples `rows` (their indices in the batch).

        x: (B or len(rows), *shape); t: a number or one a row. Raises NonFinite.
        """
        prediction = self.denoiser(x, t, **self.cut(rows))
        self.spend(t, rows)
        require_finite(prediction, f"the prediction at t = {_first(t):g}")
        return prediction

    def derivative(
        self, x: Tensor, t: float | Tensor, x_dot: Tensor, t_dot: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The prediction and its derivative along (x_dot, t_dot), by forward mode.

        Counted as two evaluations, which is what it costs.
        """
        times = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        rates = torch.as_tensor(t_dot, dtype=torch.float64, device=x.device).expand(len(x))

        def answer(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x, t, **self.condition)

        value, change = torch.func.jvp(answer, (x, times), (x_dot, rates))[:2]
        self.spend(t, calls=2)
        for part in (value, change):
            require_finite(part, f"the prediction or its derivative at t = {_first(t):g}")
        return value, change

    def normal(self, x: Tensor, draw: int, rows: Tensor | None = None) -> Tensor:
        """Standard normal numbers like x: draw number `draw` (from 1) of each sample."""
        indices = [self.indices[i] for i in (range(len(x)) if rows is None else rows.tolist())]
        return noise.normal(self.seed, indices, draw, x.shape[1:], x.dtype, x.device)

    def cut(self, rows: Tensor | None) -> dict[str, Any]:
        """The condition of the samples `rows`, or of all."""
        batch = len(self.indices)
        if rows is None:
            return dict(self.condition)
        return {name: cut(value, rows, batch) for name, value in self.condition.items()}

    def spend(self, t: float | Tensor, rows: Tensor | None = None, calls: int = 1) -> None:
        """Count `calls` evaluations of these rows."""
        before = int(self.evaluations.max())
        self.evaluations[slice(None) if rows is None else rows.cpu()] += calls
        if int(self.evaluations.max()) > before:
            self.passes += calls * self.denoiser.passes(_first(t))

    def reached(self, end: float) -> Tensor:
        """How far each sample came, (B,) float64: `end`, unless it stopped early."""
        all_the_way = torch.full((len(self.indices),), end, dtype=torch.float64)
        return all_the_way if self.times is None else self.times


def _first(t: float | Tensor) -> float:
    return t.flatten()[0].item() if isinstance(t, Tensor) else t


def cut(value: Any, rows: Tensor, batch: int) -> Any:
    """Rows (indices or a mask) of a tensor whose first axis is the batch; all else is shared."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value[rows.to(value.device)]
    return value


@dataclass(frozen=True)
class Walk:
    """A stepping solver between given nodes: what `Solver.plan` returns where there is no plan.

    nfe: evaluations of one run, or None where the solver chooses them.
    """

    solver: Stepping
    schedule: Schedule
    times: tuple[float, ...]
    statistics: Statistics | None = field(default=None, compare=False)

    @property
    def start(self) -> float:
        return self.times[0]

    @property
    def nfe(self) -> int | None:
        return self.solver.calls(self.schedule, self.times)

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    @property
    def origin(self) -> dict[str, Any]:
        return self.solver.origin

    def execute(self, model: Model, x_init: Tensor) -> Iterator[Point]:
        """The nodes after the first, from the state at the first; `model` keeps the accounts."""
        x = require_start(self.schedule, model.denoiser, x_init)
        return self.solver.walk(model, x, self)

    def run(
        self,
        denoiser: Denoiser,
        x_init: Tensor,
        seed: int = 0,
        first_index: int = 0,
        **condition: Any,
    ) -> Tensor:
        """The state at the last node, from the state (B, *shape) at the first."""
        indices = range(first_index, first_index + len(x_init))
        *_, last = self.execute(Model(denoiser, condition, seed, indices), x_init)
        return last.state


@dataclass(frozen=True)
class Stepping(Solver):
    """A solver with its own step, `step(model, x, t, s, state) -> (x_s, prediction, state)`."""

    def initial(self, model: Model, x: Tensor, walk: Walk) -> Any:
        """The state of the method before the first step."""
        return None

    def step(
        self, model: Model, x: Tensor, t: float, s: float, state: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """From x at t to the node s: the new x, a prediction, and the method's new state."""
        raise NotImplementedError

    def calls(self, schedule: Schedule, times: grids.Times) -> int | None:
        """Evaluations between these nodes, or None where the solver chooses them."""
        return len(times) - 1

    def walk(self, model: Model, x: Tensor, walk: Walk) -> Iterator[Point]:
        """Step from node to node; adaptive solvers replace this."""
        state = self.initial(model, x, walk)
        for t, s in pairwise(walk.times):
            x, prediction, state = self.step(model, x, t, s, state)
            require_finite(x, f"the state at t = {s:g}")
            yield Point(s, x, prediction)

    def compile(self, schedule: Schedule, nodes: grids.Times, statistics: Statistics | None) -> Any:
        if not schedule.sigma(nodes[0]).item():
            raise ValueError(
                f"there is no noise at t = {nodes[0]:g}: {self.name} starts where sigma > 0"
            )
        return Walk(self, schedule, nodes, statistics)


def levels(schedule: Schedule, t: float) -> tuple[float, float]:
    """(alpha, sigma)."""
    return schedule.alpha(t).item(), schedule.sigma(t).item()


def ancestral(
    schedule: Schedule, x: Tensor, clean: Tensor, t: float, s: float, z: Tensor
) -> Tensor:
    """DDPM's step from t to s, with the exact posterior for a prediction that does not change.

    `(sigma'/sigma) e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) z` for a step h in
    log(alpha/sigma).
    """
    (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
    kept = alpha * sigma_s / (alpha_s * sigma)
    moved = kept * sigma_s / sigma * x + alpha_s * (1 - kept**2) * clean
    return moved + sigma_s * math.sqrt(1 - kept**2) * z


def first_order(schedule: Schedule, x: Tensor, clean: Tensor, t: float, s: float) -> Tensor:
    """DDIM's step from t to s, `alpha' D + (sigma'/sigma) (x - alpha D)`; D at sigma' = 0."""
    (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
    return clean if not sigma_s else alpha_s * clean + sigma_s / sigma * (x - alpha * clean)


def points_about_mean(walk: Walk, model: Model, x: Tensor) -> Iterator[Point]:
    """The points of a walk that holds for `x_t - alpha m`, m the mean under each condition."""
    denoiser, (x,), mean = centre(model.denoiser, (x,), walk.times[0], model.condition)
    about = replace(model, denoiser=denoiser)
    for t, state, prediction in walk.execute(about, x):
        model.evaluations[:], model.passes = about.evaluations, about.passes
        yield Point(t, restore(state, mean, model.schedule, t), prediction + mean)
