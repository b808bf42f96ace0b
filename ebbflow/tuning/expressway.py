"""DPM-OT: from noise to a half-denoised latent in one jump, by semi-discrete optimal transport."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import grids, noise, sampling
from ebbflow.denoiser import Denoiser
from ebbflow.schedules import Schedule
from ebbflow.solvers import Solver
from ebbflow.transport import NotConverged, SemiDiscrete, semi_discrete, standard_normal

LATENTS, REDRAWS = 3001, 3002
"""Streams of the counter of noise, apart from those of sampling (0) and training."""

ATTEMPTS = 1000
"""Draws for one sample before a threshold is called impossible."""


class Start(NamedTuple):
    """States (B, *shape) at the expressway's end, their latents' numbers, the angle between the two
    highest planes over their noise in radians, and draws that were rejected, (B,) each."""

    states: Tensor
    index: Tensor
    angle: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Expressway:
    """`x_time = T(z)`, z ~ N(0, 1): the map T of `transport` replaces the steps from 1 to `time`.

    T is solved for N(0, 1) and fed with it, the noise of `ebbflow.sample`. Its values are the n
    stored latents, each with probability 1/n: **as a law, the start is a stored latent drawn at
    random**, and a deterministic solver makes at most n different samples of them. What is new in
    a sample is what the steps below `time` add: the smaller `time`, the nearer to the data it lies.
    Use a stochastic solver, and a `time` at which the latents of different data points overlap.

    Args:
        schedule: of the denoisers that go on from here.
        time: t_M, in (0, 1), at which the latents live.
        shape: of one sample.
        transport: from N(0, 1) to the latents, flattened.
        threshold: noise over which the two highest planes meet at a larger angle, in radians, is
            drawn again: it lies near a border between latents far apart, where a continuous map
            would mix modes. The latents are then no longer equally likely.
        unconverged: accept a transport that has not converged, which otherwise raises NotConverged.

    DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport, algorithm 2.
    """

    schedule: Schedule
    time: float
    shape: tuple[int, ...]
    transport: SemiDiscrete
    threshold: float = math.inf
    unconverged: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.time < 1 or not self.schedule.sigma(self.time).item():
            raise ValueError(f"time {self.time:g} must lie in (0, 1), where there is noise")
        if math.prod(self.shape) != self.transport.targets.shape[1]:
            raise ValueError(
                f"samples of shape {self.shape} have {math.prod(self.shape)} numbers, the latents "
                f"{self.transport.targets.shape[1]}"
            )
        if not (self.transport.converged or self.unconverged):
            raise NotConverged(self.transport)

    def carry(self, x: Tensor) -> Tensor:
        """The latents of states of the prior, (B, *shape) at t = 1, without rejection."""
        z = x.flatten(1).double() / self.schedule.sigma(1.0).item()
        return self.transport(z).to(x.dtype).reshape(len(x), *self.shape)

    def start(
        self,
        count: int,
        seed: int = 0,
        first_index: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Start:
        """Row i is sample `first_index + i` of this seed, whatever the batch.

        Raises RuntimeError when a sample's noise is rejected 1,000 times.
        """
        indices = range(first_index, first_index + count)
        z = noise.normal(seed, indices, 0, self.shape, torch.float64).flatten(1)
        angle, rejected = self.transport.angles(z), torch.zeros(count, dtype=torch.int64)
        for attempt in range(1, ATTEMPTS + 1):
            bad = (angle > self.threshold).nonzero()[:, 0]
            if not len(bad):
                index = self.transport.index(z)
                states = self.transport.targets[index].to(dtype).reshape(count, *self.shape)
                return Start(states, index, angle, rejected)
            again, kind = [indices[i] for i in bad.tolist()], torch.float64
            fresh = noise.normal(seed, again, attempt, self.shape, kind, stream=REDRAWS)
            z[bad], rejected[bad] = fresh.flatten(1), attempt
            angle[bad] = self.transport.angles(z[bad])
        raise RuntimeError(
            f"threshold {self.threshold:g} rejected the noise of a sample {ATTEMPTS} times; angles "
            f"here are {angle.min():.3g} to {angle.max():.3g}: raise it"
        )

    def nodes(self, steps: int) -> grids.Times:
        """Times from `time` to 0, uniform in the angle atan(sigma/alpha)."""
        ends = torch.tensor([self.time, 0.0], dtype=torch.float64)
        high, low = torch.atan2(self.schedule.sigma(ends), self.schedule.alpha(ends)).tolist()
        share = torch.arange(1, grids.check_steps(steps), dtype=torch.float64) / steps
        inner = self.schedule.time(-2 * torch.log(torch.tan(high + (low - high) * share)))
        return (self.time, *inner.tolist(), 0.0)

    def sample(
        self,
        denoiser: Denoiser,
        count: int,
        *,
        solver: str | Solver = "ddpm",
        steps: int = 10,
        times: Sequence[float] | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch: int | None = None,
        progress: bool = False,
        **condition: Any,
    ) -> Tensor:
        """Samples (count, *shape): `start`, then `steps` steps of any solver; T costs no call.

        times: the nodes below, from `time` on, in place of `steps`. The noise of stochastic solvers
        is that of `ebbflow.sample` at this seed.
        """
        parameter = next(denoiser.parameters(), torch.zeros(()))
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        states = self.start(count, seed, first_index, dtype).states.to(parameter.device)
        nodes = self.nodes(steps) if times is None else times
        if nodes[0] != self.time:
            raise ValueError(f"times start at {nodes[0]:g}, the latents live at {self.time:g}")
        return sampling.sample(
            denoiser,
            states.shape,
            solver=solver,
            times=nodes,
            x_init=states,
            seed=seed,
            first_index=first_index,
            batch=batch,
            progress=progress,
            **condition,
        )


def expressway(
    schedule: Schedule,
    data: Tensor,
    *,
    time: float,
    copies: int = 1,
    reject: float = 0.0,
    tolerance: float = 0.1,
    seed: int = 0,
    max_samples: int | None = None,
    strict: bool = True,
    progress: bool = False,
) -> Expressway:
    """An expressway to noisy data: latents `alpha x_0 + sigma eps`, `copies` of each sample.

    Args:
        data: x_0, (N, *shape); the latents, copies x N of them, are kept in its dtype.
        time: t_M in (0, 1), at which they live.
        reject: share of the noise to draw again, that of the largest angles; in [0, 1).
        tolerance, max_samples: of `semi_discrete`.
        strict: raise NotConverged; otherwise a warning is logged, and `transport.status` says so.
    """
    if data.ndim < 2 or not data.is_floating_point() or copies < 1 or not 0 <= reject < 1:
        raise ValueError(
            f"data is {data.dtype} of {tuple(data.shape)}, copies {copies}, reject {reject}: give "
            "floats (N, *shape), at least one copy, and a share in [0, 1)"
        )
    if not 0 < time < 1:
        raise ValueError(f"time {time:g} must lie in (0, 1)")
    x0 = data.cpu().repeat_interleave(copies, 0)
    eps = noise.normal(seed, range(len(x0)), 0, x0.shape[1:], x0.dtype, stream=LATENTS)
    targets = schedule.add_noise(x0, time, eps).flatten(1)
    transport = semi_discrete(
        targets,
        standard_normal(targets.shape[1]),
        tolerance=tolerance,
        seed=seed,
        max_samples=max_samples,
        strict=strict,
        progress=progress,
    )
    threshold = math.inf
    if reject:
        z = standard_normal(targets.shape[1])(10_000, torch.Generator().manual_seed(seed))
        threshold = transport.angles(z).double().quantile(1 - reject).item()
    shape = tuple(data.shape[1:])
    return Expressway(schedule, time, shape, transport, threshold, not strict)
