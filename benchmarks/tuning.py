"""Tuned plans on laws made from a seed, beside the default and DPM-Solver++ 2M at its best grid.

    python -m benchmarks.tuning                     three laws, three settings, 5 6 8 10 calls
    python -m benchmarks.tuning --seed 7 --budget 60 --evaluations 5

Errors are to converged samples of the noise that `ef.sample` draws, which tuning never sees, in
deviations of the data. The grid of 2M is chosen on the very samples that are scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

import torch
import tyro
from torch import Tensor

import ebbflow as ef
from ebbflow.benchmark.problems import SETTINGS, Law
from ebbflow.cli._shared import print_table

COUNT = 512
GRIDS: dict[str, Callable[..., tuple[float, ...]]] = {
    "log-SNR": ef.grids.log_snr,
    "angle": ef.grids.angle,
    "karras": ef.grids.karras,
    "uniform": ef.grids.uniform,
    "shifted 1.5": partial(ef.grids.shifted, shift=1.5),
    "shifted 3": partial(ef.grids.shifted, shift=3.0),
    "shifted 0.5": partial(ef.grids.shifted, shift=0.5),
}


@dataclass(frozen=True)
class Options:
    seed: int = 101
    """Of the laws."""
    evaluations: tuple[int, ...] = (5, 6, 8, 10)
    """Calls of the denoiser."""
    budget: float = 110.0
    """Seconds of tuning, the converged samples included."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Schedules."""


def laws(seed: int) -> dict[str, Law]:
    """A mixture in the plane, a mixture of smooth 8x8 fields, and an empirical law of such."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows, columns = torch.meshgrid(*[torch.arange(8.0, dtype=torch.float64)] * 2, indexing="ij")
    distance = torch.cdist(*[torch.stack([rows.flatten(), columns.flatten()], 1)] * 2)
    one = torch.eye(64, dtype=torch.float64)
    root = torch.linalg.cholesky(torch.exp(-0.5 * (distance / 2.0) ** 2) + 1e-6 * one)
    factors = 0.05 + 0.15 * torch.rand(5, 2, 1, generator=g, dtype=torch.float64)
    covariances = (normal(5, 2, 2) * factors) @ (normal(5, 2, 2) * factors).mT
    covariances = covariances @ covariances.mT + 0.002 * torch.eye(2, dtype=torch.float64)
    weights = 0.3 + torch.rand(5, generator=g, dtype=torch.float64)
    lengths = 1.5 + torch.rand(4, 1, 1, generator=g, dtype=torch.float64)
    fields = 0.06 * torch.exp(-distance / lengths) + 4e-4 * one
    smooth = (0.5 * normal(400, 64) @ root.T).reshape(400, 1, 8, 8)
    return {
        "mixture-2d": ef.oracles.GaussianMixture(0.8 * normal(5, 2), covariances, weights),
        "mixture-64d": ef.oracles.GaussianMixture(
            0.4 * normal(4, 64) @ root.T, fields, weights[:4]
        ),
        "empirical-64d": ef.oracles.Empirical(smooth, bandwidth=0.05),
    }


def errors(denoiser: ef.Denoiser, plan: ef.Plan, exact: Tensor, deviation: float) -> Tensor:
    found = ef.sample(denoiser, exact.shape, plan=plan)
    return (found - exact).flatten(1).square().mean(1).sqrt() / deviation


def run(options: Options) -> None:
    torch.set_default_dtype(torch.float64)
    rows, ratios = [], {n: ([], []) for n in options.evaluations}
    for name, law in laws(options.seed).items():
        known = ef.Statistics.from_data(law.sample(4096, seed=1))
        deviation = math.sqrt(known.covariance().diagonal().mean().item())
        for setting in options.settings:
            schedule = SETTINGS[setting]()
            denoiser = law.denoiser(schedule)
            denoiser.statistics = known
            assert denoiser.shape is not None
            exact = ef.sample(denoiser, (COUNT, *denoiser.shape), solver="unipc-b2-3", steps=512)
            for n in options.evaluations:
                began = time.perf_counter()
                tuned = ef.tune(denoiser, n, budget_seconds=options.budget)
                seconds = time.perf_counter() - began
                plans = {
                    grid: ef.solvers.get("dpm-solver++2m").plan(schedule, times=make(schedule, n))
                    for grid, make in GRIDS.items()
                }
                found = {k: errors(denoiser, p, exact, deviation) for k, p in plans.items()}
                best = min(found, key=lambda grid: found[grid].mean().item())
                auto = ef.solvers.get("auto").plan(schedule, n, statistics=known)
                three = [errors(denoiser, p, exact, deviation) for p in (tuned, auto)] + [
                    found[best]
                ]
                means = [e.mean().item() for e in three]
                ratios[n][0].append(means[0] / means[2])
                ratios[n][1].append(means[0] / means[1])
                both = [f"{e.mean():.4f} ({e.median():.4f})" for e in three]
                figures = [f"{means[0] / means[2]:.3f}", f"{means[0] / means[1]:.2f}"]
                rows.append([name, setting, n, *both, best, *figures, f"{seconds:.0f}"])
                print(*rows[-1], flush=True)
    columns = ["law", "setting", "calls", "tuned: mean (median)", "auto", "2M", "its grid"]
    print_table([*columns, "tuned/2M", "tuned/auto", "s"], rows)
    for n, (to_2m, to_auto) in ratios.items():
        print(
            f"{n} calls, mean error of the tuned plan over 2M's: geometric mean "
            f"{geometric_mean(to_2m):.3f}, worst {max(to_2m):.3f}; over the default's: "
            f"{geometric_mean(to_auto):.2f}, worst {max(to_auto):.2f}"
        )


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
