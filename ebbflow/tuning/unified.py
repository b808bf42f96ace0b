"""The unified sampling framework: every step of a sampler chosen by itself, compiled to a plan.

With E the data or the noise prediction, `lambda = log(alpha/sigma)`, u the offset from the step's
start in it and h the step, both forms of a step are one integral,

    x' = keep x + scale ∫_0^h rate e^{rate (u - h)} E(u) du,    E(u) = sum_p c_p u^p

where (keep, scale, rate) is (sigma'/sigma, alpha', 1) for the data and (alpha'/alpha, sigma', -1)
for the noise; a choice says which values of E the Taylor coefficients c_p are estimated from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ebbflow import grids
from ebbflow.plan import Plan, Row, Stage
from ebbflow.schedules import Schedule
from ebbflow.solvers.base import Levels, combination
from ebbflow.solvers.interpolation import interpolated, phi

PREDICTIONS = ("x0", "noise")
ESTIMATORS = ("full", "difference", "exponential", "linear")


@dataclass(frozen=True)
class Choice:
    """How one step is made.

    Args:
        prediction: whose Taylor expansion is integrated, "x0" or "noise".
        order: values of it that are used, 1 to 3: the current one, those of the step's own inner
            calls, the newest first, then those of the nodes before. Fewer where there are fewer.
        estimator: "full", the polynomial through them; "difference", the derivative p from the
            newest p + 1 of them, a lower order for the low ones; "exponential" and "linear", two
            values whose difference has the weight `(1 - e^{-h})/2` or `h/2` in place of its
            integral, more than two as "full".
        corrector: redo the step with the prediction at its end too, which is the next step's call.
        calls: 1, a multi-step method; 2 or 3, a single-step one, with inner calls at equal parts of
            h, each from the values before it.

    A step from alpha = 0 or to sigma = 0 is the exact one for its prediction, whatever the choice.
    """

    prediction: Literal["x0", "noise"] = "x0"
    order: int = 1
    estimator: Literal["full", "difference", "exponential", "linear"] = "full"
    corrector: bool = False
    calls: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("prediction", self.prediction, PREDICTIONS),
            ("order", self.order, (1, 2, 3)),
            ("estimator", self.estimator, ESTIMATORS),
            ("corrector", self.corrector, (False, True)),
            ("calls", self.calls, (1, 2, 3)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {known}")


@dataclass(frozen=True)
class Choices:
    """A sampler of the framework: n + 1 decreasing nodes and a choice for each of the n steps.

    A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models, section 3.
    """

    times: tuple[float, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", grids.given(self.times))
        object.__setattr__(self, "choices", tuple(self.choices))
        if len(self.choices) != len(self.times) - 1:
            raise ValueError(
                f"{len(self.choices)} choices for {len(self.times)} nodes: give one for each of "
                f"the {len(self.times) - 1} steps"
            )

    def plan(self, schedule: Schedule, origin: Mapping[str, Any] | None = None) -> Plan:
        """The sampler as a plan on this schedule."""
        levels = Levels.of(schedule, self.times)
        own = {"solver": "unified", "choices": [list(asdict(c).values()) for c in self.choices]}
        stages = _allocate(list(_drafts(levels, self.choices)))
        return Plan(schedule, self.times[0], stages, own if origin is None else {**own, **origin})


def exact(levels: Levels, k: int) -> bool:
    """Whether step k has one call and nothing to choose."""
    return not levels.alpha[k] or not levels.sigma[k + 1]


_KNOWN: Mapping[str, Choice] = {
    "ddim": Choice(),
    "dpm-solver++2m": Choice("x0", 2, "exponential"),
    "dpm-solver++3m": Choice("x0", 3),
    "dpm-solver++2s": Choice("x0", 2, "exponential", calls=2),
    "dpm-solver++3s": Choice("x0", 2, "full", calls=3),
    "dpm-solver-2": Choice("noise", 2, "exponential", calls=2),
    "dpm-solver-3": Choice("noise", 2, "full", calls=3),
    "dpm-solver-2m": Choice("noise", 2, "exponential"),
    "dpm-solver-3m": Choice("noise", 3),
    "deis-logrhoab1": Choice("noise", 2),
    "unipc-b1-2": Choice("x0", 2, "linear", corrector=True),
    "unipc-b2-2": Choice("x0", 2, "exponential", corrector=True),
    "unipc-b1-3": Choice("x0", 3, "linear", corrector=True),
    "unipc-b2-3": Choice("x0", 3, "exponential", corrector=True),
}
NAMES = tuple(_KNOWN)
"""Solvers of the library that are points of the framework."""


def choices(name: str, schedule: Schedule, times: Sequence[float]) -> Choices:
    """A solver of `NAMES` through these nodes, as choices."""
    if name not in _KNOWN:
        raise ValueError(f"{name!r} is no point of the framework; known: {', '.join(NAMES)}")
    steps = [_KNOWN[name]] * (len(times) - 1)
    if name == "dpm-solver++3m":  # its first step that is not exact is corrected
        first = 0 if schedule.alpha(times[0]) > 0 else 1
        steps[first : first + 1] = [Choice("x0", 3, corrector=True)][: len(steps) - first]
    return Choices(tuple(times), tuple(steps))


def weights(u: Sequence[float], h: float, rate: float, estimator: str) -> list[float]:
    """w with `∫_0^h rate e^{rate (u - h)} E(u) du = sum_j w_j E_j`; u[0] = 0, the newest next."""
    total = -math.expm1(-rate * h)
    if len(u) == 2 and estimator in ("exponential", "linear"):
        half = (total if estimator == "exponential" else rate * h) / 2 * h / u[1]
        return [total - half, half]
    moments = [total]
    moments += [
        rate * h ** (p + 1) * math.factorial(p) * phi(-rate * h, p + 1) for p in range(1, len(u))
    ]
    if estimator != "difference":
        return interpolated(u, moments)
    found = [0.0] * len(u)
    for p, moment in enumerate(moments):
        for j in range(p + 1):  # the divided difference of the newest p + 1 values
            found[j] += moment / math.prod(u[j] - u[i] for i in range(p + 1) if i != j)
    return found


@dataclass
class _Draft:
    """A stage over symbols: "x" is the state, others are named as they are needed."""

    time: float
    query: str
    rows: dict[str, Row] = field(default_factory=dict)
    node: float | None = None


def _value(levels: Levels, k: int, prediction: str) -> Row:
    """E at node k as a row of its own stage."""
    if prediction == "x0":
        return {"D": 1.0}
    return {"X": 1 / levels.sigma[k], "D": -levels.alpha[k] / levels.sigma[k]}


@dataclass
class _Writer:
    """One step: the levels of its start, its inner calls and its end; the state at its start, its
    last correction included, as a row of the first stage; its stages so far."""

    points: Levels
    prediction: str
    corrected: Row
    drafts: list[_Draft]

    def gather(
        self,
        target: str,
        i: int,
        others: Sequence[tuple[str | int, float]],
        estimator: str = "full",
        late: bool = False,
    ) -> float:
        """Let every stage add what it knows to `target`, the state at point i.

        others: values of E beside the current one, the newest first, by symbol or inner call, each
        with its offset. late: the value at point i is one more, which the next step's first call
        brings; returns its weight.
        """
        points, first = self.points, self.drafts[0].rows
        h = points.lambda_[i] - points.lambda_[0]
        a = points.sigma[i] / points.sigma[0]
        keep, scale, rate = a, points.alpha[i], 1.0
        if self.prediction == "noise":
            keep, scale, rate = points.alpha[i] / points.alpha[0], points.sigma[i], -1.0
        # The exact step for the prediction at hand, and differences to the other values.
        now = {"X": a - keep, "D": -points.alpha[i] * math.expm1(-h)}
        first[target] = combination((keep, self.corrected), (1.0, now))
        u = [0.0, *([h] if late else []), *(offset for _, offset in others)]
        if len(u) == 1:
            return 0.0
        _, *parts = (scale * w for w in weights(u, h, rate, estimator))
        now = _value(points, 0, self.prediction)
        first[target] = combination((1.0, first[target]), (-sum(parts), now))
        arriving = parts.pop(0) if late else 0.0
        for (name, _), part in zip(others, parts, strict=True):
            if isinstance(name, str):
                first[target] = combination((1.0, first[target]), (1.0, {name: part}))
            else:
                value = _value(points, name, self.prediction)
                row = combination((1.0, {target: 1.0}), (part, value))
                self.drafts[name].rows[target] = row
        return arriving


def _between(levels: Levels, k: int, inner: Sequence[float]) -> Levels:
    """Those of node k, of points given by lambda, and of node k + 1."""
    if inner:
        times = [levels.time(math.exp(-lambda_)) for lambda_ in inner]
        return Levels.of(levels.schedule, (levels.times[k], *times, levels.times[k + 1]))
    ends = slice(k, k + 2)
    columns = (levels.times, levels.alpha, levels.sigma, levels.lambda_)
    return Levels(levels.schedule, *(column[ends] for column in columns))


def _drafts(levels: Levels, steps: Sequence[Choice]) -> Iterator[_Draft]:
    corrected: Row = {"X": 1.0}
    for k, choice in enumerate(steps):
        single = exact(levels, k)
        choice = Choice() if single else choice
        start, end, calls = levels.lambda_[k], levels.lambda_[k + 1], choice.calls
        points = _between(levels, k, [start + i / calls * (end - start) for i in range(1, calls)])
        drafts = [_Draft(points.times[i], f"q{i}" if i else "x") for i in range(calls)]
        drafts[-1].node = levels.times[k + 1]
        drafts[0].rows = {f"D{k}": {"D": 1.0}, f"E{k}": _value(levels, k, "noise")}
        writer = _Writer(points, choice.prediction, corrected, drafts)
        inside = [(i, points.lambda_[i] - start) for i in range(calls - 1, 0, -1)]
        for i in range(1, calls):
            writer.gather(f"q{i}", i, inside[calls - i :][:1])
        letter = "D" if choice.prediction == "x0" else "E"
        past = [j for j in range(k - 1, -1, -1) if math.isfinite(levels.lambda_[j])]
        before = [(f"{letter}{j}", levels.lambda_[j] - start) for j in past]
        others = [*inside, *before][: choice.order - 1]
        writer.gather("x", calls, others, choice.estimator)
        corrected = {"X": 1.0}
        if choice.corrector and k < len(steps) - 1:
            late = writer.gather("c", calls, others, choice.estimator, late=True)
            new = _value(levels, k + 1, choice.prediction)
            corrected = combination((1.0, {"c": 1.0}), (late, new))
        yield from drafts


def _allocate(drafts: Sequence[_Draft]) -> tuple[Stage, ...]:
    """Symbols to registers, the state to register 0; what nothing reads is dropped."""
    reads: list[set[str]] = []
    wanted = {"x"}
    kept: list[dict[str, Row]] = []
    for draft in reversed(drafts):
        rows = {name: draft.rows.get(name, {name: 1.0}) for name in wanted}
        kept.append(rows)
        reads.append(wanted)
        wanted = {draft.query} | {name for row in rows.values() for name in row} - {"X", "D"}
    places = {"x": 0}
    laid: list[tuple[_Draft, dict[str, int], dict[str, int], dict[str, Row]]] = []
    for draft, rows in zip(drafts, reversed(kept), strict=True):
        after = {name: place for name, place in places.items() if name in rows}
        for name in sorted(rows.keys() - after.keys()):
            after[name] = next(i for i in range(len(rows) + 1) if i not in after.values())
        laid.append((draft, places, after, rows))
        places = after
    registers = 1 + max(place for _, _, after, _ in laid for place in after.values())
    stages = []
    for draft, before, after, rows in laid:
        names = {name: f"x{place}" for name, place in before.items()} | {"X": "X", "D": "D"}
        update: list[Row] = [{}] * registers
        for name, place in after.items():
            update[place] = {names[key]: value for key, value in rows[name].items()}
        query = {names[draft.query]: 1.0}
        stages.append(Stage(draft.time, query, tuple(update), draft.node))
    return tuple(stages)
