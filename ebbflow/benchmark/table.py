"""Rows as a CSV file and as tables of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ebbflow.benchmark.measure import OURS, Row
from ebbflow.benchmark.summary import Comparison, geometric_mean
from ebbflow.files import write_text

COLUMNS = tuple(field.name for field in fields(Row))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, the columns those of `Row`; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())


def leaders(rows: Sequence[Row], peers: int = 8) -> list[Row]:
    """Our rows, and the best ones at each budget of the `peers` best samplers elsewhere."""
    best: dict[tuple[str, int | None], Row] = {}
    for row in rows:
        if row.library != OURS and row.rms is not None:
            other = best.get((row.name, row.budget))
            if other is None or row.rms < (other.rms or 0):
                best[row.name, row.budget] = row
    ranks: dict[str, list[float]] = {}
    for (name, _), row in best.items():
        ranks.setdefault(name, []).append(row.rms or 0)
    kept = sorted(ranks, key=lambda name: geometric_mean(ranks[name]))[:peers]
    theirs = [row for (name, _), row in best.items() if name in kept]
    return [row for row in rows if row.library == OURS] + theirs


def matrix(rows: Sequence[Row], budgets: Sequence[int]) -> list[list[str]]:
    """A line a sampler, best first, and a column a budget: RMS (median, share flipped).

    A stochastic sampler shows its sliced Wasserstein distance instead.
    """
    names = list(dict.fromkeys(row.name for row in rows if row.budget is not None))
    cells = {(row.name, row.budget): row for row in rows}

    def rank(name: str) -> tuple[bool, float]:
        errors = [row.rms for row in rows if row.name == name and row.rms is not None]
        return not errors, geometric_mean(errors)

    return [
        [name, *(_cell(cells.get((name, budget))) for budget in budgets)]
        for name in sorted(names, key=rank)
    ]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.rms is None or row.median is None or row.flipped is None:
        return "" if row.sliced is None else f"distance {number(row.sliced)}"
    return f"{number(row.rms)} ({number(row.median)}, {row.flipped:.0%})"


FULL = (
    ("evaluations", "evaluations"),
    ("rms", "rms"),
    ("mean", "mean"),
    ("median", "median"),
    ("p95", "95 %"),
    ("flipped", "flipped"),
    ("sliced", "sliced W2"),
    ("energy", "energy"),
    ("frechet", "Fréchet"),
    ("seconds", "seconds"),
)


def full(rows: Sequence[Row]) -> list[list[str]]:
    """A line a row, with every figure."""
    ranked = sorted(rows, key=lambda row: (row.budget or 10**9, row.rms is None, row.rms or 0))
    return [
        [
            f"{row.name} {row.configuration}" if row.budget is None else row.name,
            *(number(getattr(row, name)) for name, _ in FULL),
        ]
        for row in ranked
    ]


def comparison(found: Sequence[Comparison]) -> list[list[str]]:
    """A line a comparison, as the README shows it."""
    return [
        [
            one.solver,
            str(one.budget),
            str(one.cells),
            number(one.rms),
            number(one.median),
            f"{one.flipped[0]:.1%} / {one.flipped[1]:.1%}",
            number(one.single),
            one.single_name or "",
        ]
        for one in found
    ]


COMPARED = (
    "solver",
    "evaluations",
    "cells",
    "rms ratio",
    "median ratio",
    "flipped, ours / peer's",
    "rms to one peer",
    "that peer",
)


def number(value: float | None) -> str:
    """Three significant digits; empty for None."""
    return "" if value is None else f"{value:.3g}"
