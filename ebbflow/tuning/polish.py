"""The last row of a plan, moved a little so that its samples come nearer to real data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.progress import bar
from ebbflow.tuning.fit import Directions
from ebbflow.tuning.learned import axes
from ebbflow.tuning.passage import Frame
from ebbflow.tuning.references import (
    STREAM,
    References,
    conditions_in_turn,
    statistics_of,
    themselves,
)
from ebbflow.tuning.residual_form import ResidualForm

ROUNDS = 4
CHUNK = 64


@torch.no_grad()
def polish(
    denoiser: Denoiser,
    plan: Plan,
    distance: Callable[[Tensor], float],
    *,
    departure: float = 0.015,
    samples: int = 1000,
    seed: int = 1,
    progress: bool = False,
    **condition: Any,
) -> Plan:
    """The plan with another last row: its samples leave theirs by at most `departure`, where
    `distance` falls fastest.

    What a plan and the model's own ODE have in common is the model, whose samples are not the
    data; a last row that removes some of what the model leaves there, as coarse solvers do by
    accident, is nearer to the data and costs no call. Steepest descent in the metric of the
    departure, by differences of the distance: it need not be differentiable. Half of the samples
    serve it, the others judge: the plan comes back as it was where their distance does not fall.

    Args:
        plan: deterministic, such as one that was tuned.
        distance: of samples (N, *shape) from the data, such as the Fréchet distance of features.
        departure: root mean square over all samples and coordinates, in deviations of the samples.
        samples: how many, both halves together.
        condition: for the model; rows of tensors are given to the samples in turn.

    Raises ValueError for a departure that is not positive, or too few samples.
    """
    if not departure > 0:
        raise ValueError(f"departure is {departure}: give a positive number of deviations")
    if samples < 4 or denoiser.shape is None:
        raise ValueError(f"samples is {samples}, at least 4, of a denoiser with a shape")
    found = _own(denoiser, plan, samples, seed, condition)
    statistics = None if plan.basis is None else statistics_of(denoiser, found)
    form = ResidualForm.of(plan, axes(plan, found, statistics))
    free = Directions(form, form.nfe)
    halves = [
        [Frame(form, denoiser, half.rows(index)) for index in torch.arange(len(half)).split(CHUNK)]
        for half in found.split(samples // 2)
    ]
    known = [[frame.run(form.first) for frame in half] for half in halves]

    def drawn(move: Tensor, half: int) -> Tensor:
        parameters = free.moved(form.first, move)
        both = zip(halves[half], known[half], strict=True)
        return torch.cat([frame.run(parameters, run, form.nfe).sample for frame, run in both])

    one = torch.eye(len(free), dtype=torch.float64)
    here = drawn(0 * one[0], 0)
    columns = torch.stack([(drawn(e, 0) - here).flatten().double() for e in one], 1)
    columns /= found.deviation * math.sqrt(len(columns))
    # In coordinates y whose length is the departure; columns may depend on one another.
    root = torch.linalg.cholesky(columns.T @ columns + 1e-9 * one * columns.square().sum())

    def of(y: Tensor, half: int = 0) -> float:
        move = torch.linalg.solve_triangular(root.T, y[:, None], upper=True)[:, 0]
        return distance(drawn(move, half))

    y, h = 0 * one[0], departure / 8
    with bar("polishing", ROUNDS * len(free), progress) as advance:
        for _ in range(ROUNDS):
            slope = torch.zeros_like(y)
            for k, e in enumerate(one):
                slope[k] = of(y + h * e) - of(y - h * e)
                advance()
            y = y - departure / 2 * slope / slope.norm().clamp(min=1e-300)
            y = y * (departure / y.norm().clamp(min=departure))
    before, after = of(0 * y, 1), of(y, 1)
    if not after < before:
        return plan
    move = torch.linalg.solve_triangular(root.T, y[:, None], upper=True)[:, 0]
    facts = {"departure": float(y.norm()), "distance": after, "distance before": before}
    rounded = {name: float(f"{value:.4g}") for name, value in facts.items()}
    return replace(
        form.plan(free.moved(form.first, move)), origin={**plan.origin, "polished": rounded}
    )


def _own(
    denoiser: Denoiser, plan: Plan, count: int, seed: int, condition: dict[str, Any]
) -> References:
    """The plan's own samples of noise that `sample` never draws."""
    like = next(denoiser.parameters(), torch.zeros((), dtype=torch.get_default_dtype()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    assert denoiser.shape is not None
    z = noise.normal(seed, range(count), 0, denoiser.shape, dtype, like.device, stream=STREAM)
    start = z * denoiser.schedule.sigma(1.0).item()
    turned = conditions_in_turn(condition, count)
    found = References(start, start, turned, 1.0, 0.0, themselves, start)
    samples = found.run(denoiser, plan)
    deviation = float((samples - samples.mean(0)).square().mean().sqrt())
    return replace(found, end=samples, samples=samples, deviation=deviation)
