"""Worst error of adaptive solvers in units of their tolerance, and what they spend.

Over a Gaussian, a mixture and a mixture of narrow, distant modes, on VP, cosine, VE and linear
schedules: `python -m benchmarks.tolerances dormand-prince 1e-2 1e-5 1e-8`.
"""

from __future__ import annotations

import sys

import torch

import ebbflow as ef
from tests.laws.cases import SCHEDULES
from tests.laws.test_adaptive import ORACLES, end, known, rms


def main(name: str, tolerances: list[float], count: int = 128) -> None:
    for tolerance in tolerances:
        solver = ef.solvers.get(name, tolerance=tolerance, cap=200_000)
        ratios, spent = [], []
        for oracle in ORACLES:
            for schedule in SCHEDULES:
                found, exact = end(oracle, schedule, solver, count), known(oracle, schedule, count)
                error = rms(found.samples - exact) / rms(exact).clamp(min=1)
                ratios.append(error / tolerance)
                spent.append(found.evaluations.double())
        error, nfe = torch.cat(ratios), torch.cat(spent)
        print(
            f"{name} tolerance {tolerance:.0e}: worst {error.max():.2f}, median "
            f"{error.median():.3f} tolerances over {len(error)} samples; evaluations "
            f"median {nfe.median():.0f}, mean {nfe.mean():.0f}, most {nfe.max():.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], [float(tolerance) for tolerance in sys.argv[2:]])
