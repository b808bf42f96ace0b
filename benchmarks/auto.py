"""How far "auto" is from the best of the library's other solvers, each at its best grid.

    python -m benchmarks.auto [--samples 512] [--steps 5 8 10 20]

Ten problems with fixed seeds (mixtures in 2, 5 and 256 dimensions, smooth fields, a ring, a
checkerboard, two scales), three schedules. Error: root mean square over samples and coordinates
to a converged solution from the same noise; beside it the median sample and the share of samples
that end more than a fifth of the data's deviation away. Statistics come from 1,000 samples.
Ratios are geometric means over the problems.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule

RIVALS = ("ddim", "heun", "dpm-solver++2m", "dpm-solver++3m")
GRIDS = {
    "log-SNR": ef.grids.log_snr,
    "Karras": ef.grids.karras,
    "angle": ef.grids.angle,
    "uniform": ef.grids.uniform,
}
SCHEDULES: dict[str, Schedule] = {
    "EDM": ef.schedules.VE(),
    "VP": ef.schedules.Betas(np.linspace(1e-4, 0.02, 1000).tolist()),
    "rectified flow": ef.schedules.Linear(),
}


class Error(NamedTuple):
    rms: float
    median: float
    flips: float


def mixture(seed: int, d: int, k: int, scale: float = 1.0) -> ef.oracles.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(k, d, generator=g, dtype=torch.float64) * 0.55 * scale
    factors = torch.randn(k, d, d, generator=g, dtype=torch.float64) * 0.12 * scale
    covariances = factors @ factors.mT / d + 1e-4 * scale**2 * torch.eye(d, dtype=torch.float64)
    return ef.oracles.GaussianMixture(means, covariances, torch.rand(k, generator=g) + 0.3)


def fields(seed: int, n: int, side: int, power: float) -> Tensor:
    """(n, 1, side, side), smooth and of deviation 0.5."""
    g = torch.Generator().manual_seed(seed)
    i = torch.arange(side, dtype=torch.float64)
    cosines = torch.cos(math.pi * (i[:, None] + 0.5) * i / side)
    scale = (1 + (i[:, None] ** 2 + i**2).sqrt()) ** -power
    x = torch.randn(n, side, side, generator=g, dtype=torch.float64) * scale
    x = cosines @ x @ cosines.T
    return (x / x.std() * 0.5)[:, None]


def points(rows: list[tuple[float, float]], bandwidth: float) -> ef.oracles.Empirical:
    return ef.oracles.Empirical(torch.tensor(rows, dtype=torch.float64), bandwidth)


def problems() -> dict[str, ef.oracles.GaussianMixture | ef.oracles.Empirical]:
    turns = [2 * math.pi * k / 8 for k in range(8)]
    ring = [(0.8 * math.cos(a), 0.8 * math.sin(a)) for a in turns]
    board = [(0.45 * i - 0.68, 0.45 * j - 0.68) for i in range(4) for j in range(4) if (i + j) % 2]
    return {
        "mixture 2": mixture(20, 2, 6),
        "mixture 2, twice as wide": mixture(21, 2, 4, 2.0),
        "mixture 5": mixture(22, 5, 8),
        "mixture 256": ef.oracles.Empirical(fields(23, 10, 16, 1.8), 0.12),
        "mixture 256, half as wide": ef.oracles.Empirical(fields(24, 18, 16, 1.6) / 2, 0.05),
        "fields 16": ef.oracles.Empirical(fields(25, 250, 16, 2.5), 0.1),
        "fields 8": ef.oracles.Empirical(fields(26, 300, 8, 2.2), 0.08),
        "fields 8, twice as wide": ef.oracles.Empirical(2 * fields(27, 200, 8, 2.8), 0.2),
        "ring": points(ring, 0.06),
        "checkerboard": points(board, 0.12),
    }


def score(end: Tensor, exact: Tensor, deviation: float) -> Error:
    each = (end - exact).flatten(1).square().mean(1).sqrt()
    flips = (each > 0.2 * deviation).double().mean()
    return Error(each.square().mean().sqrt().item(), each.median().item(), flips.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 20])
    options = parser.parse_args()
    table: dict[tuple[str, int, str], list[tuple[Error, Error]]] = {}
    for name, oracle in problems().items():
        data = oracle.sample(1000, seed=1)
        known = ef.Statistics.from_data(data)
        deviation = data.std().item()
        for setting, schedule in SCHEDULES.items():
            denoiser = oracle.denoiser(schedule)
            noise = ef.noise.normal(0, range(options.samples), 0, data.shape[1:], torch.float64)
            x = noise * schedule.sigma(1.0)
            fine = ef.grids.log_snr(schedule, 400, 1e-4, 1e4)
            exact = ef.solvers.get("dpm-solver++3m").plan(schedule, times=fine).run(denoiser, x)
            for n in options.steps:
                rivals = []
                for rival in RIVALS:
                    solver = ef.solvers.get(rival)
                    for grid in GRIDS.values():
                        steps = n // 2 + 1 if rival == "heun" else n
                        plan = solver.plan(schedule, times=grid(schedule, steps))
                        if plan.nfe <= n + 1:
                            rivals.append(score(plan.run(denoiser, x), exact, deviation))
                best = min(rivals)
                for kind, statistics in (("statistics", known), ("nothing", None)):
                    plan = ef.solvers.get("auto").plan(schedule, n, statistics=statistics)
                    found = score(plan.run(denoiser, x), exact, deviation)
                    table.setdefault((setting, n, kind), []).append((found, best))
        print(f"{name} done", flush=True)
    print(
        f"{'setting':16}{'calls':>6} {'knows':12}{'RMS ratio':>10}{'median ratio':>14}{'flips':>16}"
    )
    for (setting, n, kind), pairs in table.items():
        rms, median = (
            math.exp(sum(math.log((a[i] + 1e-9) / (b[i] + 1e-9)) for a, b in pairs) / len(pairs))
            for i in (0, 1)
        )
        ours, theirs = (sum(pair[i].flips for pair in pairs) / len(pairs) for i in (0, 1))
        flips = f"{ours:.1%} / {theirs:.1%}"
        print(f"{setting:16}{n:6d} {kind:12}{rms:10.3f}{median:14.3f}{flips:>16}")


if __name__ == "__main__":
    main()
