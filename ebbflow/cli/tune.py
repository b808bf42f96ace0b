"""Fit a plan of few steps to one model.

Examples:
  ebbflow tune --nfe 6 --out plan.json            the model in the package, six calls
  ebbflow tune --model models/mine --budget 900   a model that you trained, 15 minutes
  ebbflow tune --guidance 2 --classes 3 5         under guidance, two classes
  ebbflow tune --start unipc-b2-3 --nfe 10        from a solver of your choice
  ebbflow tune --polish 0.01                      and then a little nearer to real pictures
  ebbflow tune --method times --start ddim        a search over the times of ddim

`ebbflow sample --plan plan.json` uses it. The same command goes on where it was stopped. The plan
is a JSON file that says which model it belongs to, what made it and the errors on noise that was
held out; coefficients that differ by coordinate lie beside it as safetensors.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ebbflow.cli._shared import pick_device, print_json, print_table

if TYPE_CHECKING:
    import torch

    from ebbflow.denoiser import Denoiser
    from ebbflow.plan import Plan


POLISHED = 2000  # samples, half of which decide, half judge


@dataclass(frozen=True)
class Options:
    model: str = "fashion-mnist"
    """A model in the package, a folder with config.json, or `oracle`."""
    nfe: int = 8
    """Calls of the denoiser, at least 2."""
    classes: tuple[int, ...] = ()
    """Classes to tune for, given to the samples in turn; without it, all."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 1 is none; without it, the model's own choice."""
    method: Literal["learned", "times", "solvers"] = "learned"
    """learned: Gauss-Newton on times and coefficients; times: an evolutionary search over the
    times of one solver; solvers: a search over the solver of every step."""
    start: str = "auto"
    """The solver to start from, or whose times are searched; with learned, auto is the best of a
    few for this model, and a plan's file is gone on with."""
    budget: float = 300.0
    """Seconds for everything; about a fourth goes into the model's converged samples."""
    evaluations: float | None = None
    """In place of --budget, evaluations of the model on one sample; the result is reproducible."""
    samples: int | None = None
    """Converged samples, a third of them held out; without it, by the budget."""
    polish: float | None = None
    """Then move the plan towards a smaller Fréchet distance to real pictures, that of `ebbflow
    evaluate`, its samples by at most so many deviations: 0.01 cannot be seen."""
    features: Path | None = None
    """Folder of another classifier for --polish, as in `ebbflow evaluate`."""
    seed: int = 0
    """Seed of the noise; never the noise that `ebbflow sample` draws."""
    out: Path = Path("plan.json")
    """Where the plan goes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    json: bool = False
    """Print one JSON object that says what was done."""


def run(options: Options) -> None:
    import torch

    from ebbflow.cli import _models
    from ebbflow.plan import Plan
    from ebbflow.tuning import polish, tune

    began = time.perf_counter()
    if options.polish is not None and not 0 < options.polish < 1:
        raise ValueError(f"polish is {options.polish}: give deviations between 0 and 1")
    if options.out.suffix != ".json":
        raise ValueError(f"out is {options.out}: a plan is a .json file")
    device = pick_device(options.device)
    guidance = options.guidance
    if guidance is None:
        guidance = _models.guidance_of(options.model)
    denoiser, classes = _models.guided(options.model, device, options.classes, guidance)
    condition: dict[str, Any] = {"label": torch.tensor(classes, device=device)} if classes else {}
    distance = None if options.polish is None else _frechet(options.features, denoiser)
    if options.method == "learned":
        plan = tune(
            denoiser,
            options.nfe,
            start=Plan.load(options.start) if options.start.endswith(".json") else options.start,
            seed=options.seed,
            budget_seconds=options.budget,
            budget_evaluations=options.evaluations,
            samples=options.samples,
            command=_command(options),
            resume=options.out.with_name(f".{options.out.stem}.tuning.safetensors"),
            progress=True,
            **condition,
        )
    else:
        plan = _search(options, denoiser, condition)
    if distance is not None and options.polish is not None:
        kept = {"departure": options.polish, "samples": POLISHED, "progress": True}
        plan = polish(denoiser, plan, distance, seed=options.seed + 1, **kept, **condition)
    plan.save(options.out)
    seconds = round(time.perf_counter() - began, 1)
    if options.json:
        print_json({"out": str(options.out), "seconds": seconds, **plan.origin})
        return
    if options.method == "learned":
        _table(plan)
        what = f"tuned on {plan.origin['samples'][0]} samples"
    else:
        before, after = plan.origin["error_before"], plan.origin["error_after"]
        what = f"error {after:.4f}, {before:.4f} before, on samples held out"
    print(
        f"{options.out}: {what}, {plan.origin['evaluations']:.0f} evaluations, {seconds:.0f} s; "
        f"use it with `ebbflow sample --plan {shlex.quote(str(options.out))}`"
    )


def _table(plan: Plan) -> None:
    rows = [
        (name, *(f"{value:.4f}" for value in found.values()))
        for name, found in plan.origin["held out"].items()
    ]
    held_out = plan.origin["samples"][1]
    title = f"{plan.nfe} calls, {held_out} samples held out, errors in deviations of the samples"
    print_table(["plan", "mean", "root mean square", "median"], rows, title)


def _frechet(folder: Path | None, denoiser: Denoiser) -> Callable[[torch.Tensor], float]:
    """The distance of samples to the real pictures that a classifier's folder knows."""
    from ebbflow.images import to_uint8
    from ebbflow.metrics import classifier
    from ebbflow.metrics.features import extract
    from ebbflow.metrics.frechet import frechet_distance
    from ebbflow.metrics.report import Reference

    folder = folder or classifier.FOLDER
    network = classifier.load(folder)
    if network.shape != denoiser.shape:
        raise ValueError(
            f"--polish: the classifier in {folder} takes pictures of shape {network.shape}, the "
            f"model draws {denoiser.shape}: give another one by --features"
        )
    real = Reference.load(folder / "reference.safetensors").moments

    def distance(samples: torch.Tensor) -> float:
        pixels = to_uint8(samples).permute(0, 3, 1, 2)
        network.to(samples.device)
        return frechet_distance(extract(network.features, pixels, device=samples.device), real)

    return distance


def _search(options: Options, denoiser: Denoiser, condition: Mapping[str, Any]) -> Plan:
    """By one of the searches; half of the budget may go into the converged samples."""
    from ebbflow.tuning import references, search_solvers, search_times
    from ebbflow.tuning.budget import Budget

    if options.method == "solvers" and options.start != "auto":
        raise ValueError(f"--method solvers searches over solvers: leave --start {options.start}")
    budget = Budget(options.budget, options.evaluations)
    known = references(
        denoiser,
        count=options.samples or 128,
        seed=options.seed,
        condition=condition,
        most=64,
        seconds=options.budget / 2,
        progress=True,
    )
    evaluations = None
    if options.evaluations is not None:
        evaluations = (options.evaluations - known.evaluations) / len(known)
        if evaluations < 2 * options.nfe:
            least = known.evaluations + 2 * options.nfe * len(known)
            raise ValueError(f"--evaluations {options.evaluations:g}: give at least {least:.0f}")
    shared: dict[str, Any] = {
        "references": known,
        "seed": options.seed,
        "evaluations": evaluations,
        "budget_seconds": max(1.0, options.budget - budget.passed),
        "progress": True,
    }
    if options.method == "solvers":
        plan = search_solvers(denoiser, options.nfe, **shared)
    else:
        plan = search_times(denoiser, options.nfe, solver=options.start, **shared)
    spent = plan.origin["evaluations"] * len(known) + known.evaluations
    return replace(plan, origin={**plan.origin, "evaluations": spent, "command": _command(options)})


def _command(options: Options) -> str:
    """The command that gives these options, without those that change nothing of the result."""
    words = ["ebbflow", "tune"]
    silent = ("out", "device", "json")
    for name, default in vars(Options()).items():
        value = getattr(options, name)
        if value != default and name not in silent:
            listed = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, listed)]
    return shlex.join(words)
