"""Ways to improve a plan for one model, in one table: searches and hand-made samplers.

    python -m benchmarks.search [--evaluations 1500] [--nfe 5 8] [--setting vp] [--seed 0]
    python -m benchmarks.search --blocks [--evaluations 600]

Every search gets the same references (256 converged samples) and the same number of evaluations;
"hand-made" is the best on those references of the solvers of the framework on five grids. Error:
the mean over 512 fresh noises of a sample's distance to its converged one, in deviations, and the
median in brackets. Searches see a plan's error on three quarters of the references and choose among
their finalists on the last one.

With --blocks: the model in the package, class by class in turn, with blocks left out, beside the
same solver with fewer calls of the whole network at the same cost.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import ebbflow as ef
from ebbflow.benchmark.problems import oracle
from ebbflow.tuning import References, references
from ebbflow.tuning.evolution import Evolution, search_times
from ebbflow.tuning.skipping import search_blocks, skippable
from ebbflow.tuning.solver_search import hand_made, search_solvers

ENDLESS = Evolution(epochs=None)


class Job(NamedTuple):
    denoiser: ef.Denoiser
    nfe: int
    known: References
    evaluations: float
    seed: int


def best_hand_made(job: Job) -> ef.Plan:
    plans = [made.plan(job.denoiser.schedule) for made in hand_made(job.denoiser, job.nfe)]
    return min(plans, key=lambda plan: job.known.errors(job.denoiser, plan).mean().item())


def default(job: Job) -> ef.Plan:
    solver = ef.solvers.get("auto")
    return solver.largest(job.denoiser.schedule, job.nfe, job.denoiser.statistics)


def s3(job: Job) -> ef.Plan:
    return search_solvers(
        job.denoiser,
        job.nfe,
        references=job.known,
        evaluations=job.evaluations,
        budget_seconds=3600.0,
        seed=job.seed,
    )


def framework(job: Job) -> ef.Plan:
    return search_solvers(
        job.denoiser,
        job.nfe,
        references=job.known,
        evaluations=job.evaluations,
        budget_seconds=3600.0,
        seed=job.seed,
        own_solvers=False,
    )


def times_of(solver: str) -> Callable[[Job], ef.Plan]:
    def found(job: Job) -> ef.Plan:
        return search_times(
            job.denoiser,
            job.nfe,
            references=job.known,
            evaluations=job.evaluations,
            budget_seconds=3600.0,
            seed=job.seed,
            solver=solver,
            evolution=ENDLESS,
        )

    return found


def bare(method: Callable[[Job], ef.Plan]) -> Callable[[Job], ef.Plan]:
    """The same for a model without statistics."""

    def found(job: Job) -> ef.Plan:
        plain = ef.Denoiser(job.denoiser.net, job.denoiser.schedule, shape=job.denoiser.shape)
        return method(job._replace(denoiser=plain))

    return found


def learned(job: Job) -> ef.Plan:
    """As many evaluations; here those of its own converged samples are among them."""
    total = job.evaluations * len(job.known) + job.known.evaluations
    return ef.tune(job.denoiser, nfe=job.nfe, seed=job.seed, budget_evaluations=total)


METHODS: dict[str, Callable[[Job], ef.Plan]] = {
    "hand-made, best of the framework": best_hand_made,
    "auto, no statistics": bare(default),
    "auto": default,
    "S3, the framework alone": framework,
    "S3": s3,
    "AutoDiffusion times of dpm-solver++2m": times_of("dpm-solver++2m"),
    "AutoDiffusion times of auto": times_of("auto"),
    "ef.tune": learned,
}


def blocks(evaluations: float, seed: int, steps: int = 6, count: int = 32) -> None:
    """DDIM's times are searched, then the blocks that each of its calls leaves out."""
    denoiser = ef.load("fashion-mnist")
    labels = {"label": torch.arange(10)}
    found = [
        references(denoiser, count=count, seed=s, condition=labels, tolerance=1e-2, most=64)
        for s in (seed, seed + 1)
    ]
    known, fresh = found
    names = skippable(denoiser, known.start[:1], label=torch.tensor([0]))
    print("| calls | share of the network | which blocks | cost | mean (median) |")
    print("| --- | --- | --- | --- | --- |")

    def row(model: ef.Denoiser, plan: ef.Plan, share: float, what: str) -> None:
        errors = fresh.errors(model, plan)
        figures = f"{errors.mean().item():.4f} ({errors.median().item():.4f})"
        cost = f"{plan.nfe * share:.2f}"
        print(f"| {plan.nfe} | {share:.3f} | {what} | {cost} | {figures} |", flush=True)

    solver = ef.solvers.get("dpm-solver++2m")
    for n in (steps - 1, steps):
        row(denoiser, solver.plan(denoiser.schedule, n), 1.0, "all")
    plan = search_times(
        denoiser,
        steps,
        references=known,
        solver=solver,
        evaluations=evaluations,
        budget_seconds=3600.0,
        seed=seed,
    )
    row(denoiser, plan, 1.0, "all, times searched")
    for share in (0.9, (steps - 1) / steps):
        skipping = search_blocks(
            denoiser,
            plan,
            names,
            references=known,
            share=share,
            evaluations=evaluations,
            budget_seconds=3600.0,
            seed=seed,
        )
        row(skipping, plan, skipping.record["share"], "times and blocks searched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=["mixture-2d", "empirical-64d"])
    parser.add_argument("--setting", default="vp")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--evaluations", type=float, default=1500.0)
    parser.add_argument("--references", type=int, default=256)
    parser.add_argument("--fresh", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", help="names in the table; all unless given")
    parser.add_argument("--blocks", action="store_true")
    options = parser.parse_args()
    if options.blocks:
        blocks(min(options.evaluations, 600.0), options.seed)
        return
    torch.set_default_dtype(torch.float64)
    print("| problem | calls | method | mean (median) | found | evaluations | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.problems:
        denoiser = oracle(name, options.setting).denoiser
        known = references(denoiser, count=options.references, seed=options.seed)
        fresh = references(denoiser, count=options.fresh, seed=options.seed + 1)
        for nfe in options.nfe:
            job = Job(denoiser, nfe, known, options.evaluations, options.seed)
            for method, make in METHODS.items():
                if options.methods and method not in options.methods:
                    continue
                began = time.perf_counter()
                plan = make(job)
                seconds = time.perf_counter() - began
                errors = fresh.errors(denoiser, plan)
                figures = f"{errors.mean().item():.4f} ({errors.median().item():.4f})"
                spent = plan.origin.get("evaluations", "")
                row = (name, nfe, method, figures, plan.origin["solver"], spent, f"{seconds:.0f}")
                print("|", " | ".join(str(cell) for cell in row), "|", flush=True)


if __name__ == "__main__":
    main()
