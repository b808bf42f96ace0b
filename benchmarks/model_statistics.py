"""DPM-Solver-v3 beside DPM-Solver++(2M): root mean square error to a fine solution.

python -m benchmarks.model_statistics             the laws' mixture, four schedules, float64
python -m benchmarks.model_statistics --model     the bundled model, its own samples as data
"""

from __future__ import annotations

import argparse
import time

import torch

import ebbflow as ef


def table(
    denoiser: ef.Denoiser, known: ef.ModelStatistics, x: torch.Tensor, fine: int, name: str
) -> None:
    solvers = {"dpm-solver++2m": ef.solvers.get("dpm-solver++2m")}
    for history, corrector in ((2, False), (2, True), (3, True)):
        label = f"v3, history {history}{', corrected' if corrector else ''}"
        solvers[label] = ef.solvers.DPMSolverV3.of(known, history, corrector)
    reference = ef.solvers.get("dpm-solver++3m").plan(denoiser.schedule, fine)
    with torch.no_grad():
        exact = reference.run(denoiser, x)
        for label, solver in solvers.items():
            errors = []
            for steps in (5, 8, 10, 15):
                end = solver.plan(denoiser.schedule, steps).run(denoiser, x)
                errors.append((end - exact).square().mean().sqrt().item())
            print(f"{name:8} {label:24}", *(f"{error:.4f}" for error in errors), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--points", type=int, default=60)
    options = parser.parse_args()
    print(f"{'':8} {'steps':24}", *(f"{steps:6}" for steps in (5, 8, 10, 15)))
    began = time.perf_counter()
    if options.model:
        denoiser = ef.load("fashion-mnist")
        assert denoiser.shape is not None
        data = ef.sample(denoiser, (options.samples, *denoiser.shape), steps=10, seed=1)
        known = ef.ModelStatistics.from_model(denoiser, data, options.points, batch=32)
        print(f"statistics of {options.samples} samples: {time.perf_counter() - began:.0f} s")
        schedule = denoiser.schedule
        x = ef.noise.normal(0, range(4), 0, denoiser.shape) * schedule.sigma(1.0).item()
        table(denoiser, known, x, 60, type(schedule).__name__)
        return
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.8]])
    covariances = torch.tensor([[[0.3, 0.2], [0.2, 0.4]], [[0.5, -0.3], [-0.3, 0.4]]])
    law = ef.oracles.GaussianMixture(means, covariances, torch.tensor([0.6, 0.4]))
    data, cosine = law.sample(options.samples), law.denoiser(ef.schedules.Cosine())
    known = ef.ModelStatistics.from_model(cosine, data, options.points, batch=options.samples)
    print(f"statistics of {options.samples} samples: {time.perf_counter() - began:.0f} s")
    for schedule in (ef.schedules.VP(), cosine.schedule, ef.schedules.VE(), ef.schedules.Linear()):
        x = ef.noise.normal(0, range(256), 0, (2,), torch.float64) * schedule.sigma(1.0)
        table(law.denoiser(schedule), known, x, 400, type(schedule).__name__)


if __name__ == "__main__":
    main()
