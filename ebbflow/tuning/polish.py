"""A plan moved a little, so that its samples come nearer to real data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.progress import bar
from ebbflow.tuning.fit import Directions
from ebbflow.tuning.learned import axes
from ebbflow.tuning.passage import Frame
from ebbflow.tuning.references import beginning, statistics_of
from ebbflow.tuning.residual_form import ResidualForm

CHUNK = 64
LEAST = 1e-3  # share of the greatest eigenvalue, of directions that are used


@torch.no_grad()
def polish(
    denoiser: Denoiser,
    plan: Plan,
    distance: Callable[[Tensor], float],
    *,
    departure: float = 0.01,
    samples: int = 1000,
    seed: int = 1,
    progress: bool = False,
    **condition: Any,
) -> Plan:
    """The plan with times and coefficients that carry its samples by `departure` to where
    `distance` falls fastest.

    A plan that follows the model's own ODE ends at the model's samples, which are not the data: a
    small move can remove some of what the model leaves there, as coarse solvers do by accident. One
    step of steepest descent, in the metric of the departure, by differences: the distance need not
    be differentiable. Half of the samples give the step, at the cost of about n²/3 runs of n calls;
    the others judge it: the plan comes back as it was where their distance does not fall.

    Args:
        plan: deterministic, such as one that was tuned.
        distance: of samples (N, *shape) from the data, such as the Fréchet distance of features.
        departure: at most, root mean square over samples and coordinates, in deviations of the
            samples.
        samples: how many, both halves together.
        condition: for the model; rows of tensors are given to the samples in turn.

    Raises ValueError for a departure that is not positive, or too few samples.
    """
    if not departure > 0:
        raise ValueError(f"departure is {departure}: give a positive number of deviations")
    if samples < 4 or denoiser.shape is None:
        raise ValueError(f"samples is {samples}, at least 4, of a denoiser with a shape")
    found = beginning(denoiser, denoiser.shape, samples, seed, condition)
    ends = found.run(denoiser, plan)
    deviation = float((ends - ends.mean(0)).square().mean().sqrt())
    found = replace(found, end=ends, samples=ends, deviation=deviation)
    statistics = None if plan.basis is None else statistics_of(denoiser, found)
    form = ResidualForm.of(plan, axes(plan, found, statistics))
    directions, half = Directions(form), found.split(samples // 2)[0]
    frames = [
        Frame(form, denoiser, half.rows(index)) for index in torch.arange(len(half)).split(CHUNK)
    ]
    runs = [frame.run(form.first) for frame in frames]
    here = torch.cat([run.sample for run in runs])
    start, sizes = distance(here), directions.sizes(form, form.first, runs[0])
    slope, columns = torch.zeros_like(sizes), []
    with bar("polishing", len(directions), progress) as advance:
        for p, (move, first) in enumerate(zip(sizes.diag(), directions.first, strict=True)):
            moved = directions.moved(form.first, move)
            both = zip(frames, runs, strict=True)
            there = torch.cat([frame.run(moved, run, first).sample for frame, run in both])
            slope[p] = (distance(there) - start) / sizes[p]
            columns.append((there - here).flatten() / float(sizes[p]))
            advance()
    table = torch.stack(columns, 1) / (found.deviation * math.sqrt(here.numel()))
    metric = (table.T @ table).to(slope)
    # In units of the moves; along what is left out, parameters undo one another or do too little.
    values, vectors = torch.linalg.eigh(metric * torch.outer(sizes, sizes))
    vectors = sizes[:, None] * vectors[:, values > LEAST * values.max()]
    step = -vectors @ torch.linalg.solve(vectors.T @ metric @ vectors, vectors.T @ slope)
    step *= departure / (step @ metric @ step).sqrt().clamp(min=1e-300)
    tried = [form.plan(directions.moved(form.first, share * step)) for share in (1.0, 0.5, 0.25)]
    best = min(tried, key=lambda plan: distance(half.run(denoiser, plan)))
    judges = found.split(samples // 2)[1]
    ends = judges.samples, judges.run(denoiser, best)
    before, after = map(distance, ends)
    if not after < before:
        return plan
    apart = (ends[1] - ends[0]).square().mean().sqrt() / found.deviation
    facts = {"departure": float(apart), "distance": after, "distance before": before}
    rounded = {name: float(f"{value:.4g}") for name, value in facts.items()}
    return replace(best, origin={**plan.origin, "polished": rounded})
