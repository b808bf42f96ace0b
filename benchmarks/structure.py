"""Stochastic and structural methods: `python -m benchmarks.structure [weak|start|mcmc|mr]`.

weak   orders of the moments (48 to 384 steps, Gaussian data) and their error at 48 steps
start  error of n calls from t = 0.95 and of n calls after the analytic Gaussian start
mcmc   weights of two modes by Denoising Langevin Gibbs, by Langevin alone, and calls a sample
mr     mean-reverting restoration: calls that a solver needs to beat 100 steps of Euler-Maruyama
"""

from __future__ import annotations

import sys

import numpy as np
import torch

import ebbflow as ef
from tests.laws import cases
from tests.laws.cases import SCHEDULES, SOLVERS, STOCHASTIC
from tests.laws.test_moments import COVARIANCE, MEAN, exact
from tests.laws.test_order import STEPS, slope


def weak() -> None:
    print(f"{'solver':<20}{'stated':>7}  " + "".join(f"{name:>16}" for name in SCHEDULES))
    for name in STOCHASTIC:
        row = ""
        for schedule, process in SCHEDULES.items():
            mean, covariance = exact(schedule, 0.05)
            errors = []
            for steps in STEPS:
                plan = cases.maker(SOLVERS[name])(process, cases.interior(steps))
                found = plan.moments(MEAN, COVARIANCE)
                parts = found.mean.numpy() - mean, found.covariance.numpy() - covariance
                errors.append(np.vstack(parts))
            row += f"{slope(errors):>8.2f} ({np.linalg.norm(errors[0]):.0e})"
        print(f"{name:<20}{SOLVERS[name].order:>7}  {row}")


def start() -> None:
    from tests.processes.test_gaussian import solve

    print("root mean square error on the mixture, dpm-solver++2m: from t = 0.95, then started at")
    ratios = (2.0, 4.0, 8.0)
    print(f"{'schedule':<10}{'calls':>6}{'plain':>10}" + "".join(f"{r:>9g}x" for r in ratios))
    for schedule, process in SCHEDULES.items():
        for calls in (5, 8, 12):
            row, plain = "", 0.0
            for ratio in ratios:
                first = process.time(-2 * np.log(ratio)).item()
                if first > 0.94:
                    row += f"{'-':>10}"
                    continue
                plain, started = solve(schedule, first, calls, "dpm-solver++2m")
                row += f"{started:>10.4f}"
            print(f"{schedule:<10}{calls:>6}{plain:>10.4f}{row}")


def mcmc() -> None:
    from tests.particles.test_denoising_mcmc import left, run

    print("share of the lighter mode (0.3) over 256 chains that all start in the other one")
    for name, emissions in {
        "Langevin, lowest level": run(levels=1),
        "Langevin-Gibbs, present level": run(),
        "Langevin-Gibbs, lowest level": run(lowest=True),
    }.items():
        level = torch.cat([e.times for e in emissions[6:]]).mean().item()
        print(f"{name:<32}{left(emissions):>7.3f}   mean time of the solve {level:.3f}")
    print("calls a sample: 10 moves and 6 steps")


def mr() -> None:
    process = ef.schedules.Betas(ef.processes.cosine_betas(100))
    # (x_0 - mean) / scale of a restoration: correlated, off-centre, with thin directions.
    mean, covariance = MEAN, torch.tensor([[0.4, 0.19], [0.19, 0.1]], dtype=torch.float64)

    def bias(name: str, steps: int) -> float:
        plan = SOLVERS[name].plan(process, times=ef.grids.uniform(process, steps))
        found = plan.moments(mean, covariance, start=(torch.zeros(2), torch.eye(2)))
        parts = found.mean - mean, (found.covariance - covariance).flatten()
        return torch.cat(parts).abs().max().item()

    target = bias("euler-maruyama", 100)
    print(f"uniform in t; error of mean and covariance, 100 steps of Euler-Maruyama: {target:.4f}")
    for name in ("ddim", "dpm-solver++2m", "dpm-solver++3m", "sde-dpm-solver++2m"):
        calls = next((n for n in range(2, 201) if bias(name, n) < target), None)
        print(f"{name:<20} calls to beat it: {calls}   at 10 calls {bias(name, 10):.4f}")


if __name__ == "__main__":
    parts = {"weak": weak, "start": start, "mcmc": mcmc, "mr": mr}
    for chosen in sys.argv[1:] or parts:
        parts[chosen]()
