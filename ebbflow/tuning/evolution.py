"""AutoDiffusion's evolutionary search, and the times that it finds for a solver."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ebbflow import solvers
from ebbflow.denoiser import Denoiser
from ebbflow.grids import Times
from ebbflow.plan import Plan
from ebbflow.solvers import Solver
from ebbflow.tuning.evaluation import Objective, Trial, mean_error
from ebbflow.tuning.references import References, statistics_of

Gene = TypeVar("Gene", bound=Hashable)
FINALISTS = 8


@dataclass(frozen=True)
class Evolution:
    """The numbers of an evolutionary search.

    Args:
        population: candidates an epoch; epochs: at most, None for as many as the budget allows.
        survivors: the best of all so far, which have the children.
        mutants, crosses: children an epoch; what they leave of the population is drawn afresh.
        rate: at which a part of a mutant changes.
        near: share of the changes that keep a part near where it was. AutoDiffusion has none; a
            search over many times needs it to settle.
    """

    population: int = 50
    epochs: int | None = 20
    survivors: int = 10
    mutants: int = 25
    crosses: int = 25
    rate: float = 0.1
    near: float = 0.5

    def __post_init__(self) -> None:
        for name in ("population", "survivors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not (self.mutants >= 0 <= self.crosses):
            raise ValueError(f"mutants {self.mutants} and crosses {self.crosses} must not be < 0")
        if not 0 < self.rate <= 1 or not 0 <= self.near <= 1:
            raise ValueError(
                f"rate {self.rate} must lie in (0, 1] and near {self.near} in [0, 1]: they are "
                "probabilities"
            )


STANDARD = Evolution()


@dataclass(frozen=True)
class Variation:
    """How candidates come about: `draw()`, `mutate(a)` and `cross(a, b)`, each of which may return
    one that is known already."""

    draw: Callable[[], Any]
    mutate: Callable[[Any], Any]
    cross: Callable[[Any, Any], Any]


def evolve(
    measure: Callable[[Gene], float | None],
    first: Sequence[Gene],
    vary: Variation,
    chance: random.Random,
    evolution: Evolution,
) -> list[float]:
    """The least error after each epoch, the survivors being kept: it never rises.

    measure: the error of a candidate, None once nothing more may be measured, which ends the
    search; no candidate is measured twice.
    AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
    Diffusion Model Acceleration, algorithm 1.
    """
    known: set[Gene] = set()
    survivors: list[tuple[float, Gene]] = []
    history: list[float] = []

    def some(count: int, make: Callable[[], Gene]) -> list[Gene]:
        """Up to `count` new candidates, of ten times as many attempts."""
        found: dict[Gene, None] = {}
        for _ in range(10 * count):
            if len(found) == count:
                break
            gene = make()
            if gene not in known:
                found[gene] = None
        known.update(found)
        return list(found)

    def parent() -> Gene:
        return chance.choice(survivors)[1]

    population = list(dict.fromkeys(first))
    known.update(population)
    while evolution.epochs is None or len(history) < evolution.epochs:
        population += some(evolution.population - len(population), vary.draw)
        measured: list[tuple[float, Gene]] = []
        for gene in population:
            error = measure(gene)
            if error is None:
                break
            measured.append((error, gene))
        survivors = sorted([*survivors, *measured], key=_error)[: evolution.survivors]
        history.append(survivors[0][0])
        if len(measured) < len(population) or not population:
            break
        population = some(evolution.mutants, lambda: vary.mutate(parent()))
        population += some(evolution.crosses, lambda: vary.cross(parent(), parent()))
        population = population[: evolution.population]
    return history


def _error(scored: tuple[float, Any]) -> float:
    return scored[0]


def search_times(
    denoiser: Denoiser,
    nfe: int = 8,
    *,
    references: References,
    seed: int = 0,
    evaluations: float | None = None,
    budget_seconds: float = 60.0,
    progress: bool = False,
    objective: Objective = mean_error,
    solver: str | Solver = "auto",
    grid: int | Sequence[float] = 1000,
    evolution: Evolution = STANDARD,
) -> Plan:
    """A solver through the times that serve this denoiser best, with at most `nfe` calls.

    Candidates are the inner nodes, drawn from a grid; the first ones are the solver's own nodes and
    mutants of them. What is returned is the best on a quarter of the references that the search
    does not see, where it is never worse than the solver's own nodes.

    Args:
        references: of this denoiser, by `ebbflow.tuning.references`.
        evaluations: denoiser calls a sample, at most; budget_seconds: of wall time; so does
            `evolution.epochs` end the search. The same seed and number of evaluations give the same
            plan, as long as the time suffices.
        objective: of samples and references; the mean distance unless given.
        solver: any that writes plans; it gets the denoiser's statistics or, without, those of the
            references.
        grid: the times to choose from, or how many, uniform in t.

    The plan's origin has the search, its seed, what was spent, the errors with the solver's own
    nodes and with these (held out), and "history", the least error after each epoch.
    Raises ValueError for a budget that does not suffice for two plans, for a solver that writes no
    plan, and for a grid of fewer times than there are nodes.
    AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
    Diffusion Model Acceleration, section 3 (time steps); the blocks are in `skipping`.
    """
    trial = Trial(denoiser, references, objective, evaluations, budget_seconds)
    trial.require(nfe, 2)
    schedule, chance = denoiser.schedule, random.Random(seed)
    solver = solvers.get(solver) if isinstance(solver, str) else solver
    known = statistics_of(denoiser, references)
    own = solver.largest(schedule, nfe, known)
    if not isinstance(own, Plan):
        raise ValueError(f"{solver.name} writes no plan: give a solver such as 'dpm-solver++2m'")
    count = len(own.times) - 2
    allowed = [k / grid for k in range(1, grid)] if isinstance(grid, int) else sorted(set(grid))
    if len(allowed) < count or not all(0 < t < 1 for t in allowed):
        raise ValueError(
            f"a grid of {len(allowed)} times for {count} inner nodes: give at least as many, all "
            "inside (0, 1)"
        )
    first, last = own.times[0], own.times[-1]
    # The finalists take a few evaluations at the end.
    reserve = FINALISTS if trial.evaluations > 8 * FINALISTS * nfe else 2

    def plan(inner: Times) -> Plan:
        nodes = (first, *inner, last)
        return solver.plan(schedule, times=nodes, statistics=known)

    def measure(inner: Times) -> float | None:
        if trial.errors and not trial.left(nfe, reserve):
            return None
        return trial.error(inner, plan(inner))

    vary = times_variation(allowed, count, chance, evolution)
    start = own.times[1:-1]
    first_ones = [start, *(vary.mutate(start) for _ in range(evolution.population // 2))]
    with trial.progress("searching times", progress):
        history = evolve(measure, first_ones, vary, chance, evolution)
        finalists = dict.fromkeys([start, *trial.best(reserve - 1)])
        checked = {inner: trial.check(plan(inner)) for inner in finalists}
    best = min(checked, key=checked.__getitem__)
    record = trial.record("AutoDiffusion times", seed, checked[start], checked[best])
    found = plan(best)
    return replace(found, origin={**found.origin, **record, "history": history})


def times_variation(
    allowed: Sequence[float], count: int, chance: random.Random, evolution: Evolution
) -> Variation:
    """Of decreasing tuples of `count` times among those allowed (in rising order)."""

    def full(some: set[float]) -> Times:
        """Made complete by random times that are not in use."""
        while len(some) < count:
            some.add(chance.choice(allowed))
        return tuple(sorted(some, reverse=True))

    def draw() -> Times:
        return full(set())

    def mutate(old: Times) -> Times:
        kept: set[float] = {t for t in old if chance.random() >= evolution.rate}
        if count and len(kept) == count:
            kept.remove(chance.choice(old))
        for t in sorted(set(old) - kept, reverse=True):
            if chance.random() < evolution.near:
                kept.add(near(t))
        return full(kept)

    def near(t: float) -> float:
        """At a distance whose order of magnitude is random, up to a tenth of the grid."""
        away = int(10 ** chance.uniform(0, 2) * len(allowed) / 1000) + 1
        i = bisect(allowed, t) - 1 + chance.choice((-away, away))
        return allowed[min(max(i, 0), len(allowed) - 1)]

    def cross(one: Times, two: Times) -> Times:
        return full({chance.choice(pair) for pair in zip(one, two, strict=True)})

    return Variation(draw, mutate, cross)
