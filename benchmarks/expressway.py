"""DPM-OT's expressway on a ring of eight modes, and how much of its data it repeats.

    python -m benchmarks.expressway

First: the share of samples further than four deviations from every mode, against a sampler that
walks the whole way with as many calls, and against stored latents drawn by a die instead of by the
transport. Then the memorisation: the mean distance of samples to the nearest data point over that
of the law's own samples; 0 repeats the data, 1 does not. A minute or two on one core.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from ebbflow.tuning import expressway

COUNT = 4000
DEVIATION = 0.1


def between(x: Tensor, law: ef.oracles.GaussianMixture) -> float:
    near = torch.cdist(x.double(), law.means).amin(1)
    return (near > 4 * DEVIATION).double().mean().item()


def modes(schedule: Schedule, time: float) -> None:
    turns = torch.arange(8, dtype=torch.float64) * 2 * math.pi / 8
    means = 2 * torch.stack([turns.cos(), turns.sin()], 1)
    law = ef.oracles.GaussianMixture(means, torch.full((8,), DEVIATION**2), torch.ones(8))
    denoiser = law.denoiser(schedule)
    way, picky = (
        expressway(schedule, law.sample(400, seed=1), time=time, reject=r) for r in (0.0, 0.1)
    )
    die = torch.randint(400, (COUNT,), generator=torch.Generator().manual_seed(0))
    drawn = way.transport.targets[die].float()
    for solver in ("ddim", "ddpm"):
        for steps in (5, 10):
            whole = ef.sample(denoiser, (COUNT, 2), solver=solver, steps=steps, seed=3)
            ours, rejecting = (
                w.sample(denoiser, COUNT, solver=solver, steps=steps, seed=3) for w in (way, picky)
            )
            nodes = way.nodes(steps)
            random = ef.sample(
                denoiser, (COUNT, 2), solver=solver, times=nodes, x_init=drawn, seed=3
            )
            shares = (f"{between(x, law):9.2%}" for x in (whole, ours, rejecting, random))
            print(
                f"{type(schedule).__name__:8}{time:5.2f} {solver:6}{steps:3d}", *shares, flush=True
            )


def memory(time: float, copies: int) -> None:
    schedule = ef.schedules.Linear()
    law = ef.oracles.GaussianMixture(torch.zeros(1, 16), torch.ones(1), torch.ones(1))
    data = law.sample(24, seed=1)
    own = torch.cdist(law.sample(COUNT, seed=2), data).amin(1).mean()
    way = expressway(schedule, data, time=time, copies=copies, tolerance=0.2)
    ratios = []
    for solver in ("ddim", "ddpm"):
        x = way.sample(law.denoiser(schedule), COUNT, solver=solver, steps=12, seed=3)
        near = torch.cdist(x.double(), data).amin(1).mean() / own
        ratios.append(
            f"{solver} {near.item():.2f}, {len((x * 1e4).round().unique(dim=0))} different"
        )
    print(f"t = {time:g}, {copies} latents a point: ", "; ".join(ratios), flush=True)


def main() -> None:
    print("schedule time solver calls  whole way expressway rejecting a tenth  a die")
    for schedule, times in ((ef.schedules.Linear(), (0.3, 0.5)), (ef.schedules.VP(), (0.2, 0.35))):
        for time in times:
            modes(schedule, time)
    for time in (0.1, 0.4, 0.7, 0.9):
        for copies in (1, 4):
            memory(time, copies)


if __name__ == "__main__":
    main()
