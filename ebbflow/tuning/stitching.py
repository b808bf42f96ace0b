"""Stitching: a cheap model far from the data, the good one near them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ebbflow.bases import cosines
from ebbflow.denoiser import Denoiser, Frozen, Wrapper
from ebbflow.finite import readable
from ebbflow.plan import Plan
from ebbflow.sampling import sample
from ebbflow.schedules import Schedule, TimeLike, along, as_time
from ebbflow.solvers.stepping import Walk
from ebbflow.statistics import Statistics
from ebbflow.tuning.cost import operations

Distance = Callable[[Tensor, Tensor], Tensor]
"""`distance(stitched, pure) -> (B,)`, or () for a figure of all samples together."""


class Stitched(Wrapper):
    """The small model at times above the switch, the large one from the switch on.

    `D(x, t) = D_small(x, t) if t > switch else D_large(x, t)`. Far from the data the two nearly
    agree, whatever their size. Each brings its own guidance and prediction; they share the data
    and the schedule. More models nest: `Stitched(small, Stitched(medium, large, 0.3), 0.6)`.
    T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching.

    Args:
        small, large: denoisers of the same schedule and shape.
        switch: a time in [0, 1]; 1 is the large model alone, 0 the small one alone.
        costs: of one network pass of each, in one unit, such as `flops` or seconds; a stitched
            part counts its own costs, times this.

    A multistep solver keeps its history across the switch: measured on mixtures, the small model's
    last predictions serve better than a fresh start at order one. With a time for each sample on
    both sides of the switch, both models see all samples.
    """

    def __init__(
        self,
        small: Denoiser,
        large: Denoiser,
        switch: float,
        costs: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(large)
        if small.schedule != large.schedule:
            raise ValueError(
                f"the small model lives on {small.schedule!r}, the large one on "
                f"{large.schedule!r}: stitching needs one schedule"
            )
        if small.shape is not None and large.shape is not None and small.shape != large.shape:
            raise ValueError(f"samples of shape {small.shape} and {large.shape}: they must be one")
        if not 0 <= switch <= 1:
            raise ValueError(f"switch must be a time in [0, 1], got {switch}")
        if len(costs) != 2 or not all(0 <= cost < float("inf") for cost in costs):
            raise ValueError(f"costs must be two finite numbers of at least 0, got {costs}")
        self.small = small
        self.switch = float(switch)
        self.costs = (float(costs[0]), float(costs[1]))
        self.shape = large.shape or small.shape
        # The law is a third one, unless both describe the same.
        same = small.statistics is large.statistics
        self.statistics = large.statistics if same or self.switch == 1 else None

    def cheap(self, t: float) -> bool:
        """Whether the small model answers at time t."""
        return t > self.switch or self.switch == 0

    def passes(self, t: float) -> int:
        return self._used(t).passes(t)

    def cost(self, t: float) -> float:
        """Cost of one call at time t, for one sample, in the unit of `costs`."""
        used, unit = self._used(t), self.costs[0 if self.cheap(t) else 1]
        return unit * (used.cost(t) if isinstance(used, Stitched) else used.passes(t))

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        if not isinstance(t, Tensor):
            return self._used(float(t)).at(t, x, target)
        times = as_time(t)
        cheap = (times > self.switch) | (self.switch == 0)
        if readable(cheap) and bool((cheap == cheap.flatten()[0]).all()):
            return self._used(float(times.flatten()[0])).at(t, x, target)
        small, large = self.small.at(t, x, target), self.net.at(t, x, target)  # pyright: ignore
        where = along(cheap, x).to(x.device)
        return lambda x, **condition: torch.where(
            where, small(x, **condition), large(x, **condition)
        )

    def _used(self, t: float) -> Denoiser:
        return self.small if self.cheap(t) else self.net  # pyright: ignore


class MomentMatched(Denoiser):
    """The denoiser of the Gaussian with given moments: the smallest of all models, without a pass.

    `D(x, t) = m + alpha C (alpha² C + sigma²)⁻¹ (x - alpha m)`, which the denoiser of any law with
    these moments tends to far from the data. Conditions are ignored, but for the one class of all
    samples where the statistics know it.

    Args:
        like: whose schedule and statistics are used.
        statistics: other ones, needed where the denoiser carries none.
    """

    def __init__(self, like: Denoiser, statistics: Statistics | None = None) -> None:
        known = like.statistics if statistics is None else statistics
        if known is None:
            raise ValueError(
                "the denoiser carries no statistics: give Statistics.from_data(samples), or "
                "Statistics.from_model(denoiser)"
            )
        schedule = like.schedule
        super().__init__(_Gaussian(schedule, known), schedule, "x0", tuple(known.mean.shape), known)

    def passes(self, t: float) -> int:
        return 0


@dataclass(frozen=True)
class _Gaussian:
    schedule: Schedule
    statistics: Statistics

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        known = self.statistics.given(**condition) or self.statistics
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)

        def gain(variance: Tensor | float) -> Tensor:
            shape = (-1, *(1,) * variance.ndim) if isinstance(variance, Tensor) else (-1, 1)
            a, s = alpha.reshape(shape), sigma.reshape(shape)
            return (a * variance / (a**2 * variance + s**2)).to(x.device, x.dtype)

        mean = known.mean.to(x.device, x.dtype)
        away = x - along(alpha, x).to(x.device, x.dtype) * mean
        if known.basis is None:
            return mean + cosines(gain(known.variance) * cosines(away), inverse=True)
        basis, flat = known.basis.to(x.device, x.dtype), away.flatten(1)
        inside = flat @ basis
        out = (gain(known.variance) * inside) @ basis.T
        if basis.shape[0] > basis.shape[1]:
            out = out + gain(known.residual) * (flat - inside @ basis.T)
        return mean + out.reshape(x.shape)


def flops(denoiser: Denoiser, x: Tensor, t: float = 0.5, **condition: Any) -> float:
    """`operations` of one network pass a sample. x: (B, *shape), of any values."""
    counted = operations(lambda: denoiser(x, t, **condition))
    return counted / len(x) / max(denoiser.passes(t), 1)


@dataclass(frozen=True)
class Choice:
    """What `choose_switch` found.

    switch: the time; share: of the plan's calls that the small model takes; error and
    standard_error: measured there; measured: (share, error) of every trial, by share;
    cost: of the stitched run over that of the large model alone, by the `costs` given.
    """

    switch: float
    share: float
    error: float
    standard_error: float
    measured: tuple[tuple[float, float], ...]
    cost: float


def choose_switch(
    small: Denoiser,
    large: Denoiser,
    plan: Plan | Walk,
    tolerance: float = 0.05,
    *,
    shape: tuple[int, ...] | None = None,
    count: int = 64,
    seed: int = 0,
    batch: int | None = None,
    distance: Distance | None = None,
    confidence: float = 2.0,
    costs: tuple[float, float] = (1.0, 1.0),
    **condition: Any,
) -> Choice:
    """The largest share of a plan's first calls that the small model may take.

    Stitched and pure samples start from the same noise. The error of a sample is the root mean
    square of their difference over the deviation of the pure samples, and a switch passes when
    `mean + confidence * standard error <= tolerance`, so that it also holds on fresh noise. Found
    by bisection over the plan's times, which takes the error to grow with the share; the choice
    itself is always one that was measured to pass, or the large model alone.

    Args:
        plan: how the samples will be drawn.
        shape: of one sample, unless the denoisers state it.
        count, seed, batch: of the samples; see `sample`.
        distance: another error, by sample or of all together; then its own units count.
        costs: of one pass of each network, for the `cost` reported.
        condition: tensors whose first axis is `count` are cut by sample.
    Costs about log2(steps) + 2 runs. Raises ValueError for a tolerance that is not positive.
    """
    if not tolerance > 0 or not confidence >= 0 or count < 2:
        raise ValueError(
            f"tolerance {tolerance} must be positive, confidence {confidence} at least 0 and "
            f"count {count} at least 2"
        )
    shape = shape or large.shape or small.shape
    if shape is None:
        raise ValueError("neither denoiser states a shape: give shape=")
    calls = [stage.time for stage in plan.stages] if isinstance(plan, Plan) else [*plan.times[:-1]]
    times = sorted(set(calls))
    switches = [0.0, *((low + high) / 2 for low, high in pairwise(times)), 1.0]

    def run(switch: float) -> Tensor:
        model = Stitched(small, large, switch)
        return sample(
            model, (count, *shape), plan=plan, seed=seed, batch=batch, **condition
        ).double()

    pure = run(1.0)
    measure = distance or _relative
    found: dict[float, tuple[float, float]] = {1.0: (0.0, 0.0)}

    def passes(switch: float) -> bool:
        if switch not in found:
            errors = measure(run(switch), pure).double()
            spread = errors.std() / len(errors) ** 0.5 if errors.ndim else torch.zeros(())
            found[switch] = errors.mean().item(), spread.item()
        error, spread = found[switch]
        return error + confidence * spread <= tolerance

    first = bisect_right(switches, False, hi=len(switches) - 1, key=passes)
    chosen = switches[first]

    def share(switch: float) -> float:
        cheap = Stitched(small, large, switch).cheap
        return sum(cheap(t) for t in calls) / len(calls)

    stitched, alone = (Stitched(small, large, s, costs) for s in (chosen, 1.0))
    whole = sum(alone.cost(t) for t in calls)
    return Choice(
        chosen,
        share(chosen),
        *found[chosen],
        tuple(sorted((share(switch), error) for switch, (error, _) in found.items())),
        sum(stitched.cost(t) for t in calls) / whole if whole else 1.0,
    )


def _relative(stitched: Tensor, pure: Tensor) -> Tensor:
    """Root mean square difference of each sample over the deviation of the pure samples."""
    deviation = (pure - pure.mean(0)).square().mean().sqrt()
    return (stitched - pure).flatten(1).square().mean(1).sqrt() / deviation
