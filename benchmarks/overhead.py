"""What a step costs beside the network: `python -m benchmarks.overhead [--json FILE] [--csv FILE]`.

Microseconds per denoiser call of whole sampling loops on a trivial denoiser (`0.5 x`), one thread,
float32: a bare loop that does the same multiply-adds with the same coefficients, `Plan.run`, and
the loops of diffusers, k-diffusion and azula where they are installed (see tests/parity/peers.py).

How it is measured. In each round every loop runs twice untimed and twice timed; the methods come
in random order, and each method's loops in one go, the bare one first, so that whatever else the
machine does falls on all of them alike. Ratios and differences are taken within a round, and their
medians over the rounds are reported beside the least times. The clock is the thread's processor
time (`--clock wall` for the wall's). Peers' set-up that they ask the caller to do (`set_timesteps`)
is not counted; that of `Plan.run` is, except making the plan.

Targets: `Plan.run` takes at most 1.5 times as long as the bare loop, and its overhead (the time
over the bare loop) is at least 5 times smaller than that of every peer of the same method. The
nearest is diffusers' FlowMatchEuler, which is not of the same kind: one multiply-add a step on a
velocity, no conversion, no time for the network and no check of its output; it is measured against
a bare loop of its own.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.loops import FLOW, METHODS, PEERS, Case, gather

SHAPES = ((1, 4, 64, 64), (16, 3, 32, 32))
PREDICTIONS = ("x0", "noise")
MOST_RATIO, LEAST_FACTOR = 1.5, 5.0
WARM, TIMED = 2, 2


@dataclass(frozen=True)
class Row:
    """Microseconds per denoiser call; ratio and overhead are against the bare loop."""

    shape: str
    prediction: str
    method: str
    name: str
    median: float
    least: float
    ratio: float
    overhead: float
    least_overhead: float
    times_ours: float | None = None


def measure(
    cases: list[Case], rounds: int, calls: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Microseconds per call, one number a round for each loop."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    methods = list(METHODS)
    order = random.Random(0)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        order.shuffle(methods)
        for case in sorted(cases, key=lambda case: methods.index(case.method)):
            spent = []
            for _ in range(WARM + TIMED):
                case.reset()
                began = clock()
                case.loop()
                spent.append(clock() - began)
            times[case.name].append(sum(spent[WARM:]) / (TIMED * calls) * 1e6)
    gc.enable()
    return times


def rows(
    cases: list[Case], times: dict[str, list[float]], shape: tuple[int, ...], prediction: str
) -> list[Row]:
    found = []
    for case in cases:
        mine, base = times[case.name], times[case.base]
        pairs = list(zip(mine, base, strict=True))
        row = Row(
            shape="x".join(map(str, shape)),
            prediction=prediction,
            method=case.method,
            name=case.name,
            median=statistics.median(mine),
            least=min(mine),
            ratio=statistics.median(m / b for m, b in pairs),
            overhead=statistics.median(m - b for m, b in pairs),
            least_overhead=min(mine) - min(base),
        )
        found.append(row)
    ours = {row.method: row for row in found if row.name.startswith("ebbflow")}

    def times_ours(row: Row) -> float | None:
        least = ours[row.method].overhead
        if row.name.startswith(("bare", "ebbflow")):
            return None
        return row.overhead / least if least > 0 else float("inf")

    return [Row(**asdict(row) | {"times_ours": times_ours(row)}) for row in found]


def show(found: list[Row]) -> None:
    head = f"{'loop':<34}{'median':>8}{'least':>8}{'x bare':>8}{'overhead':>10}{'least':>8}"
    print(f"{head}{'x ours':>8}")
    for row in sorted(found, key=lambda row: (row.method != "first order", row.method)):
        figures = f"{row.median:8.1f}{row.least:8.1f}{row.ratio:8.2f}{row.overhead:10.1f}"
        factor = "" if row.times_ours is None else f"{row.times_ours:8.1f}"
        print(f"{row.name:<34}{figures}{row.least_overhead:8.1f}{factor}")


def verdict(found: list[Row]) -> bool:
    """Print each target with its worst case; whether all are met."""
    own = [row for row in found if row.name.startswith("ebbflow")]
    worst = max(own, key=lambda row: row.ratio)
    good = worst.ratio <= MOST_RATIO
    tell(good, f"{worst.ratio:.2f} <= {MOST_RATIO} times the bare loop", worst)
    for peer in [*PEERS, FLOW]:
        rows = [r for r in found if r.name.startswith(peer) and (r.name == FLOW) == (peer == FLOW)]
        if rows:
            worst = min(rows, key=lambda row: row.times_ours or 0.0)
            factor = worst.times_ours or 0.0
            tell(factor >= LEAST_FACTOR, f"{factor:.1f} >= {LEAST_FACTOR:g} times ours", worst)
            good = good and factor >= LEAST_FACTOR
    return good


def tell(met: bool, what: str, row: Row) -> None:
    label = f"{row.name}, {row.prediction}, {row.shape}"
    print(f"{'met   ' if met else 'MISSED'} {what}, at worst: {label}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of a loop (20)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds (100)")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write the figures as CSV")
    options = parser.parse_args(arguments)
    clock = {"cpu": time.thread_time, "wall": time.perf_counter}[options.clock]

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found: list[Row] = []
    absent: dict[str, str] = {}
    with torch.no_grad():
        for shape in SHAPES:
            for prediction in PREDICTIONS:
                cases, absent = gather(prediction, torch.randn(shape), options.steps)
                times = measure(cases, options.rounds, options.steps, clock)
                part = rows(cases, times, shape, prediction)
                print(f"\nstate {shape}, {prediction} prediction, microseconds per denoiser call")
                show(part)
                found += part
    print()
    for peer, reason in absent.items():
        print(f"absent: {peer} ({reason})")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{options.steps} steps, {options.rounds} rounds, clock {options.clock}, load {load}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    good = verdict(found)
    records = [asdict(row) for row in found]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"rows": records, "absent": absent}, file, indent=1)
    if options.csv:
        with open(options.csv, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
