"""S³: a search for the choices of every step, guided by a predictor that learns to rank them."""

from __future__ import annotations

import random

from ebbflow import grids, solvers
from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.schedules import Schedule
from ebbflow.tuning.candidates import Candidate, Space, propose
from ebbflow.tuning.evaluation import Objective, Trial, mean_error
from ebbflow.tuning.predictor import Predictor, held_out_correlation
from ebbflow.tuning.references import References, statistics_of
from ebbflow.tuning.unified import Choices, choices

SEEDS = (
    "dpm-solver++2m",
    "unipc-b2-2",
    "dpm-solver++3m",
    "unipc-b2-3",
    "deis-logrhoab1",
    "dpm-solver-2m",
    "ddim",
    "dpm-solver++2s",
    "dpm-solver++3s",
    "dpm-solver-2",
    "dpm-solver-3",
)
"""The hand-made samplers that a search starts from, each on every grid."""

PARENTS, EVALUATED, SURPRISES = 16, 20, 4
FINALISTS = 8


def search_solvers(
    denoiser: Denoiser,
    nfe: int = 8,
    *,
    references: References,
    seed: int = 0,
    evaluations: float | None = None,
    budget_seconds: float = 60.0,
    progress: bool = False,
    objective: Objective = mean_error,
    own_solvers: bool = True,
) -> Plan:
    """The best sampler of at most `nfe` calls whose every step is chosen by itself.

    Stage 0 measures hand-made samplers; then, in turn, a predictor is fitted to rank what has been
    measured, the best are mutated, and those of the children that it ranks best are measured. What
    is returned is the best on a quarter of the references that the search does not see, where it
    is never worse than the best hand-made sampler.

    Args:
        references: of this denoiser, by `ebbflow.tuning.references`; where it has no statistics,
            they come from these.
        evaluations: denoiser calls a sample, at most; budget_seconds: of wall time. The same seed
            and number of evaluations give the same plan, as long as the time suffices.
        objective: of samples and references; the mean distance unless given.
        own_solvers: whether the library's own solvers, whose parameters and nodes are searched too,
            are candidates beside those of the framework.

    The plan's origin has the search, its seed, what was spent, the errors of the best hand-made
    sampler and of this one (held out), "history", the least error after each stage, and "kendall",
    the rank correlation of the predictor on measured choices that it was not fitted to.
    Raises ValueError for a budget that does not suffice for the default and one more.
    A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models, section 4.
    """
    trial = Trial(denoiser, references, objective, evaluations, budget_seconds)
    trial.require(nfe, 2)
    space = Space(denoiser.schedule, nfe, statistics_of(denoiser, references))
    chance = random.Random(seed)
    # The finalists take a few evaluations at the end.
    reserve = FINALISTS if trial.evaluations > 8 * FINALISTS * nfe else 2

    def measure(candidate: Candidate) -> bool:
        """False when the budget is spent."""
        if trial.errors and not trial.left(nfe, reserve):
            return False
        trial.error(candidate, space.plan(candidate))
        return True

    history: list[float] = []
    with trial.progress("searching solvers", progress):
        seeds = [space.candidate(made) for made in hand_made(denoiser, nfe)]
        for candidate in [*(space.defaults if own_solvers else ()), *seeds]:
            if not measure(candidate):
                break
        before = trial.best(1)[0]
        predictor = Predictor(nfe, seed)
        going = True
        while going:
            history.append(trial.errors[trial.best(1)[0]])
            predictor.fit(trial.errors)
            children = propose(trial.best(PARENTS), space, chance, trial.errors)
            predicted = predictor(children).tolist()
            ranked = [children[i] for i in sorted(range(len(children)), key=predicted.__getitem__)]
            surprises = chance.sample(ranked, min(SURPRISES, len(ranked)))
            chosen = dict.fromkeys([*ranked[:EVALUATED], *surprises])
            going = bool(chosen) and all(map(measure, chosen))
        finalists = dict.fromkeys([before, *trial.best(reserve - 1)])
        checked = {c: trial.check(space.plan(c)) for c in finalists}
    best = min(checked, key=checked.__getitem__)
    record = trial.record("S^3", seed, checked[before], checked[best])
    tau = held_out_correlation(trial.errors, nfe, seed)
    return space.plan(best, {**record, "history": history, "kendall": tau})


def hand_made(denoiser: Denoiser, nfe: int) -> list[Choices]:
    """The library's samplers that are points of the framework, on every grid, within `nfe`."""
    schedule, known = denoiser.schedule, denoiser.statistics
    automatic = solvers.get("auto")
    space = Space(schedule, nfe)

    def own(schedule: Schedule, steps: int) -> grids.Times:
        return automatic.nodes(schedule, steps, known)

    found: dict[Candidate, Choices] = {}
    for grid in (grids.log_snr, own, grids.angle, grids.karras, grids.uniform):
        for name in SEEDS:
            for steps in range(nfe, 0, -1):
                made = choices(name, schedule, grid(schedule, steps))
                candidate = space.candidate(made)
                if space.cost(candidate) <= nfe:
                    found.setdefault(candidate, made)
                    break
    return list(found.values())
