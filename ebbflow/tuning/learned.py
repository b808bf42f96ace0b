"""Learned plans: times and coefficients fitted to a model's own converged samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow import solvers
from ebbflow.bases import Basis
from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.progress import bar
from ebbflow.solvers import Solver
from ebbflow.statistics import Statistics
from ebbflow.tuning.budget import Budget
from ebbflow.tuning.fit import END, Fit, measure, score
from ebbflow.tuning.identity import identity
from ebbflow.tuning.references import (
    Features,
    References,
    conditions_in_turn,
    references,
    statistics_of,
    themselves,
)
from ebbflow.tuning.regression import regression
from ebbflow.tuning.residual_form import Axes, ResidualForm
from ebbflow.tuning.saved import Saved

SAVE_EVERY = 20.0  # seconds
SEARCH = 0.25
"""Share of what the converged samples leave that goes into the search for a start."""
STARTS = ("unit-residual", "dpm-solver++2m", "unipc-b2-3")


def tune(
    denoiser: Denoiser,
    nfe: int = 8,
    *,
    start: str | Solver | Plan = "auto",
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    budget_seconds: float = 60.0,
    budget_evaluations: float | None = None,
    samples: int | None = None,
    features: Features = themselves,
    command: str = "ef.tune",
    resume: str | Path | None = None,
    progress: bool = False,
    **condition: Any,
) -> Plan:
    """A plan of `nfe` calls fitted to this model.

    The times of the calls and all coefficients move, in coordinates without units (`ResidualForm`),
    to the model's own converged samples of the same noise: first levels by a random search, with
    rows by regression along the model's paths (`regression`), then all by Gauss-Newton steps on the
    errors (`Fit`), by differences, so that the network needs no gradient. Where the model has no
    statistics, those samples give them, if they share one condition. Noise that was held out
    decides which plan is kept; the start is kept where nothing does better on it. `origin` says
    what was tuned on which model, and the errors.

    Args:
        nfe: calls of the plan, at least 2; a plan given as `start` has its own.
        start: a plan, a solver, or the name of one; "auto" is the best of a few for this model.
        shape: of one sample, unless the denoiser states it.
        seed: of the noise, which is never the noise that `sample` draws.
        budget_seconds: wall time for everything; about a fourth goes into the converged samples.
        budget_evaluations: in its place, evaluations of the model on one sample each; the result
            then depends on the arguments alone.
        samples: how many converged samples, a third of them held out; by the budget unless given.
        features: from samples (B, *shape) to what is compared, (B, …).
        command: that made the plan, for its record.
        resume: a file for the state of the work, with which the same call goes on where it stopped.
        condition: for the model; rows of tensors are given to the samples in turn.

    Raises ValueError for a start that is no plan, draws noise or lives on another schedule.
    """
    shape = denoiser.shape if shape is None else tuple(shape)
    if shape is None:
        raise ValueError("the denoiser states no shape: give shape=, that of one sample")
    given = start if isinstance(start, Plan) else None
    nfe = nfe if given is None else given.nfe
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 2:
        raise ValueError(f"nfe is {nfe!r}: tuning takes an integer of at least 2 calls")
    if given is not None and given.schedule != denoiser.schedule:
        raise ValueError(f"start lives on {given.schedule!r}, the model on {denoiser.schedule!r}")
    budget = Budget(budget_seconds, budget_evaluations)
    model = identity(denoiser)
    named = given.to_config() if given is not None else getattr(start, "name", start)
    request = {
        "model": model,
        "schedule": denoiser.schedule.config(),
        "condition": {name: _words(value) for name, value in condition.items()},
        "start": named,
        "features": getattr(features, "__qualname__", type(features).__name__),
        "settings": [nfe, list(shape), seed, samples, budget_seconds, budget_evaluations],
    }
    saved = Saved.read(resume, request)
    total = budget.total(denoiser, shape, condition) if saved is None else 0.0
    if saved is None:
        count = samples or max(24, min(1200, int(total / 4 / 48)))
        most = 2 ** max(5, min(9, int(math.log2(total / 4 / count + 16)) - 1))
        seconds = budget_seconds / 3 if budget_evaluations is None else math.inf
        found = references(
            denoiser,
            shape,
            count,
            seed=seed,
            condition=condition,
            features=features,
            most=most,
            seconds=seconds,
            progress=progress,
        )
        budget.spend(found.evaluations)
    else:
        device = next(denoiser.parameters(), torch.zeros(())).device
        found = _known(saved, features, condition, device)
        budget.spend(saved.numbers["evaluations"], saved.numbers["seconds"])
    held_out, train = found.split(max(1, len(found) // 3))
    statistics = statistics_of(denoiser, train)
    centred = statistics is None and denoiser.mean(found.start[:1]) is not None
    candidates = list(_starts(denoiser, start, nfe, statistics, centred))
    chosen = min(candidates, key=lambda plan: score(measure(denoiser, plan, train)))
    if saved is None:
        budget.spend(len(candidates) * len(train) * nfe)
    form = ResidualForm.of(chosen, axes(chosen, train, statistics))
    first, left = form.first, max(0.25, END - budget.share)
    if saved is None and given is None:
        until, each = budget.share + SEARCH * left, SEARCH * left * total
        first = regression(form, denoiser, train, budget, until, each, seed)
        left *= 1 - SEARCH
    fit = Fit(form, denoiser, train, held_out, left * total, seed, first, saved)
    with bar("fitting", 100, progress) as advance:
        shown, written = 0, -math.inf
        for _ in fit.run(budget):
            if resume is not None and time.monotonic() - written > SAVE_EVERY:
                written = time.monotonic()
                _state(fit, found, budget).write(resume, request)
            while shown < min(100, int(100 * budget.share)):
                shown += 1
                advance()
    plans = {"tuned": form.plan(fit.best)} | {_name(plan): plan for plan in candidates}
    errors = {name: measure(denoiser, plan, held_out) for name, plan in plans.items()}
    best = min(plans, key=lambda name: score(errors[name]))
    errors["tuned"] = errors[best]
    origin = {
        "solver": "tuned",
        "start": dict(chosen.origin),
        "command": command,
        "model": model,
        "seed": seed,
        "condition": {name: _words(value) for name, value in condition.items()},
        "samples": [len(train), len(held_out)],
        "evaluations": round(budget.spent),
        "held out": {name: _figures(each) for name, each in errors.items()},
        "uncertainty of the converged samples": found.uncertainty,
    }
    if resume is not None:
        Path(resume).unlink(missing_ok=True)
    return replace(plans[best], origin=origin)


def _state(fit: Fit, found: References, budget: Budget) -> Saved:
    numbers = fit.numbers() | {
        "deviation": found.deviation,
        "uncertainty": found.uncertainty,
        "evaluations": budget.spent,
        "seconds": budget.passed,
    }
    kept = {"start": found.start, "samples": found.samples}
    return Saved(numbers, fit.tensors() | kept)


def _known(
    saved: Saved, features: Features, condition: Mapping[str, Any], device: torch.device
) -> References:
    """The converged samples that an earlier process made."""
    start, samples = (saved.tensors[name].to(device) for name in ("start", "samples"))
    turned = conditions_in_turn(condition, len(start))
    numbers = saved.numbers
    facts = (numbers["deviation"], numbers["uncertainty"], features, samples)
    return References(start, features(samples), turned, *facts)


def _words(value: Any) -> Any:
    if isinstance(value, Tensor):
        rows = value.tolist()
        return rows if value.numel() <= 32 else f"{tuple(value.shape)} tensor"
    return value if isinstance(value, int | float | str | None) else repr(value)


def _name(plan: Plan) -> str:
    name = str(plan.origin.get("solver", "start"))
    return "start" if name == "tuned" else name


def _figures(errors: Tensor) -> dict[str, float]:
    """In deviations of the samples."""
    values = {
        "mean": errors.mean(),
        "root mean square": errors.square().mean().sqrt(),
        "median": errors.median(),
    }
    return {name: float(f"{value.item():.4g}") for name, value in values.items()}


def _starts(
    denoiser: Denoiser,
    start: str | Solver | Plan,
    nfe: int,
    statistics: Statistics | None,
    centred: bool,
) -> Iterator[Plan]:
    if isinstance(start, Plan):
        yield start
        return
    asked = [solvers.get(s) if isinstance(s, str) else s for s in _names(start, statistics)]
    for solver in asked:
        plan = solver.largest(denoiser.schedule, nfe, statistics)
        if not isinstance(plan, Plan):
            raise ValueError(f"{solver.name} is no plan: tune one that is, such as unipc-b2-3")
        yield replace(plan, centred=centred)


def _names(start: str | Solver, statistics: Statistics | None) -> tuple[str | Solver, ...]:
    if start != "auto":
        return (start,)
    return STARTS if statistics is None else ("gaussian-residual", *STARTS)


def axes(plan: Plan, found: References, statistics: Statistics | None) -> Axes:
    """Coordinates to tune in: those of the law's statistics, else one variance for all."""
    basis = None if statistics is None else statistics.axes
    if plan.basis is not None and plan.basis != basis:
        raise ValueError("start has coordinates of its own: tune it on the model of its statistics")
    if statistics is None or basis is None:
        samples = found.samples.double()
        variance = (samples - samples.mean(0)).square().mean().cpu()
        return Axes(Basis("identity", ()), torch.zeros_like(variance), variance)
    mean = basis.forward(statistics.mean[None].double())[0]
    variance = statistics.variance.double().reshape(basis.shape)
    return Axes(basis, mean, variance.clamp(min=0.01 * float(variance.mean())))
