"""Where a model's own samples end: what plans are tuned and searched against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise, solvers
from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.progress import bar
from ebbflow.solvers.stepping import Walk, cut
from ebbflow.statistics import Statistics

SOLVER = "unipc-b2-3"
STREAM = 4
"""Of the noise, so that no sample that `sample` draws is one that was tuned on."""

Features = Callable[[Tensor], Tensor]
"""From samples (B, *shape) to what is compared, (B, …)."""


def themselves(samples: Tensor) -> Tensor:
    """The features that are the samples."""
    return samples


@dataclass(frozen=True)
class References:
    """Noise and the converged samples that a model makes of it.

    Args:
        start: (N, *shape), states at t = 1.
        end: (N, …), the features of the samples at t = 0 that the probability-flow ODE reaches.
        condition: of the N samples; tensors whose first axis is N belong to the samples.
        deviation: of `end`, the root mean square over its coordinates; the unit of errors.
        uncertainty: error of `end` itself, of the median sample, in that unit, estimated.
        features: in which samples are compared.
        samples: (N, *shape), whose features `end` are.
        evaluations: of the model on one sample each, that all of it took.
    """

    start: Tensor
    end: Tensor
    condition: Mapping[str, Any]
    deviation: float
    uncertainty: float
    features: Features
    samples: Tensor
    evaluations: int = 0

    def __len__(self) -> int:
        return len(self.start)

    def rows(self, index: Tensor | slice) -> References:
        """Some of them, in the same unit."""
        which = torch.arange(len(self))[index]
        condition = {name: cut(v, which, len(self)) for name, v in self.condition.items()}
        start, end, samples = self.start[which], self.end[which], self.samples[which]
        return replace(self, start=start, end=end, condition=condition, samples=samples)

    def split(self, count: int) -> tuple[References, References]:
        """The first `count` of them and the rest."""
        return self.rows(slice(count)), self.rows(slice(count, None))

    def distance(self, samples: Tensor) -> Tensor:
        """(N,): root mean square over the features of a sample's error, in deviations."""
        error = (self.features(samples) - self.end).flatten(1)
        return error.square().mean(1).sqrt() / self.deviation

    @torch.no_grad()
    def run(
        self, denoiser: Denoiser, plan: Plan | Walk, advance: Callable[[], None] = lambda: None
    ) -> Tensor:
        """(N, *shape): what a plan makes of the same noise, some at a time; `advance` after each
        part."""
        ends = []
        for index in _chunks(self.start):
            part = self.rows(index)
            ends.append(plan.run(denoiser, part.start, **part.condition))
            advance()
        return torch.cat(ends)

    def errors(self, denoiser: Denoiser, plan: Plan | Walk) -> Tensor:
        """(N,): the `distance` of what a plan makes of the same noise."""
        with torch.no_grad():
            return self.distance(self.run(denoiser, plan))


def references(
    denoiser: Denoiser,
    shape: tuple[int, ...] | None = None,
    count: int = 640,
    *,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
    features: Features = themselves,
    tolerance: float = 1e-4,
    most: int = 512,
    seconds: float = math.inf,
    progress: bool = False,
) -> References:
    """Follow `count` samples of a model to convergence.

    UniPC-3 with steps that double, until their effect, divided by 7, is below `tolerance`
    deviations for the median sample, `most` steps are reached, or twice as many as the last would
    exceed `seconds`.

    Args:
        shape: of one sample, unless the denoiser states it.
        condition: shared values, and tensors whose rows are given to the samples in turn.
        features: in which samples are compared, such as those of a classifier.

    Raises ValueError for a denoiser without a shape, and for samples that do not differ.
    """
    began = time.monotonic()
    shape = denoiser.shape if shape is None else tuple(shape)
    if shape is None:
        raise ValueError("the denoiser states no shape: give shape=, that of one sample")
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    found = beginning(denoiser, shape, count, seed, condition or {}, features)
    start, schedule = found.start, denoiser.schedule
    steps, ends, change = 16, start, math.inf
    total = len(_chunks(start)) * (int(math.log2(most)) - 3)
    with torch.no_grad(), bar("converged samples", total, progress) as advance:
        while True:
            plan = solvers.get(SOLVER).plan(schedule, steps)
            before, ends = ends, found.run(denoiser, plan, advance)
            seen = features(ends)
            flat = seen.flatten(1)
            deviation = float((flat - flat.mean(0)).square().mean().sqrt())
            if not deviation > 0:
                raise ValueError("all converged samples are equal: there is nothing to tune")
            if steps > 16:
                apart = (flat - features(before).flatten(1)).square().mean(1).sqrt()
                change = float(apart.median()) / deviation / 7
            spent = time.monotonic() - began
            if change < tolerance or 2 * steps > most or 3 * spent > seconds:
                break
            steps *= 2
    calls = count * (2 * steps - 16)
    facts = {"deviation": deviation, "uncertainty": change, "evaluations": calls}
    return replace(found, end=seen, samples=ends, **facts)


def beginning(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    count: int,
    seed: int,
    condition: Mapping[str, Any],
    features: Features = themselves,
) -> References:
    """Noise and conditions of `count` samples, the noise in the place of the samples to come."""
    like = next(denoiser.parameters(), torch.zeros((), dtype=torch.get_default_dtype()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    z = noise.normal(seed, range(count), 0, shape, dtype, like.device, stream=STREAM)
    start = z * denoiser.schedule.sigma(1.0).item()
    turned = conditions_in_turn(condition, count)
    return References(start, start, turned, 1.0, math.inf, features, start)


def _chunks(start: Tensor) -> Sequence[Tensor]:
    """Indices that are computed together: some, not too many numbers at once."""
    return torch.arange(len(start)).split(max(16, min(512, 2**18 // start[0].numel())))


def conditions_in_turn(condition: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The rows of tensors given to `count` samples in turn; all else is shared."""

    def turned(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            return value[torch.arange(count, device=value.device) % len(value)]
        return value

    return {name: turned(value) for name, value in condition.items()}


def statistics_of(denoiser: Denoiser, found: References) -> Statistics | None:
    """Of the law that the samples have in common: the denoiser's own, else those of the samples.

    None for samples of different conditions, whose pooled statistics would be wrong for each of
    them, and for too few samples (four a coordinate, unless they are images).
    """
    known = denoiser.statistics
    known = None if known is None else known.given(**found.condition)
    if known is not None and known.axes is not None:
        return known
    rows = [v for v in found.condition.values() if isinstance(v, Tensor) and v.ndim]
    if any(bool((v != v[:1]).any()) for v in rows):
        return None
    samples = found.samples.double().cpu()
    if samples.ndim == 4:
        return Statistics.from_data(samples, kind="cosine")
    enough = len(samples) >= 4 * samples[0].numel()
    return Statistics.from_data(samples, kind="exact") if enough else None
