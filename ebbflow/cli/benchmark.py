"""Measure solvers against a converged reference at the same noise, and against other libraries.

Examples:
  ebbflow benchmark                                     three exact laws, three settings
  ebbflow benchmark --peers                             against diffusers, k-diffusion and azula
  ebbflow benchmark --solver all --evaluations 6 12 24  every solver
  ebbflow benchmark --model mixture-2d --schedule edm   one case, every figure
  ebbflow benchmark --model fashion-mnist --count 64    a network, with its Fréchet distance
  ebbflow benchmark --model mine --plan plan.json       a tuned plan beside the solvers

The errors are root mean squares over coordinates, of each sample to the exact path from the same
noise; a sample is flipped when it is off by more than a tenth of the data's deviation. Everything
is in benchmark.csv, the Pareto front in benchmark.png. Samplers of other libraries run over all
their grids, at the same evaluations of the same model; the best is chosen on the scored samples.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ebbflow.cli._shared import pick_device, print_json, print_table, progress

if TYPE_CHECKING:
    from ebbflow.benchmark.jobs import Job, Outcome
    from ebbflow.benchmark.problems import Problem

DEFAULT = (
    "auto",
    "auto, no statistics",
    "ddim",
    "dpm-solver++2m",
    "dpm-solver++3m",
    "unipc-b2-3",
    "deis-tab3",
    "deis-rhoab3",
    "ipndm4",
    "heun",
    "edm",
    "ddpm",
)
"""What is measured unless `--solver` says otherwise, as far as it exists."""


@dataclass(frozen=True)
class Options:
    model: tuple[str, ...] = ("mixture-2d", "mixture-64d", "empirical-64d")
    """Exact laws (those three, or oracle), a model in the package, or folders."""
    classes: tuple[int, ...] = ()
    """Classes of a model, taken in turn by the samples; all of them unless given."""
    schedule: tuple[str, ...] = ("vp", "edm", "flow")
    """Settings of the three laws; a model has its own."""
    solver: tuple[str, ...] = ()
    """Names, "all", "auto" or "auto, no statistics"; without it, a selection."""
    plan: tuple[Path, ...] = ()
    """Plans that `ebbflow tune` made, in addition."""
    evaluations: tuple[int, ...] = (5, 8, 10, 20)
    """Calls of the model that a sampler may spend; adaptive ones get tolerances instead."""
    peers: bool = False
    """Add the samplers of other libraries, as far as they are installed."""
    count: int = 256
    """Samples, the same noise for all."""
    out: Path = Path("benchmark")
    """Folder for benchmark.csv and benchmark.png."""
    seed: int = 0
    """Seed of the noise and of the fresh data."""
    workers: int | None = None
    """Processes side by side; without it, one a core, at most four, and one on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1, for networks; laws are computed on the CPU."""
    json: bool = False
    """Print one JSON object instead of tables."""


def run(options: Options) -> None:
    from ebbflow.benchmark import draw, jobs, summary, table
    from ebbflow.benchmark.measure import AUTO, PLAIN

    began = time.monotonic()
    work = prepare(options)
    parts = sum(job.parts for job in work)
    with progress("benchmark", parts) as advance:
        outcomes = jobs.run(work, _workers(options), advance)
    rows = [row for outcome in outcomes for row in outcome.rows]
    table.write_csv(rows, options.out / "benchmark.csv")
    files, notes = [options.out / "benchmark.csv"], _notes(outcomes)
    try:
        draw.save(rows, options.out / "benchmark.png")
        files.append(options.out / "benchmark.png")
    except ImportError as error:
        notes.append(str(error))
    compared = [one for name in (AUTO, PLAIN) for one in summary.compare(rows, name)]
    if options.json:
        report = {
            "rows": [asdict(row) for row in rows],
            "comparison": [asdict(one) for one in compared],
            "reference": {f"{o.problem} {o.setting}": o.reference for o in outcomes},
            "notes": notes,
            "files": [str(path) for path in files],
            "seconds": time.monotonic() - began,
        }
        print_json(report)
        return
    for outcome in outcomes:
        _print(outcome, options.evaluations, alone=len(outcomes) == 1)
    if compared:
        title = "The default against the best peer of each cell, at its best setting (1 is level)"
        print_table(table.COMPARED, table.comparison(compared), title)
    for note in notes:
        print(note)
    names = " and ".join(str(path) for path in files)
    print(f"{names}, in {time.monotonic() - began:.0f} s")


def prepare(options: Options) -> list[Job]:
    """The jobs that the options ask for; raises ValueError naming what is wrong with them."""
    from ebbflow.benchmark.jobs import Job
    from ebbflow.benchmark.problems import LAWS, SETTINGS, oracle

    if options.count < 8:
        raise ValueError(f"count must be at least 8, got {options.count}: errors are quantiles")
    for nfe in options.evaluations:
        if nfe < 1:
            raise ValueError(f"evaluations must be at least 1, got {nfe}")
    if not 0 <= options.seed < 1 << 32:
        raise ValueError(f"seed must lie in [0, 2^32), got {options.seed}")
    if options.out.is_file():
        raise ValueError(f"--out {options.out} is a file; give the name of a folder")
    for setting in options.schedule:
        _require("schedule", setting, tuple(SETTINGS))
    names = (*_solvers(options.solver), *map(_plan, options.plan))
    device = pick_device(options.device)
    problems: list[partial[Problem]] = []
    for name in options.model:
        if name in LAWS and options.classes:
            raise ValueError(f"class {options.classes[0]}: the law {name!r} has no classes")
        if name in LAWS:
            problems += [partial(oracle, name, setting) for setting in options.schedule]
        else:
            problems.append(partial(_open, name, str(device), options.classes))
            if not _exists(name):
                known = ", ".join([*LAWS, *_known()])
                raise ValueError(f"unknown model {name!r}: give a folder, or one of {known}")
    shared = (names, tuple(sorted(set(options.evaluations))), options.count, options.seed)
    return [Job(problem, *shared, peers=options.peers) for problem in problems]


def _known() -> list[str]:
    from ebbflow.cli._models import ORACLE
    from ebbflow.storage import bundled

    return [ORACLE, *bundled()]


def _exists(name: str) -> bool:
    return name in _known() or (Path(name) / "config.json").is_file()


def _open(name: str, device: str, classes: Sequence[int]) -> Problem:
    """A model by name; one on a schedule of the settings is put there, so that peers know it."""
    from dataclasses import replace

    import torch

    from ebbflow.benchmark.problems import SETTINGS, of_denoiser
    from ebbflow.cli._models import check_classes, open_model

    denoiser = open_model(name, torch.device(device))
    labels = check_classes(name, denoiser, classes)
    problem = of_denoiser(Path(name).name, denoiser, labels, device)
    same = [key for key, make in SETTINGS.items() if make() == denoiser.schedule]
    return replace(problem, setting=same[0]) if same else problem


def _solvers(asked: Sequence[str]) -> tuple[str, ...]:
    from ebbflow import solvers
    from ebbflow.benchmark.measure import AUTO, PLAIN

    known = (AUTO, PLAIN, *(name for name in solvers.list() if name != AUTO))
    if not asked:
        return tuple(name for name in DEFAULT if name in known)
    for name in asked:
        if name != "all":
            _require("solver", name, known)
    return known if "all" in asked else tuple(dict.fromkeys(asked))


def _plan(path: Path) -> str:
    from ebbflow.plan import Plan

    if path.suffix != ".json":
        raise ValueError(f"--plan {path}: a plan is a .json file, made by `ebbflow tune`")
    Plan.load(path)  # or it says what is wrong, before anything is measured
    return str(path)


def _require(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = get_close_matches(value, known, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {what} {value!r}; {hint}known: {', '.join(known)}")


def _workers(options: Options) -> int:
    if options.workers is not None:
        if options.workers < 1:
            raise ValueError(f"workers must be at least 1, got {options.workers}")
        return options.workers
    if pick_device(options.device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(4, cores)


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Libraries that are missing, runs that were not scored, references that did not converge."""
    missing = {name: why for outcome in outcomes for name, why in outcome.missing.items()}
    notes = [f"{name} is missing and was left out: {why}" for name, why in missing.items()]
    unscored: dict[str, int] = {}
    for outcome in outcomes:
        for name, runs in outcome.unscored.items():
            unscored[name] = unscored.get(name, 0) + runs
    notes += [
        f"{name}: {runs} runs were not scored (an error, not finite, over budget, or stopped early)"
        for name, runs in unscored.items()
    ]
    notes += [
        f"{name} was left out of {o.problem} {o.setting}: {why}"
        for o in outcomes
        for name, why in o.idle.items()
    ]
    notes += [
        f"{o.problem} {o.setting}: the reference itself is off by {o.reference:.1g} deviations"
        for o in outcomes
        if o.reference > 1e-3
    ]
    return notes


def _print(outcome: Outcome, budgets: Sequence[int], alone: bool) -> None:
    from ebbflow.benchmark import table

    rows = table.leaders(outcome.rows)
    title = f"{outcome.problem}, {outcome.setting} (deviation {outcome.deviation:.2f})"
    if alone:
        print_table(("", *(title for _, title in table.FULL)), table.full(rows), title)
        return
    title += ": root mean square error (median, share flipped)"
    budgets = sorted(set(budgets))
    columns = ("evaluations", *map(str, budgets))
    print_table(columns, table.matrix(rows, budgets), title)
    adaptive = [row for row in rows if row.budget is None]
    if adaptive:
        print_table(("", *(t for _, t in table.FULL)), table.full(adaptive), "adaptive solvers")
