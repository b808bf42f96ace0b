"""Wrong versions of right things, which the laws must tell apart from them.

A site is one coefficient of a plan's pattern: (row, name), the row "query" or a register's number.
Every site that a solver uses is made wrong in turn, so a new solver brings its mutants along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from ebbflow.plan import Plan, Row, Stage
from tests.laws.cases import SCHEDULES, SOLVERS, Maker, maker, uneven

Site = tuple[str, str]
Rewrite = Callable[[Plan], Plan]

SLIGHTLY = 1 + 1e-3


@dataclass(frozen=True)
class Mutant:
    """A solver made wrong: `make(schedule, nodes)` compiles and then spoils."""

    solver: str
    name: str
    rewrite: Rewrite

    def __str__(self) -> str:
        return f"{self.solver}: {self.name}"

    @property
    def make(self) -> Maker:
        compile_right = maker(SOLVERS[self.solver])
        return lambda schedule, nodes: self.rewrite(compile_right(schedule, nodes))


def example(solver: str, schedule: str = "VP") -> Plan:
    return maker(SOLVERS[solver])(SCHEDULES[schedule], uneven(6))


def sites(plan: Plan) -> list[Site]:
    """Every (row, name) that some stage uses, in order."""
    found: dict[Site, None] = {}
    for stage in plan.stages:
        for key, row in _rows(stage).items():
            found |= {(key, name): None for name in row}
    return list(found)


def scaled(plan: Plan, site: Site, factor: float, stage: int | None = None) -> Plan:
    """One site times `factor`, in one stage or in all."""
    key, name = site

    def change(k: int, old: Stage) -> Stage:
        rows = _rows(old)
        if (stage is not None and k != stage) or name not in rows.get(key, {}):
            return old
        return _with(old, {**rows, key: {**rows[key], name: rows[key][name] * factor}})

    return _stages(plan, (change(k, s) for k, s in enumerate(plan.stages)))


def histories_swapped(plan: Plan) -> Plan | None:
    """The two newest predictions change places in the state's row; None without a history."""

    histories = _histories(plan)

    def change(stage: Stage) -> Stage:
        row = stage.update[0]
        names = [name for name in row if name == "D" or name in histories]
        if len(names) < 2:
            return stage
        first, second = names[:2]
        swapped = {**row, first: row[second], second: row[first]}
        return replace(stage, update=(swapped, *stage.update[1:]))

    changed = _stages(plan, map(change, plan.stages))
    return None if changed.stages == plan.stages else changed


def times_late(plan: Plan) -> Plan:
    """Each prediction is taken at its neighbour's time."""
    late = [replace(a, time=b.time) for a, b in pairwise(plan.stages)]
    return _stages(plan, [*late, plan.stages[-1]])


def rows_late(plan: Plan) -> Plan:
    """Each step uses its neighbour's coefficients, where the two have the same pattern."""
    changed = [
        replace(a, query=b.query, update=b.update) if _pattern(a) == _pattern(b) else a
        for a, b in zip(plan.stages, plan.stages[_calls(plan) :], strict=False)
    ]
    return _stages(plan, [*changed, *plan.stages[len(changed) :]])


def systematic(solver: str, order: int) -> list[Mutant]:
    """Formulas that are wrong at every step.

    Off-by-one indices cost one order, so they are no mutants of a first-order method in a law about
    orders; the laws of a single step see them.
    """
    plan = example(solver)
    out = []
    for site in sites(plan):
        key, name = site
        factors = {"slightly": SLIGHTLY, "sign": -1.0}
        if name == "Z":
            # The law of Z does not change with its sign.
            factors = {"slightly": SLIGHTLY, "none": 0.0}
        out += [
            Mutant(solver, f"{key}.{name} {what}", lambda p, s=site, f=factor: scaled(p, s, f))
            for what, factor in factors.items()
        ]
    if histories_swapped(plan) is not None:
        out.append(Mutant(solver, "histories swapped", lambda p: histories_swapped(p) or p))
    if order > 1:
        out.append(Mutant(solver, "times late", times_late))
        out.append(Mutant(solver, "rows late", rows_late))
    return out


def isolated(solver: str) -> list[Mutant]:
    """One coefficient, time or row that is wrong in one stage only, for every stage."""
    plan = example(solver)
    out = []
    for k, stage in enumerate(plan.stages):
        last = k == plan.nfe - 1
        for key, row in _rows(stage).items():
            if last and key not in ("query", "0"):
                continue  # nothing reads the other registers any more
            out += [
                Mutant(
                    solver,
                    f"stage {k}, {key}.{name}",
                    lambda p, s=(key, name), k=k: scaled(p, s, SLIGHTLY, k),
                )
                for name in row
            ]
        for j in (k - 1, k + 1):
            if 0 <= j < plan.nfe and plan.stages[j].time != stage.time:
                out.append(
                    Mutant(solver, f"stage {k}, time of {j}", lambda p, k=k, j=j: _borrow(p, k, j))
                )
    out.append(Mutant(solver, "rows late", rows_late))
    return out


def _borrow(plan: Plan, k: int, j: int) -> Plan:
    stages = list(plan.stages)
    stages[k] = replace(stages[k], time=stages[j].time)
    return _stages(plan, stages)


def _rows(stage: Stage) -> dict[str, Row]:
    return {"query": stage.query, **{str(i): row for i, row in enumerate(stage.update)}}


def _with(stage: Stage, rows: dict[str, Row]) -> Stage:
    update = tuple(rows[str(i)] for i in range(len(stage.update)))
    return replace(stage, query=rows["query"], update=update)


def _stages(plan: Plan, stages: Iterable[Stage]) -> Plan:
    return replace(plan, stages=tuple(stages))


def _pattern(stage: Stage) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(row) for row in _rows(stage).values())


def _histories(plan: Plan) -> set[str]:
    """Registers that keep a prediction: "x1" where some stage writes D, or D beside its query, into
    it, and what is copied from it."""
    kept: set[str] = set()
    for _ in range(plan.registers):
        for stage in plan.stages:
            for i, row in enumerate(stage.update):
                copied = len(row) == 1 and set(row) <= kept
                if i and (copied or ("D" in row and set(row) <= {"D", "X", "1"})):
                    kept.add(f"x{i}")
    return kept


def _calls(plan: Plan) -> int:
    """Calls a step, the most common."""
    return max(1, round(plan.nfe / (len(plan.times) - 1)))
