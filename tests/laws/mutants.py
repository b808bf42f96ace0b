"""Wrong versions of right things, which the laws must tell apart from them.

A site is one coefficient of a plan's pattern: (row, name), the row "query" or a register's number.
Every site that a solver uses is made wrong in turn, so a new solver brings its mutants along. A
rewrite that leaves the machine the same is none: two flips of a sign may cancel, and what nothing
reads may be anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ebbflow.plan import Plan, Row, Stage
from tests.laws.cases import SCHEDULES, SOLVERS, Maker, maker, uneven

Site = tuple[str, str]
Rewrite = Callable[[Any], Any]
"""Of a plan or of a `Bare` one."""

SLIGHTLY = 1 + 1e-3


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class Bare:
    """The stages of a plan alone, which may be wrong by the hundred: nothing checks or compiles.

    turn: the plan's coordinates as columns (d, d), for a plan with a basis.
    """

    stages: tuple[Stage, ...]
    times: tuple[float, ...]
    nfe: int
    registers: int
    turn: np.ndarray | None = None

    @staticmethod
    def of(plan: Plan) -> Bare:
        matrix = None if plan.basis is None else plan.basis.matrix
        turn = None if matrix is None else matrix.numpy()
        return Bare(plan.stages, plan.times, plan.nfe, plan.registers, turn)

    def table(self) -> np.ndarray:
        """(nfe, 1 + registers, registers + 3, 1 or d): query and updates over registers, X, D and
        1, of each coordinate where they differ."""
        size, d = self.registers, 1 if self.turn is None else len(self.turn)
        columns = {f"x{i}": i for i in range(size)} | {"X": size, "D": size + 1, "1": size + 2}
        out = np.zeros((self.nfe, 1 + size, size + 3, d))
        for k, stage in enumerate(self.stages):
            for i, row in enumerate((stage.query, *stage.update)):
                for name, value in row.items():
                    out[k, i, columns[name]] = np.asarray(value)
        return out


def run(machines: list[Bare], x: np.ndarray, denoise: Callable[..., np.ndarray]) -> np.ndarray:
    """(machines, B, d): the ends of machines with the same times, from x (B, d), all at once.

    denoise(x, t): the predictions for states (machines, B, d).
    """
    tables = np.stack([machine.table() for machine in machines])
    size, turn = machines[0].registers, machines[0].turn
    turn = np.eye(x.shape[1]) if turn is None else turn
    held = np.broadcast_to(x @ turn, (len(machines), size, *x.shape))
    one, known = np.ones((len(machines), 1, *x.shape)), [*range(size), size + 2]

    def rows(table: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.einsum(
            "mijd,mjbd->mibd", np.broadcast_to(table, (*table.shape[:3], x.shape[1])), values
        )

    with np.errstate(all="ignore"):  # what is wrong may overflow
        for k, stage in enumerate(machines[0].stages):
            held_and_one = np.concatenate([held, one], axis=1)
            query = rows(tables[:, k][:, :1, known], held_and_one)
            d = denoise(query[:, 0] @ turn.T, stage.time) @ turn
            values = np.concatenate([held, query, d[:, None], one], axis=1)
            held = rows(tables[:, k, 1:], values)
    return held[:, 0] @ turn.T


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


@functools.cache
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
    return _others(out, plan)


@functools.cache
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
    return _others(out, plan)


def _others(found: list[Mutant], plan: Plan) -> list[Mutant]:
    """Those that make another machine of the plan."""
    right = _machine(plan)

    def same(mutant: Mutant) -> bool:
        wrong = _machine(mutant.rewrite(plan))
        return all(
            torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(right, wrong, strict=True)
        )

    return [mutant for mutant in found if not same(mutant)]


def _machine(plan: Plan) -> list[torch.Tensor]:
    return [torch.tensor([stage.time for stage in plan.stages]), *vars(plan.dense()).values()]


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
    """Registers that keep a prediction, as data, as noise or as momentum, and copies of them."""
    kept: set[str] = set()
    for _ in range(plan.registers):
        for stage in plan.stages:
            for i, row in enumerate(stage.update):
                if i and ("D" in row or (len(row) == 1 and set(row) <= kept)):
                    kept.add(f"x{i}")
    return kept


def _calls(plan: Plan) -> int:
    """Calls a step, the most common."""
    return max(1, round(plan.nfe / (len(plan.times) - 1)))
