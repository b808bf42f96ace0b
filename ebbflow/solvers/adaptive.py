"""Solvers that choose their steps: a tolerance in, evaluations out, each sample on its own.

Steps are measured in the angle atan(sigma/alpha), which is finite at both ends of every schedule,
and states by their level hypot(alpha, sigma), so that errors mean the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ebbflow import grids
from ebbflow.schedules import Schedule, along
from ebbflow.solvers.stepping import Model, Point, Stepping, Walk
from ebbflow.statistics import Statistics

LOOSEST = 3e-5
"""A first run under a larger tau takes so few steps that its estimates mean little."""


class Place(NamedTuple):
    """Where samples are on their way: (n,) float64 each, on the CPU."""

    angle: Tensor
    time: Tensor
    alpha: Tensor
    sigma: Tensor

    @staticmethod
    def of_time(schedule: Schedule, t: Tensor) -> Place:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Place(torch.atan2(sigma, alpha), t, alpha, sigma)

    @staticmethod
    def of_angle(schedule: Schedule, angle: Tensor) -> Place:
        t = schedule.time(-2 * torch.log(torch.tan(angle)))
        return Place(angle, t, schedule.alpha(t), schedule.sigma(t))

    @property
    def level(self) -> Tensor:
        return torch.hypot(self.alpha, self.sigma)

    def at(self, rows: Tensor) -> Place:
        return Place(*(column[rows] for column in self))

    def put(self, rows: Tensor, other: Place) -> Place:
        return Place(*(a.index_copy(0, rows, b) for a, b in zip(self, other, strict=True)))


class Attempt(NamedTuple):
    """One step of a pair: the state there, its estimated error, and the prediction if it has it."""

    state: Tensor
    error: Tensor
    clean: Tensor | None = None


def times(values: Tensor, x: Tensor) -> Tensor:
    """`values` (n,) times x (n, *shape)."""
    return along(values, x).to(x.device, x.dtype) * x


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x with other rows; a copy, so that gradients pass."""
    return x.index_copy(0, rows.to(x.device), values)


def norm(x: Tensor) -> Tensor:
    """Root mean square over each sample's elements, (n,) float64 on the CPU."""
    return x.detach().double().flatten(1).square().mean(1).sqrt().cpu()


def growth(error: Tensor, power: float) -> Tensor:
    """By what the next step is longer: `0.9 error^-power` between 1/5 and 5.

    Rounded down to an eighth of a power of two, so that a sum which a machine rounds in another
    order, as it may in another batch, gives the same step.
    """
    factor = 0.9 * error.clamp(min=1e-30) ** -power
    return torch.exp2(torch.floor(8 * torch.log2(factor.clamp(0.2, 5))) / 8)


@dataclass(frozen=True)
class Adaptive(Stepping):
    """A solver with its own steps: `tolerance` in, at most `cap` evaluations a sample out."""

    tolerance: float = 1e-4
    cap: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be positive, such as 1e-4, got {self.tolerance}")
        if not isinstance(self.cap, int) or isinstance(self.cap, bool) or self.cap < 1:
            raise ValueError(f"cap must be an integer of at least 1, got {self.cap!r}")

    @property
    def adaptive(self) -> bool:
        return True

    def calls(self, schedule: Schedule, times: grids.Times) -> None:
        return None

    def plan(
        self,
        schedule: Schedule,
        steps: int | None = None,
        *,
        times: Sequence[float] | Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> Walk:
        """From times[0] to times[1], from 1 to 0 unless given; it takes no number of steps."""
        if steps is not None:
            raise ValueError(
                f"{self.name} chooses its own steps, got steps={steps}: say how accurate, "
                f'solvers.get("{self.name}", tolerance={self.tolerance:g}), or nfe= for a cap'
            )
        ends = (1.0, 0.0) if times is None else tuple(float(t) for t in times)
        if len(ends) != 2:
            raise ValueError(
                f"{self.name} chooses its own nodes, got {len(ends)} times: give start and end"
            )
        return super().plan(schedule, times=ends, statistics=statistics)

    def largest(self, schedule: Schedule, nfe: int, statistics: Statistics | None = None) -> Walk:
        """The same with a cap of `nfe` evaluations."""
        return replace(self, cap=nfe).plan(schedule, statistics=statistics)


@dataclass(frozen=True)
class Pair(Adaptive):
    """A deterministic method with an embedded estimate of its error, confirmed by a second run.

    A step is taken when the root mean square of the estimate over the sample's elements is at most
    `tau max(1, rms(x))`, x and the estimate divided by hypot(alpha, sigma). That bounds what a step
    adds, not what the flow makes of it: between two modes an error may grow a hundredfold. So each
    sample runs at `tau = tolerance` (or `LOOSEST`) and again at a tenth. In the limit errors are
    proportional to tau, so the ends' difference e is the first run's error and a tenth of it the
    second's; its result is kept if the more cautious estimate `e sqrt(tau_2/tau_1)` is at most
    `tolerance max(1, rms(x_0)) / 2`. If not, the sample runs again at the tau that this asks for.
    confirm=False runs once at tau = tolerance, as the papers do.

    A sample that `cap` stops keeps its last end if it has one; in `Result.times` is then NaN, and
    else the time that it reached.
    """

    confirm: bool = True

    weaker: ClassVar[int]
    """Order of the solution that the estimate compares with."""

    cost: ClassVar[int]
    """The most evaluations that an attempt takes."""

    def singular(self, here: Place, there: Place) -> Tensor:
        """Steps for which the method has no formula: those to sigma = 0, at the least."""
        return there.sigma == 0

    def attempt(
        self, model: Model, rows: Tensor, x: Tensor, clean: Tensor, here: Place, there: Place
    ) -> Attempt:
        """A step of samples `rows`, from state x with prediction `clean`, where not singular."""
        raise NotImplementedError

    def walk(self, model: Model, x: Tensor, walk: Walk) -> Iterator[Point]:
        _require_precision(self, x)
        rows = torch.arange(len(x))
        nodes = torch.tensor(walk.times, dtype=torch.float64)[:, None].expand(2, len(x))
        start, end = (Place.of_time(walk.schedule, t) for t in nodes)
        power, span = 1 / (self.weaker + 1), end.angle - start.angle
        loosest = LOOSEST if self.confirm else math.inf
        tau = torch.full_like(span, min(self.tolerance, loosest))
        length, never = span / 4 * tau.clamp(max=1) ** power, torch.zeros_like(rows) > 0
        opening = Run(x, model(x, nodes[0], rows), start, length, never)
        run, ends = opening, _Ends(x, x, torch.full_like(span, math.nan), never)
        while len(rows := rows[model.evaluations[rows] + self.cost <= self.cap]):
            run = run.informed(model, rows)
            now, goal = run.place.at(rows), end.at(rows)
            last = run.length[rows].abs() >= (goal.angle - now.angle).abs()
            there = Place.of_angle(
                walk.schedule, torch.where(last, goal.angle, now.angle + run.length[rows])
            ).put(last.nonzero()[:, 0], goal.at(last))
            tried = self._try(model, rows, run.x[rows], run.clean[rows], now, there)
            size = norm(tried.state).maximum(there.level)
            error = norm(tried.error) / (size * tau[rows])
            length = (there.angle - now.angle) * growth(error, power)
            run = run.after(rows, tried, there, error <= 1, length)
            home = rows[(error <= 1) & last]
            if len(home):
                ends, wanted = ends.judged(home, run, tau[home], end.at(home), self)
                tau = tau.index_copy(0, home, wanted)
                run, rows = run.again(home, opening), rows[~ends.final[rows]]
        arrived = ~torch.isnan(ends.tau)
        model.times = torch.where(
            arrived, torch.where(ends.final, end.time, math.nan), run.place.time
        )
        at = arrived.nonzero()[:, 0]
        state, clean = put(run.x, at, ends.x[at]), put(run.clean, at, ends.clean[at])
        yield Point(walk.times[1], state, clean)

    def _try(
        self, model: Model, rows: Tensor, x: Tensor, clean: Tensor, here: Place, there: Place
    ) -> Attempt:
        """`attempt`, or the open formulas where that is singular."""
        odd = self.singular(here, there)
        if not bool(odd.any()):
            return self.attempt(model, rows, x, clean, here, there)
        to, out = odd.nonzero()[:, 0], Attempt(x, x, clean)
        part = open_step(model, rows[to], x[to], clean[to], here.at(to), there.at(to))
        if bool(odd.all()):
            return part
        out = Attempt(put(x, to, part.state), put(x, to, part.error), clean)
        to = (~odd).nonzero()[:, 0]
        part = self.attempt(model, rows[to], x[to], clean[to], here.at(to), there.at(to))
        new = None if part.clean is None else put(clean, to, part.clean)
        return Attempt(put(out.state, to, part.state), put(out.error, to, part.error), new)


@dataclass
class Run:
    """Where each sample is on its way, and by what angle it steps next."""

    x: Tensor
    clean: Tensor
    place: Place
    length: Tensor
    stale: Tensor

    def informed(self, model: Model, rows: Tensor) -> Run:
        """With the predictions that are missing."""
        new = rows[self.stale[rows]]
        if not len(new):
            return self
        clean = model(self.x[new], self.place.time[new], new)
        return replace(
            self, clean=put(self.clean, new, clean), stale=self.stale.index_fill(0, new, False)
        )

    def after(
        self, rows: Tensor, tried: Attempt, there: Place, taken: Tensor, length: Tensor
    ) -> Run:
        """Those of `rows` whose step is taken are there; all go on with their next length."""
        moved, at = rows[taken], taken.nonzero()[:, 0]
        clean = self.clean if tried.clean is None else put(self.clean, moved, tried.clean[at])
        return Run(
            put(self.x, moved, tried.state[at]),
            clean,
            self.place.put(moved, there.at(taken)),
            self.length.index_copy(0, rows, length),
            self.stale.index_fill(0, moved, tried.clean is None),
        )

    def again(self, rows: Tensor, opening: Run) -> Run:
        """`rows` back at the start."""
        at = rows
        return Run(
            put(self.x, rows, opening.x[at]),
            put(self.clean, rows, opening.clean[at]),
            self.place.put(rows, opening.place.at(rows)),
            self.length.index_copy(0, rows, opening.length[rows]),
            self.stale.index_fill(0, rows, False),
        )


@dataclass
class _Ends:
    """Where each sample's last complete run came, under which tau, and whether that is final."""

    x: Tensor
    clean: Tensor
    tau: Tensor
    final: Tensor

    def judged(
        self, rows: Tensor, run: Run, tau: Tensor, end: Place, pair: Pair
    ) -> tuple[_Ends, Tensor]:
        """With the ends of `rows`; and the tau at which those run next that are not final."""
        x = run.x[rows]
        apart = norm(x - self.x[rows]) / norm(x).maximum(end.level)
        estimate = apart * (tau / self.tau[rows]).sqrt() / pair.tolerance
        final = (estimate <= 0.5) | (not pair.confirm)
        wanted = tau * (0.3 / estimate).nan_to_num(0.1).clamp(1e-3, 0.1)
        # At sigma = 0 a state is its own prediction.
        clean = x if end.sigma[0] == 0 else run.clean[rows]
        ends = _Ends(
            put(self.x, rows, x),
            put(self.clean, rows, clean),
            self.tau.index_copy(0, rows, tau),
            self.final.index_copy(0, rows, final),
        )
        return ends, wanted


def open_step(
    model: Model,
    rows: Tensor,
    x: Tensor,
    clean: Tensor,
    here: Place,
    there: Place,
) -> Attempt:
    """Runge-Kutta 3(2) without an evaluation at its end, for steps from or to an infinite log-SNR.

    To sigma = 0 it integrates `d(x/alpha) = E[eps | x] d(sigma/alpha)`, from or to alpha = 0
    `d(x/sigma) = E[x_0 | x] d(alpha/sigma)`; both are exact for a prediction that does not change.
    Ralston's nodes 0, 1/2, 3/4, compared with the midpoint rule.
    """
    quiet = there.sigma == 0
    unit = torch.where(quiet, here.alpha, here.sigma)
    begin = torch.where(quiet, here.sigma, here.alpha) / unit
    unit_there = torch.where(quiet, there.alpha, there.sigma)
    h = torch.where(quiet, there.sigma, there.alpha) / unit_there - begin

    def slope(x: Tensor, clean: Tensor, place: Place) -> Tensor:
        eps = times(1 / place.sigma, x - times(place.alpha, clean))
        return torch.where(along(quiet, x).to(x.device), eps, clean)

    z, slopes = times(1 / unit, x), [slope(x, clean, here)]
    for node in (0.5, 0.75):
        ratio = begin + node * h
        place = Place.of_angle(model.schedule, torch.atan(torch.where(quiet, ratio, 1 / ratio)))
        query = times(torch.where(quiet, place.alpha, place.sigma), z + times(node * h, slopes[-1]))
        slopes.append(slope(query, model(query, place.time, rows), place))
    first, second, third = slopes
    rise = times(h / 9, 2 * first + 3 * second + 4 * third)
    error = times(h / 9, 2 * first - 6 * second + 4 * third)
    return Attempt(times(unit_there, z + rise), times(unit_there, error))


def _require_precision(solver: Adaptive, x: Tensor) -> None:
    least = 100 * torch.finfo(x.dtype).eps
    if solver.tolerance < least:
        raise ValueError(
            f"tolerance {solver.tolerance:g} is less than {x.dtype} resolves, {least:.1e}: "
            "give x_init in float64, or a larger tolerance"
        )
