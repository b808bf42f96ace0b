"""Draw samples from a model.

Examples:
  ebbflow sample                                     pictures from the model in the package
  ebbflow sample --classes 3 5 --seed 7              classes 3 and 5 in turn
  ebbflow sample --solver heun --steps 40            another solver, more steps
  ebbflow sample --count 50000 --out pictures        single pictures; resumes where it stopped
  ebbflow sample --model models/mine --out grid.png  a model that you trained
  ebbflow sample --plan plan.json                    a plan that `ebbflow tune` made
  ebbflow sample --model oracle                      a law that is known in closed form

Sample i depends on the seed and on i alone: an interrupted run, and any number of processes, end
with the same files. The batch is part of the recipe, because networks round differently in another.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebbflow.cli._shared import pick_device, print_json, progress

if TYPE_CHECKING:
    from ebbflow.cli._draw import Recipe
    from ebbflow.denoiser import Denoiser
    from ebbflow.plan import Plan

ROWS = 8
POINTS = 4096
STEPS = 20


@dataclass(frozen=True)
class Options:
    model: str = "fashion-mnist"
    """A model in the package, a folder with config.json, or `oracle`."""
    classes: tuple[int, ...] = ()
    """Sample i has the class at place i modulo their number; without it, all classes in turn."""
    count: int | None = None
    """How many samples; without it, a grid of eight rows or more."""
    out: Path = Path("samples.png")
    """A .png (one grid), a .npz (arrays), or a folder (single pictures 000000.png, labels.csv)."""
    solver: str | None = None
    """A name that `ebbflow info` lists, or auto; without it, the model's own choice."""
    steps: int | None = None
    """Steps of the solver; without it, the model's own choice."""
    nfe: int | None = None
    """Budget of denoiser calls, in place of --steps."""
    tolerance: float | None = None
    """Of solvers that choose their own steps, such as dormand-prince."""
    plan: Path | None = None
    """A plan that `ebbflow tune` made, in place of --solver, --steps, --nfe and --tolerance: a
    file, or the name of one in the model's folder (`plan-6` of the model in the package)."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 1 is none; without it, the model's own choice."""
    seed: int = 0
    """Seed of the noise."""
    batch: int | None = None
    """Samples computed at once, halved when memory runs out; by default 16 on a CPU, else 256."""
    shard: str | None = None
    """K/N: only part K (from 0) of N, into a folder. A launcher's RANK and WORLD_SIZE do too."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    json: bool = False
    """Print one JSON object that says what was done."""


def run(options: Options) -> None:
    from ebbflow.cli import _outputs
    from ebbflow.cli._draw import Shard

    began = time.perf_counter()
    recipe, facts = prepare(options)
    columns, whole = grid_size(len(recipe.classes))
    count = options.count
    if count is None:
        count = POINTS if len(recipe.shape) == 1 else whole
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    shard = Shard.parse(options.shard)
    output = _outputs.choose(options.out, recipe, facts, count, columns, shard)
    chunks = [c for c in shard.chunks(count, recipe.batch) if not output.has(c)]
    steps = len(recipe.plan.times) - 1
    with progress("sampling", len(chunks) * steps) as advance:
        for chunk, samples in recipe.stream(chunks, lambda point: advance()):
            output.add(chunk, samples)
    output.finish()
    drawn = sum(len(chunk) for chunk in chunks)
    report = {
        "out": str(options.out),
        "drawn": drawn,
        "skipped": sum(len(c) for c in shard.chunks(count, recipe.batch)) - drawn,
        **facts,
        "nfe": recipe.plan.nfe,
        "device": str(recipe.device),
        "seconds": round(time.perf_counter() - began, 2),
    }
    if options.json:
        print_json(report)
        return
    there = f", {report['skipped']} were there" if report["skipped"] else ""
    calls = "as many calls as it takes" if recipe.plan.nfe is None else f"{recipe.plan.nfe} calls"
    print(
        f"{options.out}: {drawn} samples drawn{there}; {facts['solver']}, {calls}, "
        f"guidance {facts['guidance']:g}, {report['seconds']:.1f} s"
    )


def prepare(options: Options) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that the options ask for, and what identifies it, as JSON values."""
    from ebbflow.cli import _models
    from ebbflow.cli._draw import Recipe

    device = pick_device(options.device)
    loaded = None if options.plan is None else _models.plan_of(options.model, options.plan)
    guidance = options.guidance
    if guidance is None:
        guidance = _models.guidance_of(options.model, loaded)
    denoiser, classes = _models.guided(options.model, device, options.classes, guidance)
    shape = denoiser.shape
    if shape is None:
        raise ValueError(f"the model {options.model!r} does not state the shape of a sample")
    name, plan = _plan(options, loaded, denoiser, classes)
    batch = options.batch
    if batch is None:
        batch = POINTS if len(shape) == 1 else 16 if device.type == "cpu" else 256
    if batch < 1 or options.seed < 0:
        raise ValueError(f"batch {batch} and seed {options.seed}: give at least 1 and at least 0")
    facts = {
        "model": options.model,
        "classes": list(classes),
        "solver": name,
        **({} if options.tolerance is None else {"tolerance": options.tolerance}),
        "steps": len(plan.times) - 1,
        "guidance": guidance,
        "seed": options.seed,
        "batch": batch,
    }
    recipe = Recipe(denoiser, plan, shape, classes, options.seed, batch, device)
    return recipe, facts


def _plan(
    options: Options, loaded: Plan | None, denoiser: Denoiser, classes: tuple[int, ...]
) -> tuple[str, Any]:
    """The name of what was asked for, and its plan."""
    from ebbflow import solvers
    from ebbflow.cli import _models

    asked = {
        "--solver": options.solver,
        "--steps": options.steps,
        "--nfe": options.nfe,
        "--tolerance": options.tolerance,
    }
    if loaded is not None:
        given = [f"{name} {value}" for name, value in asked.items() if value is not None]
        if given:
            raise ValueError(f"give --plan {options.plan} or {given[0]}, not both")
        return f"plan {_digest(loaded)}", loaded
    chosen = _models.config_of(options.model).get("details", {}).get("sampling", {})
    name = options.solver or chosen.get("solver", "auto")
    solver = solvers.get(name)
    if options.tolerance is not None:
        solver = solvers.get(name, tolerance=options.tolerance)
    known_law = denoiser.statistics
    if known_law is not None and classes:
        known_law = known_law.given(label=classes)
    if options.nfe is not None:
        if options.steps is not None:
            raise ValueError(f"give --steps {options.steps} or --nfe {options.nfe}, not both")
        return solver.name, solver.largest(denoiser.schedule, options.nfe, known_law)
    steps = options.steps
    if steps is None and not solver.adaptive:
        steps = int(chosen.get("steps", STEPS))
    return solver.name, solver.plan(denoiser.schedule, steps, statistics=known_law)


def _digest(plan: Plan) -> str:
    """What tells a plan from others."""
    digest = hashlib.sha256(json.dumps(plan.to_config(), sort_keys=True).encode())
    for _, tensor in sorted(plan.tensors().items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def grid_size(classes: int) -> tuple[int, int]:
    """Columns and samples of a grid of whole rows: eight or more rows, 64 or more samples.

    The columns are a multiple of the number of classes, where they are few: then a column is of
    one class.
    """
    columns = ROWS
    if 0 < classes <= 2 * ROWS:
        columns = classes * max(1, round(ROWS / classes))
    return columns, columns * max(ROWS, -(-(ROWS**2) // columns))
