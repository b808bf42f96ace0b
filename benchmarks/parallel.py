"""Rounds and evaluations of parallel-in-time sampling beside the loop.

python -m benchmarks.parallel              the two-component mixture, float64
python -m benchmarks.parallel --model      the bundled model, float32
"""

from __future__ import annotations

import argparse
import time

import torch

import ebbflow as ef


def mixture() -> ef.Denoiser:
    """Two anisotropic components in two dimensions."""
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.8]])
    covariances = torch.tensor([[[0.3, 0.2], [0.2, 0.4]], [[0.5, -0.3], [-0.3, 0.4]]])
    law = ef.oracles.GaussianMixture(means, covariances, torch.tensor([0.6, 0.4]))
    return law.denoiser(ef.schedules.VP(), statistics=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--solvers", nargs="+", default=["ddim", "dpm-solver++2m", "ddpm"])
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    denoiser = ef.load("fashion-mnist") if options.model else mixture()
    tolerance = 1e-4 if options.model else 1e-6
    if not options.model:
        torch.set_default_dtype(torch.float64)
    shape = (options.samples, *(denoiser.shape or ()))
    print(f"{'solver':20} {'method':13} window  calls rounds evaluations  error    seconds  loop")
    for steps in options.steps:
        for name in options.solvers:
            plan = ef.solvers.get(name).plan(
                denoiser.schedule, steps, statistics=denoiser.statistics
            )
            began = time.perf_counter()
            loop = ef.sample(denoiser, shape, plan=plan)
            alone = time.perf_counter() - began
            cases = [(m, w) for w in (None, 16) for m in ("jacobi", "gauss-seidel", "anderson")]
            for method, window in cases:
                began = time.perf_counter()
                found = ef.parallel(
                    denoiser, shape, plan=plan, method=method, window=window, tolerance=tolerance
                )
                seconds = time.perf_counter() - began
                error = (found.samples - loop).abs().max().item()
                print(
                    f"{name:20} {method:13} {window or 'all':>6} {plan.nfe:6} {found.rounds:6} "
                    f"{found.evaluations / options.samples:11.1f}  {error:.1e} {seconds:8.2f} "
                    f"{alone:5.2f}"
                )


if __name__ == "__main__":
    main()
