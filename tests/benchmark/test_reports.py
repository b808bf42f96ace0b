"""Summaries, tables and figures of rows whose answers are known."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import fields
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.benchmark import draw, summary, table
from ebbflow.benchmark.measure import AUTO, OURS, PLAIN, Row

FACTS: dict[str, Any] = {
    "configuration": "",
    "mean": 1.0,
    "p95": 1.0,
    "sliced": 0.5,
    "energy": None,
    "frechet": None,
    "seconds": 0.25,
    "stops": 0.0,
    "samples": 8,
}


def row(
    problem: str, library: str, method: str, budget: int | None, rms: float | None, **more: Any
) -> Row:
    known = {
        "median": rms,
        "flipped": None if rms is None else 0.0,
        "evaluations": float(budget or 9),
    }
    setting = more.pop("setting", "vp")
    return Row(
        problem, setting, library, method, budget=budget, rms=rms, **{**FACTS, **known, **more}
    )


ROWS = [
    row("a", OURS, AUTO, 5, 0.01, median=0.001, flipped=0.2),
    row("b", OURS, AUTO, 5, 0.04, median=0.004),
    row("a", OURS, "ddpm", 5, None),
    row("a", "azula", "vAB", 5, 0.04, configuration="VE", median=0.01, flipped=0.5),
    row("a", "azula", "vAB", 5, 0.02, configuration="VP", median=0.01, flipped=0.5),
    row("b", "azula", "vAB", 5, 0.05, configuration="VE", median=0.02),
    row("b", "k-diffusion", "lms", 5, 0.01, configuration="karras", median=0.016, flipped=0.1),
    row("a", "k-diffusion", "lms", 8, 0.001, configuration="karras"),
]


def test_the_best_peer_of_each_cell() -> None:
    best = summary.best_peers(ROWS)
    named = {cell: (found.name, found.configuration) for cell, found in best.items()}
    assert named == {
        ("a", "vp", 5): ("azula vAB", "VP"),
        ("b", "vp", 5): ("k-diffusion lms", "karras"),
        ("a", "vp", 8): ("k-diffusion lms", "karras"),
    }


def test_the_comparison_is_the_geometric_mean_over_shared_cells() -> None:
    (found,) = summary.compare(ROWS, AUTO)
    assert (found.budget, found.cells) == (5, 2)
    assert found.rms == pytest.approx(math.sqrt((0.01 / 0.02) * (0.04 / 0.01)))
    assert found.median == pytest.approx(math.sqrt((0.001 / 0.01) * (0.004 / 0.016)))
    assert found.flipped == pytest.approx((0.1, 0.3))
    # Of the single configurations only "azula vAB VE" ran in both cells.
    assert found.single_name == "azula vAB VE"
    assert found.single == pytest.approx(math.sqrt(0.01 * 0.04) / math.sqrt(0.04 * 0.05))
    assert summary.compare(ROWS, PLAIN) == []
    assert summary.compare([r for r in ROWS if r.library == OURS], AUTO) == []


def test_geometric_means() -> None:
    assert summary.geometric_mean([2, 8]) == pytest.approx(4)
    assert summary.geometric_mean([0.0, 3]) == 0
    assert math.isnan(summary.geometric_mean([]))


def test_the_csv_holds_every_row_and_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "new" / "benchmark.csv"
    table.write_csv(ROWS, path)
    with path.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in fields(Row)]
    assert len(read) == len(ROWS)
    for line, known in zip(read, ROWS, strict=True):
        for field in fields(Row):
            value = getattr(known, field.name)
            assert line[field.name] == ("" if value is None else str(value))


def test_files_are_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "benchmark.csv"
    table.write_csv(ROWS[:1], path)
    before = path.read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        table.write_csv(ROWS, path)
    assert path.read_bytes() == before
    pytest.importorskip("matplotlib", reason="draws the figure; the CSV above is written alike")
    with pytest.raises(OSError, match="no space left"):
        draw.save(ROWS, tmp_path / "benchmark.png")
    assert [file.name for file in tmp_path.iterdir()] == ["benchmark.csv"]


def test_the_table_has_the_best_first_and_shows_distances_of_stochastic_samplers() -> None:
    lines = table.matrix(table.leaders([r for r in ROWS if r.problem == "a"]), (5, 8))
    assert [line[0] for line in lines] == ["k-diffusion lms", AUTO, "azula vAB", "ddpm"]
    assert lines[1] == [AUTO, "0.01 (0.001, 20%)", ""]
    assert lines[2] == ["azula vAB", "0.02 (0.01, 50%)", ""]
    assert lines[3] == ["ddpm", "distance 0.5", ""]
    kept = {line.name for line in table.leaders(ROWS, peers=1)}
    assert kept == {AUTO, "ddpm", "k-diffusion lms"}


def test_lines_are_means_over_problems_of_the_best_configurations() -> None:
    drawn = draw.lines(ROWS, "vp")
    assert drawn[OURS, AUTO] == [(5.0, pytest.approx(0.02))]
    assert drawn["azula", "vAB"] == [(5.0, pytest.approx(math.sqrt(0.02 * 0.05)))]
    # Not on every problem.
    assert ("k-diffusion", "lms") not in drawn
    adaptive = [
        row("a", OURS, "dopri5", None, 0.1, configuration="tolerance 0.1", evaluations=14.0),
        row("a", OURS, "dopri5", None, 0.01, configuration="tolerance 0.01", evaluations=30.0),
    ]
    points = draw.lines(adaptive, "vp")[OURS, "dopri5"]
    assert points == [(14.0, pytest.approx(0.1)), (30.0, pytest.approx(0.01))]


def test_the_front_is_what_nothing_beats() -> None:
    drawn = {
        "a": [(5.0, 1.0), (10.0, 0.2)],
        "b": [(5.0, 0.7), (8.0, 0.8), (12.0, 0.2), (20.0, 0.1)],
    }
    assert draw.front(drawn) == [(5.0, 0.7), (10.0, 0.2), (20.0, 0.1)]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.5, 12))
def test_labels_keep_their_order_and_their_distance(wanted: list[float], gap: float) -> None:
    places = draw.spread(wanted, gap)
    ordered = sorted(range(len(wanted)), key=lambda i: (wanted[i], places[i]))
    for i, j in pairwise(ordered):
        assert places[j] - places[i] >= gap - 1e-6
    # No label moves farther than the whole stack is high, and one alone does not move.
    assert all(abs(p - w) <= gap * len(wanted) for p, w in zip(places, wanted, strict=True))
    if len(wanted) == 1:
        assert places == wanted
    assert sum(places) == pytest.approx(sum(wanted), abs=1e-6)


def test_no_two_names_in_the_figure_overlap(tmp_path: Path) -> None:
    reason = "draws the figure; `spread` is tested without it"
    text_module = pytest.importorskip("matplotlib.text", reason=reason)
    rows = []
    for setting in ("vp", "edm"):
        for n, method in enumerate([AUTO, PLAIN, "ddim", "heun", "dpm-solver++2m"]):
            rows += [
                row("a", OURS, method, b, 0.1 / b * (1 + n / 50), setting=setting) for b in (5, 20)
            ]
        for n in range(12):
            rows += [
                row("a", "diffusers", f"Scheduler{n}", b, 0.3 / b * (1 + n / 20), setting=setting)
                for b in (5, 20)
            ]
    whole = draw.figure(rows)
    renderer = whole.canvas.get_renderer()
    texts = [text for axes in whole.axes for text in axes.texts]
    assert len(texts) == 2 * (5 + draw.NAMED)
    for text in texts:
        text.update_positions(renderer)
    # The extent of the text alone: an annotation's own includes its line.
    boxes = [text_module.Text.get_window_extent(text, renderer) for text in texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x1 <= whole.bbox.x1 and box.y0 >= 0 for box in boxes)
    colours = {text.get_text(): text.get_color() for text in texts}
    assert len({colours[name] for name in (AUTO, "ddim", "heun", "dpm-solver++2m")}) == 4
    draw.save(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
