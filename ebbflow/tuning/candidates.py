"""What the solver search goes over: samplers of a budget, and their mutations."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ebbflow.plan import Plan
from ebbflow.schedules import Schedule
from ebbflow.solvers import gaussian
from ebbflow.solvers.base import Levels
from ebbflow.solvers.quadrature import GaussianResidual
from ebbflow.statistics import Statistics
from ebbflow.tuning.unified import ESTIMATORS, Choice, Choices

FARTHEST = 12.0
"""In lambda, of an inner node."""


class Candidate(NamedTuple):
    """Choices whose nodes are given in lambda = log(alpha/sigma); the ends are the schedule's.

    whole: a solver that makes all steps in its own way, instead of the choices.
    """

    lambda_: tuple[float, ...]
    choices: tuple[Choice, ...]
    whole: GaussianResidual | None = None


@dataclass(frozen=True)
class Space:
    """What is searched: samplers of at most `nfe` calls from 1 to 0 on a schedule.

    These are the framework's and, with their parameters free, the library's own solvers, which are
    of another kind. statistics: with every axis.
    """

    schedule: Schedule
    nfe: int
    statistics: Statistics | None = None

    @property
    def defaults(self) -> list[Candidate]:
        """The library's own solvers, with statistics where there are some, and without."""
        found = []
        for solver in (gaussian.residual, gaussian.unit)[self.statistics is None :]:
            nodes = solver.nodes(self.schedule, self.nfe, self.statistics)
            lambda_ = Levels.of(self.schedule, nodes).lambda_
            found.append(Candidate(lambda_, (Choice(),) * self.nfe, solver))
        return found

    def candidate(self, made: Choices) -> Candidate:
        levels = Levels.of(self.schedule, made.times)
        return self.canonical(Candidate(levels.lambda_, made.choices))

    def plan(self, candidate: Candidate, origin: Mapping[str, Any] | None = None) -> Plan:
        inner = torch.tensor(candidate.lambda_[1:-1], dtype=torch.float64)
        times = (1.0, *self.schedule.time(2 * inner).tolist(), 0.0)
        if candidate.whole is None:
            return Choices(times, candidate.choices).plan(self.schedule, origin)
        plan = candidate.whole.plan(self.schedule, times=times, statistics=self.statistics)
        return replace(plan, origin={**plan.origin, **(origin or {})})

    def cost(self, candidate: Candidate) -> int:
        """Denoiser calls."""
        if candidate.whole is not None:
            return len(candidate.choices)
        return sum(1 if _exact(candidate, k) else c.calls for k, c in enumerate(candidate.choices))

    def canonical(self, candidate: Candidate) -> Candidate:
        """The same sampler with every choice that changes nothing at its first value."""
        steps = []
        if candidate.whole is not None:
            return candidate._replace(choices=(Choice(),) * len(candidate.choices))
        for k, choice in enumerate(candidate.choices):
            if _exact(candidate, k):
                steps.append(Choice())
                continue
            past = sum(math.isfinite(v) for v in candidate.lambda_[:k])
            order = min(choice.order, choice.calls + past)
            corrector = choice.corrector and k < len(candidate.choices) - 1
            counts = {order, order + corrector}
            special = {3, 4} if choice.estimator == "difference" else {2}
            estimator = choice.estimator if counts & special else "full"
            steps.append(Choice(choice.prediction, order, estimator, corrector, choice.calls))
        return Candidate(candidate.lambda_, tuple(steps))

    def allows(self, candidate: Candidate) -> bool:
        rising = all(a < b for a, b in pairwise(candidate.lambda_))
        within = all(abs(v) < FARTHEST for v in candidate.lambda_[1:-1])
        return rising and within and self.cost(candidate) <= self.nfe


def _exact(candidate: Candidate, k: int) -> bool:
    return math.isinf(candidate.lambda_[k]) or math.isinf(candidate.lambda_[k + 1])


def propose(
    parents: Sequence[Candidate],
    space: Space,
    chance: random.Random,
    known: Container[Candidate] = (),
    count: int = 240,
) -> list[Candidate]:
    """Mutations of parents that are not known yet; the earlier a parent, the more children."""
    found: dict[Candidate, None] = {}
    for _ in range(2 * count):
        child = parents[int(len(parents) * chance.random() ** 2)]
        for _ in range(1 + int(chance.expovariate(1.0))):
            changed = mutate(child, chance)
            child = changed if space.allows(changed) else child
        child = space.canonical(child)
        if child not in known:
            found[child] = None
        if len(found) == count:
            break
    return list(found)


def mutate(candidate: Candidate, chance: random.Random) -> Candidate:
    """One decision changed: nodes moved, a node put elsewhere, a step joined, cut or chosen anew.

    The nodes may be out of order and the calls too many: see `Space.allows`.
    """
    moves = (_move_one, _move_all, _relocate, _regroup, _choose)
    return chance.choices(moves, (4, 2, 1, 1, 4))[0](candidate, chance)


def _move_one(candidate: Candidate, chance: random.Random) -> Candidate:
    lambda_ = list(candidate.lambda_)
    if len(lambda_) > 2:
        i = chance.randrange(1, len(lambda_) - 1)
        gaps = [g for j in (i - 1, i + 1) if math.isfinite(g := abs(lambda_[j] - lambda_[i]))]
        lambda_[i] += chance.gauss(0, 1) * min(gaps, default=1.0) * 10 ** chance.uniform(-2, 0)
    return candidate._replace(lambda_=tuple(lambda_))


def _move_all(candidate: Candidate, chance: random.Random) -> Candidate:
    """Shift the inner nodes and spread them about one of them."""
    first, *inner, last = candidate.lambda_
    size = 10 ** chance.uniform(-2, -0.3)
    shift, spread = chance.gauss(0, size), math.exp(chance.gauss(0, size))
    centre = chance.choice(inner) if inner else 0.0
    moved = (centre + shift + spread * (v - centre) for v in inner)
    return candidate._replace(lambda_=(first, *moved, last))


def _relocate(candidate: Candidate, chance: random.Random) -> Candidate:
    """Take a node away, mostly, and cut a step in two."""
    lambda_, steps = list(candidate.lambda_), list(candidate.choices)
    if len(steps) > 1 and chance.random() < 0.8:
        i = chance.randrange(1, len(steps))
        del lambda_[i], steps[i]
    k = chance.randrange(len(steps))
    start, end = lambda_[k], lambda_[k + 1]
    if math.isinf(start) and math.isinf(end):
        start, end = -2.0, 2.0
    start = end - 2.0 if math.isinf(start) else start
    end = start + 2.0 if math.isinf(end) else end
    lambda_.insert(k + 1, start + chance.uniform(0.1, 0.9) * (end - start))
    steps.insert(k, steps[k])
    return Candidate(tuple(lambda_), tuple(steps), candidate.whole)


def _regroup(candidate: Candidate, chance: random.Random) -> Candidate:
    """Two steps become one of as many calls, or one of many calls as many steps."""
    if candidate.whole is not None:
        return candidate
    lambda_, steps = list(candidate.lambda_), list(candidate.choices)
    k = chance.randrange(len(steps))
    start, end, calls = lambda_[k], lambda_[k + 1], steps[k].calls
    if calls > 1 and math.isfinite(end - start):
        lambda_[k + 1 : k + 1] = [start + i / calls * (end - start) for i in range(1, calls)]
        steps[k : k + 1] = [replace(steps[k], calls=1)] * calls
    elif k + 1 < len(steps) and calls + steps[k + 1].calls <= 3:
        steps[k : k + 2] = [replace(steps[k], calls=calls + steps[k + 1].calls)]
        del lambda_[k + 1]
    return Candidate(tuple(lambda_), tuple(steps))


def _choose(candidate: Candidate, chance: random.Random) -> Candidate:
    if (solver := candidate.whole) is not None:
        name = chance.choice(("length", "reach", "history"))
        value = getattr(solver, name) * math.exp(chance.gauss(0, 0.3))
        if name == "history":
            value = min(4, max(1, solver.history + chance.choice((-1, 1))))
        return candidate._replace(whole=replace(solver, **{name: value}))
    k = chance.randrange(len(candidate.choices))
    old = candidate.choices[k]
    new: dict[str, Any] = chance.choice(
        (
            {"prediction": "noise" if old.prediction == "x0" else "x0"},
            {"order": min(3, max(1, old.order + chance.choice((-1, 1))))},
            {"estimator": chance.choice(ESTIMATORS)},
            {"corrector": not old.corrector},
        )
    )
    steps = list(candidate.choices)
    steps[k] = replace(old, **new)
    return candidate._replace(choices=tuple(steps))
