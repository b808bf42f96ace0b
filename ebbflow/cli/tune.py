"""Fit a plan of few steps to one model.

Examples:
  ebbflow tune --nfe 6 --out plan.json            the model in the package, six calls
  ebbflow tune --model models/mine --budget 900   a model that you trained, 15 minutes
  ebbflow tune --guidance 2 --classes 3 5         under guidance, two classes
  ebbflow tune --start unipc-b2-3 --nfe 10        from a solver of your choice
  ebbflow sample --plan plan.json                 and use it

The same command goes on where it was stopped. The plan is a JSON file that says which model it
belongs to, what made it and the errors on noise that was held out; coefficients that differ by
coordinate lie beside it as safetensors.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbflow.cli._shared import pick_device, print_json, print_table


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
    start: str = "auto"
    """The solver to start from; auto is the best of a few for this model."""
    budget: float = 300.0
    """Seconds for everything; about a fourth goes into the model's converged samples."""
    evaluations: float | None = None
    """In place of --budget, evaluations of the model on one sample; the result is reproducible."""
    samples: int | None = None
    """Converged samples, a third of them held out; without it, by the budget."""
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
    from ebbflow.tuning import tune

    began = time.perf_counter()
    if options.out.suffix != ".json":
        raise ValueError(f"out is {options.out}: a plan is a .json file")
    device = pick_device(options.device)
    guidance = options.guidance
    if guidance is None:
        guidance = _models.guidance_of(options.model)
    denoiser, classes = _models.guided(options.model, device, options.classes, guidance)
    condition: dict[str, Any] = {"label": torch.tensor(classes, device=device)} if classes else {}
    plan = tune(
        denoiser,
        options.nfe,
        start=options.start,
        seed=options.seed,
        budget_seconds=options.budget,
        budget_evaluations=options.evaluations,
        samples=options.samples,
        command=_command(options),
        resume=options.out.with_name(f".{options.out.stem}.tuning.safetensors"),
        progress=True,
        **condition,
    )
    plan.save(options.out)
    seconds = round(time.perf_counter() - began, 1)
    figures = plan.origin["held out"]
    if options.json:
        print_json({"out": str(options.out), "seconds": seconds, **plan.origin})
        return
    rows = [(name, *(f"{v:.4f}" for v in found.values())) for name, found in figures.items()]
    train, held_out = plan.origin["samples"]
    title = f"{plan.nfe} calls, {held_out} samples held out, errors in deviations of the samples"
    print_table(["plan", "mean", "root mean square", "median"], rows, title)
    print(
        f"{options.out}: tuned on {train} samples, {plan.origin['evaluations']} evaluations, "
        f"{seconds:.0f} s; use it with `ebbflow sample --plan {shlex.quote(str(options.out))}`"
    )


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
