"""What the rows say together: the best peer of each cell, and how far a solver is from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ebbflow.benchmark.measure import OURS, Row


class Cell(NamedTuple):
    """One problem in one setting at one number of evaluations."""

    problem: str
    setting: str
    budget: int


@dataclass(frozen=True)
class Comparison:
    """One of our solvers at one number of evaluations, over all problems and settings.

    rms, median: geometric means over the cells of our error divided by that of the best peer at its
    best setting for the cell. flipped: mean shares of samples that landed elsewhere, ours and the
    best peer's. single: as rms, against the one configuration of one peer that is best over all
    cells together, or None where none ran in all; `single_name` says which.
    """

    solver: str
    budget: int
    cells: int
    rms: float
    median: float
    flipped: tuple[float, float]
    single: float | None
    single_name: str | None


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; 0 if any value is 0, nan for no values."""
    values = list(values)
    if not values:
        return math.nan
    if min(values) == 0:
        return 0.0
    return math.exp(sum(map(math.log, values)) / len(values))


def best_peers(rows: Sequence[Row]) -> dict[Cell, Row]:
    """In each cell the row of another library with the least root mean square error."""
    best: dict[Cell, Row] = {}
    for row in rows:
        if row.library == OURS or row.budget is None or row.rms is None:
            continue
        cell = Cell(row.problem, row.setting, row.budget)
        if cell not in best or row.rms < (best[cell].rms or 0):
            best[cell] = row
    return best


def compare(rows: Sequence[Row], solver: str) -> list[Comparison]:
    """One of our solvers against the best peers, one comparison for each number of evaluations.

    Empty where either is missing from every cell.
    """
    best = best_peers(rows)
    ours = {
        Cell(row.problem, row.setting, row.budget): row
        for row in rows
        if row.library == OURS
        and row.method == solver
        and row.budget is not None
        and row.rms is not None
    }
    found = []
    for budget in sorted({cell.budget for cell in ours}):
        cells = [cell for cell in ours if cell.budget == budget and cell in best]
        if not cells:
            continue
        pairs = [(ours[cell], best[cell]) for cell in cells]
        name, single = _best_single(rows, cells)
        errors = geometric_mean(ours[cell].rms or 0.0 for cell in cells)
        found.append(
            Comparison(
                solver,
                budget,
                len(cells),
                geometric_mean(_ratio(a.rms, b.rms) for a, b in pairs),
                geometric_mean(_ratio(a.median, b.median) for a, b in pairs),
                (_mean(a.flipped for a, _ in pairs), _mean(b.flipped for _, b in pairs)),
                None if single is None else _ratio(errors, single),
                name,
            )
        )
    return found


def _best_single(rows: Sequence[Row], cells: Sequence[Cell]) -> tuple[str | None, float | None]:
    """The configuration that ran in all cells and has the least geometric mean error, and that."""
    wanted = set(cells)
    errors: dict[str, dict[Cell, float]] = {}
    for row in rows:
        if row.library == OURS or row.budget is None or row.rms is None:
            continue
        cell = Cell(row.problem, row.setting, row.budget)
        if cell in wanted:
            errors.setdefault(f"{row.name} {row.configuration}".strip(), {})[cell] = row.rms
    means = {
        name: geometric_mean(found.values())
        for name, found in errors.items()
        if len(found) == len(wanted)
    }
    if not means:
        return None, None
    name = min(means, key=means.__getitem__)
    return name, means[name]


def _ratio(ours: float | None, theirs: float | None) -> float:
    if ours is None or theirs is None or theirs == 0:
        return math.nan
    return ours / theirs


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
