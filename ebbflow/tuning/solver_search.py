"""S³: a search for the choices of every step, guided by a predictor that learns to rank them."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebbflow import grids, solvers
from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.schedules import Schedule
from ebbflow.solvers import gaussian
from ebbflow.solvers.base import Levels
from ebbflow.solvers.quadrature import GaussianResidual
from ebbflow.statistics import Statistics
from ebbflow.tuning.evaluation import Objective, Trial, mean_error
from ebbflow.tuning.references import References
from ebbflow.tuning.unified import ESTIMATORS, Choice, Choices, choices

SEEDS = (
    "dpm-solver++2m",
    "unipc-b2-2",
    "dpm-solver++3m",
    "unipc-b2-3",
    "deis-logrhoab1",
    "dpm-solver-2m",
    "ddim",
    "dpm-solver++2s",
    "dpm-solver++3s",
    "dpm-solver-2",
    "dpm-solver-3",
)
"""The hand-made samplers that a search starts from, each on every grid."""

PARENTS, PROPOSED, EVALUATED, SURPRISES = 16, 240, 20, 4
FINALISTS = 8
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

    These are the framework's and, with its parameters free, the library's default, which for models
    with statistics is of another kind.
    """

    schedule: Schedule
    nfe: int
    statistics: Statistics | None = None

    @property
    def default(self) -> Candidate:
        known = self.statistics
        informed = known is not None and known.axes is not None
        solver = gaussian.residual if informed else gaussian.unit
        levels = Levels.of(self.schedule, solver.nodes(self.schedule, self.nfe, known))
        return Candidate(levels.lambda_, (Choice(),) * self.nfe, solver)

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


def search_solvers(
    denoiser: Denoiser,
    nfe: int = 8,
    *,
    references: References,
    seed: int = 0,
    evaluations: float | None = None,
    budget_seconds: float = 60.0,
    progress: bool = False,
    objective: Objective = mean_error,
) -> Plan:
    """The best sampler of at most `nfe` calls whose every step is chosen by itself.

    Stage 0 measures hand-made samplers; then, in turn, a predictor is fitted to rank what has been
    measured, the best are mutated, and those of the children that it ranks best are measured. What
    is returned is the best on a quarter of the references that the search does not see, where it
    is never worse than the best hand-made sampler, the library's default among them.

    Args:
        references: of this denoiser, by `ebbflow.tuning.references`.
        evaluations: denoiser calls a sample, at most; budget_seconds: of wall time. The same seed
            and number of evaluations give the same plan, as long as the time suffices.
        objective: of samples and references; the mean distance unless given.

    The plan's origin has the search, its seed, what was spent, the errors of the best hand-made
    sampler and of this one (held out), "history", the least error after each stage, and "kendall",
    the rank correlation of the predictor on measured choices that it was not fitted to.
    Raises ValueError for a budget that does not suffice for the default and one more.
    A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models, section 4.
    """
    trial = Trial(denoiser, references, objective, evaluations, budget_seconds)
    trial.require(nfe, 2)
    space = Space(denoiser.schedule, nfe, denoiser.statistics)
    chance = random.Random(seed)
    # The finalists take a few evaluations at the end.
    reserve = FINALISTS if trial.evaluations > 8 * FINALISTS * nfe else 2

    def measure(candidate: Candidate) -> bool:
        """False when the budget is spent."""
        if trial.errors and not trial.left(nfe, reserve):
            return False
        trial.error(candidate, space.plan(candidate))
        return True

    history: list[float] = []
    with trial.progress("searching solvers", progress):
        seeds = [space.candidate(made) for made in hand_made(denoiser, nfe)]
        for candidate in (space.default, *seeds):
            if not measure(candidate):
                break
        before = trial.best(1)[0]
        predictor = Predictor(nfe, seed)
        going = True
        while going:
            history.append(trial.errors[trial.best(1)[0]])
            predictor.fit(trial.errors)
            children = propose(trial.best(PARENTS), space, chance, trial.errors)
            predicted = predictor(children).tolist()
            ranked = [children[i] for i in sorted(range(len(children)), key=predicted.__getitem__)]
            surprises = chance.sample(ranked, min(SURPRISES, len(ranked)))
            chosen = dict.fromkeys([*ranked[:EVALUATED], *surprises])
            going = bool(chosen) and all(map(measure, chosen))
        finalists = dict.fromkeys([before, *trial.best(reserve - 1)])
        checked = {c: trial.check(space.plan(c)) for c in finalists}
    best = min(checked, key=checked.__getitem__)
    record = trial.record("S^3", seed, checked[before], checked[best])
    tau = held_out_correlation(trial.errors, nfe, seed)
    return space.plan(best, {**record, "history": history, "kendall": tau})


def hand_made(denoiser: Denoiser, nfe: int) -> list[Choices]:
    """The library's samplers that are points of the framework, on every grid, within `nfe`."""
    schedule, known = denoiser.schedule, denoiser.statistics
    automatic = solvers.get("auto")
    space = Space(schedule, nfe)

    def own(schedule: Schedule, steps: int) -> grids.Times:
        return automatic.nodes(schedule, steps, known)

    found: dict[Candidate, Choices] = {}
    for grid in (grids.log_snr, own, grids.angle, grids.karras, grids.uniform):
        for name in SEEDS:
            for steps in range(nfe, 0, -1):
                made = choices(name, schedule, grid(schedule, steps))
                candidate = space.candidate(made)
                if space.cost(candidate) <= nfe:
                    found.setdefault(candidate, made)
                    break
    return list(found.values())


def propose(
    parents: Sequence[Candidate],
    space: Space,
    chance: random.Random,
    known: Container[Candidate] = (),
    count: int = PROPOSED,
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


class Predictor:
    """A small network that ranks choices: the better, the lower its value.

    It sees the nodes in lambda and every choice, one slot a step, and is fitted to pairs:
    `max(0, margin - (f(worse) - f(better)))`. Fitting goes on from where it was.
    """

    def __init__(self, nfe: int, seed: int, width: int = 64) -> None:
        self.nfe = nfe
        self.seen: dict[Candidate, list[float]] = {}
        self.generator = torch.Generator().manual_seed(seed)
        sizes = (4 + nfe * _SLOT, width, width, 1)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layer = nn.Linear(a, b, device="cpu", dtype=torch.float32)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(b, a, generator=self.generator) * a**-0.5)
                layer.bias.zero_()
            layers += [layer, nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 3e-3, weight_decay=1e-2)
        self.shift, self.scale = torch.zeros(sizes[0]), torch.ones(sizes[0])

    def _inputs(self, candidates: Sequence[Candidate]) -> Tensor:
        for candidate in candidates:
            if candidate not in self.seen:
                self.seen[candidate] = features(candidate, self.nfe)
        return torch.tensor([self.seen[candidate] for candidate in candidates]).float()

    @torch.no_grad()
    def __call__(self, candidates: Sequence[Candidate]) -> Tensor:
        """(n,)"""
        if not candidates:
            return torch.zeros(0)
        return self.net((self._inputs(candidates) - self.shift) / self.scale)[:, 0]

    def fit(self, errors: Mapping[Candidate, float], steps: int = 100, batch: int = 128) -> None:
        """Learn the order of measured choices, the newest and the best among them."""
        known = list(errors)
        inputs, truth = self._inputs(known), torch.tensor([errors[c] for c in known]).double()
        self.shift, self.scale = inputs.mean(0), inputs.std(0, correction=0) + 0.1
        inputs = (inputs - self.shift) / self.scale
        with torch.enable_grad():
            for _ in range(steps):
                some = torch.randperm(len(known), generator=self.generator)[:batch]
                value, error = self.net(inputs[some])[:, 0], truth[some]
                worse = error[:, None] > error
                gap = value[:, None] - value
                loss = torch.relu(1.0 - gap)[worse].sum() / worse.sum().clamp(min=1)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()


_SLOT = 14
"""Features a step."""


def features(candidate: Candidate, nfe: int) -> list[float]:
    """(4 + nfe * 14,): a solver of its own with its parameters, or none; where each step starts and
    ends in lambda, and its choices, one-hot."""
    lambda_ = [min(max(value, -8.0), 8.0) for value in candidate.lambda_]
    found, whole = [0.0] * 4, candidate.whole
    if whole is not None:
        found = [1.0, math.log(whole.length), math.log(whole.reach), float(whole.history)]
    for k, choice in enumerate(candidate.choices):
        found += [1.0, lambda_[k], lambda_[k + 1], float(choice.prediction == "noise")]
        found += [float(choice.order == order) for order in (1, 2, 3)]
        found += [float(choice.estimator == name) for name in ESTIMATORS]
        found += [float(choice.corrector), *(float(choice.calls == calls) for calls in (2, 3))]
    return found + [0.0] * (4 + nfe * _SLOT - len(found))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b: the share of pairs in the same order less that of those in the other, ties
    aside. Nan where one of them does not vary."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    one, two = (torch.sign(v[:, None] - v).nan_to_num(0.0) for v in (x, y))
    norm = one.abs().sum() * two.abs().sum()
    return ((one * two).sum() / norm.sqrt()).item() if norm > 0 else math.nan


def held_out_correlation(errors: Mapping[Candidate, float], nfe: int, seed: int) -> float | None:
    """Kendall's tau on a random quarter of the choices of a predictor fitted to the others; None
    for fewer than 32 of them."""
    if len(errors) < 32:
        return None
    known = list(errors)
    random.Random(seed).shuffle(known)
    cut = len(known) // 4
    predictor = Predictor(nfe, seed)
    predictor.fit({c: errors[c] for c in known[cut:]}, steps=400)
    return kendall(predictor(known[:cut]).tolist(), [errors[c] for c in known[:cut]])
