"""Errors to a converged reference at the same noise, evaluations counted, distances to fresh data.

The rules, for every sampler of every library:

- the same noise: sample i starts from the noise of (seed, i), times the sampler's own first sigma;
- the same budget of model evaluations: they are counted at the model, a method with two a step gets
  half the steps, and what spends more than its budget is not scored;
- the same model, in the precision of the problem (float64 for oracles);
- the error is taken at the noise level at which the sampler itself stops;
- every sampler of another library is run over its grid options, and its best one is chosen on the
  very samples that are scored, which favours it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise, solvers
from ebbflow.benchmark.problems import Problem
from ebbflow.plan import Plan
from ebbflow.sampling import sample
from ebbflow.solvers import Solver

OURS = "ebbflow"
AUTO = "auto"
PLAIN = "auto, no statistics"
TOLERANCES = (0.1, 0.03, 0.01, 1e-3, 1e-4)
"""What adaptive solvers are asked for."""
PLANS = ".json"
"""How the name of a plan's file ends."""
FLIP = 0.1
"""A sample whose error is above this times the data's deviation has landed elsewhere."""


@dataclass(frozen=True)
class Row:
    """One sampler at one setting of one problem; what a line of the CSV says.

    budget: evaluations allowed, or None for an adaptive solver. evaluations: spent a sample.
    rms, mean, median, p95: of the samples' errors, each the root mean square over its coordinates;
    flipped: the share above `FLIP` deviations; all None for stochastic samplers, whose samples have
    no path to follow. sliced, energy, frechet: distances to fresh data. stops: sigma/alpha at the
    end. seconds: wall time.
    """

    problem: str
    setting: str
    library: str
    method: str
    configuration: str
    budget: int | None
    evaluations: float
    rms: float | None
    mean: float | None
    median: float | None
    p95: float | None
    flipped: float | None
    sliced: float | None
    energy: float | None
    frechet: float | None
    seconds: float
    stops: float
    samples: int

    @property
    def name(self) -> str:
        """The method, with its library unless it is ours."""
        return self.method if self.library == OURS else f"{self.library} {self.method}"


class Model:
    """A denoiser without its schedule, `model(x, alpha, sigma) = E[x_0 | alpha x_0 + sigma eps]`.

    It counts its calls. alpha and sigma are floats and may have any common scale; alpha may be 0.
    Raises ValueError for sigma/alpha that the denoiser's schedule does not reach.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        self.denoiser = problem.wide
        self.dtype = problem.dtype
        self.condition = problem.condition(count)
        self.calls = 0

    @torch.no_grad()
    def __call__(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        self.calls += 1
        log_snr = 2 * (math.log(alpha) - math.log(sigma)) if alpha else -math.inf
        schedule = self.denoiser.schedule
        t = schedule.time(log_snr)
        scale = torch.hypot(schedule.alpha(t), schedule.sigma(t)).item() / math.hypot(alpha, sigma)
        answer = self.denoiser((x * scale).to(self.dtype), t.item(), **self.condition)
        return answer.to(torch.promote_types(x.dtype, answer.dtype))


class Reference:
    """The exact path of the probability-flow ODE from given noise, at any level.

    Fourth-order Runge-Kutta for `du/dtheta = (cos(theta) u - D) / sin(theta)`, where
    `u = x / |(alpha, sigma)|` and `theta = atan(sigma/alpha)`: uniform in theta down to 45 degrees,
    then uniform in log tan(theta) down to `floor`, where the path ends in D. The steps are doubled
    until the change, divided by 15, is less than `tolerance` deviations, or `most` are reached;
    `error` is that figure, a root mean square.
    """

    def __init__(
        self, model: Model, start: Tensor, ratio: float, problem: Problem, most: int = 256
    ) -> None:
        self.model = model
        self.start = start.double()
        self.top = ratio
        self.floor = problem.floor
        steps = 16 if problem.dtype == torch.float32 else 64
        self._path(steps)
        self.error = math.inf
        while self.error > problem.tolerance and steps < most:
            steps *= 2
            before = self.end
            self._path(steps)
            change = (self.end - before).square().mean().sqrt().item() / 15
            self.error = change / (problem.deviation or self.deviation)

    @property
    def deviation(self) -> float:
        """Of the samples at the end of the path, the root mean square over coordinates."""
        return (self.end - self.end.mean(0)).square().mean().sqrt().item()

    def _path(self, steps: int) -> None:
        half = steps // 2
        thetas = [
            math.atan(self.top) + (math.pi / 4 - math.atan(self.top)) * k / half
            for k in range(half)
        ]
        # At theta = 90 degrees the tangent is infinite and the state is the noise itself.
        levels = [self.top, *(math.tan(theta) for theta in thetas[1:])]
        levels += [self.floor ** (k / half) for k in range(half + 1)]
        self.levels = levels
        self.states = [self.start]
        for high, low in pairwise(levels):
            self.states.append(self._step(self.states[-1], high, low))
        self.end = self.model(self.states[-1], *_unit(self.floor))
        self.stored: dict[float, Tensor] = {0.0: self.end}

    def _step(self, u: Tensor, high: float, low: float) -> Tensor:
        by_angle = high > 1
        first, last = (
            (math.atan(high), math.atan(low)) if by_angle else (math.log(high), math.log(low))
        )
        h = last - first

        def slope(u: Tensor, at: float) -> Tensor:
            ratio = math.exp(at) if not by_angle else math.tan(at) if at < math.pi / 2 else math.inf
            cos, sin = _unit(ratio)
            # d theta / d log tan(theta) = sin(theta) cos(theta)
            return (cos * u - self.model(u, cos, sin)) * (1 / sin if by_angle else cos)

        k1 = slope(u, first)
        k2 = slope(u + h / 2 * k1, first + h / 2)
        k3 = slope(u + h / 2 * k2, first + h / 2)
        k4 = slope(u + h * k3, last)
        return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def at(self, ratio: float) -> Tensor:
        """The state u = x / |(alpha, sigma)| (count, *shape) at sigma/alpha = `ratio`."""
        ratio = 0.0 if ratio < self.floor else ratio
        if ratio > self.top * (1 + 1e-6):
            raise ValueError(f"sigma/alpha = {ratio:g} is above the start at {self.top:g}")
        if ratio not in self.stored:
            ratio = min(ratio, self.top)
            k = max(k for k, level in enumerate(self.levels) if level >= ratio)
            state = self.states[k]
            self.stored[ratio] = (
                state if self.levels[k] == ratio else self._step(state, self.levels[k], ratio)
            )
        return self.stored[ratio]


def _unit(ratio: float) -> tuple[float, float]:
    """(cos, sin) of atan(ratio)."""
    if math.isinf(ratio):
        return 0.0, 1.0
    length = math.hypot(1.0, ratio)
    return 1 / length, ratio / length


class Case:
    """A problem with its noise: `count` samples of `seed`, and the reference, computed once."""

    def __init__(self, problem: Problem, count: int, seed: int) -> None:
        self.problem = problem
        self.count = count
        self.seed = seed
        self.noise = noise.normal(seed, range(count), 0, problem.shape, torch.float64)
        self.noise = self.noise.to(problem.device)
        ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
        schedule = problem.denoiser.schedule
        ratios = torch.exp(-schedule.log_snr(ends) / 2).tolist()
        self.top, self.bottom = ratios[0], ratios[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.problem.shape)

    def model(self) -> Model:
        """A new counter on the problem's denoiser."""
        return Model(self.problem, self.count)

    @cached_property
    def reference(self) -> Reference:
        start = self.noise * _unit(self.top)[1]
        return Reference(self.model(), start, self.top, self.problem)

    @property
    def deviation(self) -> float:
        return self.problem.deviation or self.reference.deviation

    def start(self, alpha: float, sigma: float) -> Tensor:
        """The state at which a sampler in the frame (alpha, sigma) begins: `sigma` times the noise.

        Where the process itself begins without signal, a sampler that cannot gets the exact state
        at its own first level, for free.
        """
        if math.isinf(self.top) and alpha:
            return self.reference.at(sigma / alpha) * math.hypot(alpha, sigma)
        return self.noise * sigma

    def errors(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """(count,): each sample's root mean square error over coordinates, in units of x_0."""
        exact = self.reference.at(sigma / alpha) * math.hypot(1.0, sigma / alpha)
        return (x.double() / alpha - exact).flatten(1).square().mean(1).sqrt()

    def row(
        self,
        library: str,
        method: str,
        configuration: str,
        budget: int | None,
        evaluations: float,
        seconds: float,
        end: tuple[Tensor, float, float],
        stochastic: bool = False,
        distances: bool = True,
    ) -> Row:
        """Score the end (x, alpha, sigma) of one run."""
        x, alpha, sigma = end
        figures: tuple[float | None, ...] = (None,) * 5
        if not stochastic:
            e = self.errors(x, alpha, sigma)
            figures = (
                e.square().mean().sqrt().item(),
                e.mean().item(),
                e.median().item(),
                torch.quantile(e, 0.95).item(),
                (e > FLIP * self.deviation).double().mean().item(),
            )
        row = Row(
            self.problem.name,
            self.problem.setting,
            library,
            method,
            configuration,
            budget,
            evaluations,
            *figures,  # rms to flipped
            *(None, None, None),
            seconds=seconds,
            stops=sigma / alpha,
            samples=self.count,
        )  # pyright: ignore[reportCallIssue]
        return self.with_distances(row, x / alpha) if distances else row

    def with_distances(self, row: Row, samples: Tensor) -> Row:
        """The row with the distances of its samples to fresh data, where there are data."""
        if self.problem.distances is None or not bool(torch.isfinite(samples).all()):
            return row
        found = self.problem.distances(samples, self.seed)
        return replace(row, sliced=found.sliced, energy=found.energy, frechet=found.frechet)


def solver_called(name: str) -> Solver:
    """The solver of a row's name; the default solver has two rows, with and without statistics."""
    return solvers.get(AUTO if name == PLAIN else name)


def run_ours(case: Case, name: str, budgets: Sequence[int]) -> list[Row]:
    """Rows of one of our solvers, or of a plan's file, through `ebbflow.sample` like any user's.

    An adaptive solver is asked for each of `TOLERANCES` instead of being given a budget. A budget
    that does not suffice for one step is left out, and so is a solver that needs what the model
    does not have.
    """
    problem = case.problem.bare() if name == PLAIN else case.problem
    if name.endswith(PLANS):
        plan = Plan.load(name)
        how = {"plan": plan}
        return [_run(case, problem, Path(name).stem, "", plan.nfe, how, plan.stochastic)]
    solver = solver_called(name)
    has = {"jvp"} | ({"statistics"} if problem.denoiser.statistics is not None else set())
    if not solver.needs <= has:
        return []
    if solver.adaptive:
        settings = [
            (f"tolerance {tolerance:g}", None, solvers.get(name, tolerance=tolerance))
            for tolerance in TOLERANCES
        ]
    else:
        settings = [("", nfe, solver) for nfe in budgets if _suffices(nfe, solver, problem)]
    return [
        _run(case, problem, name, words, nfe, {"solver": one, "nfe": nfe}, one.stochastic)
        for words, nfe, one in settings
    ]


def _suffices(nfe: int, solver: Solver, problem: Problem) -> bool:
    denoiser = problem.denoiser
    try:
        solver.largest(denoiser.schedule, nfe, denoiser.statistics)
    except ValueError:
        return False
    return True


def _run(
    case: Case,
    problem: Problem,
    name: str,
    configuration: str,
    budget: int | None,
    how: Mapping[str, Any],
    stochastic: bool,
) -> Row:
    schedule = problem.denoiser.schedule
    result = sample(
        problem.denoiser,
        case.shape,
        x_init=(case.noise * schedule.sigma(1.0).item()).to(problem.dtype),
        seed=case.seed,
        full=True,
        **how,
        **problem.condition(case.count),
    )
    alpha, sigma = schedule.alpha(0.0).item(), schedule.sigma(0.0).item()
    spent = float(result.nfe) if budget else result.evaluations.double().mean().item()
    end = (result.samples, alpha, sigma)
    seconds = result.seconds
    return case.row(OURS, name, configuration, budget, spent, seconds, end, stochastic=stochastic)
