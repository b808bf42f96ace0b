"""S³: never worse than its seeds, within its budget, guided by a predictor that ranks."""

from __future__ import annotations

import math
import random

import pytest
import torch

import ebbflow as ef
from ebbflow.benchmark.problems import oracle
from ebbflow.tuning import References, references
from ebbflow.tuning.candidates import Candidate, Space, propose
from ebbflow.tuning.evaluation import energy, frechet, mean_error
from ebbflow.tuning.predictor import Predictor, kendall
from ebbflow.tuning.solver_search import hand_made, search_solvers
from ebbflow.tuning.unified import Choice

NFE = 5


class Counted(ef.Denoiser):
    """Counts the states that it denoises."""

    states = 0

    def __init__(self, inner: ef.Denoiser) -> None:
        def net(x, t):
            self.states += len(x)
            return inner(x, t[0].item())

        super().__init__(net, inner.schedule, shape=inner.shape, statistics=inner.statistics)


@pytest.fixture(scope="module")
def problem() -> tuple[Counted, References]:
    denoiser = oracle("mixture-2d", "vp").bare().denoiser  # hand-made solvers know no statistics
    torch.set_default_dtype(torch.float64)
    found = references(denoiser, count=96)
    torch.set_default_dtype(torch.float32)
    return Counted(denoiser), found


@pytest.fixture(scope="module")
def found(problem) -> tuple[ef.Plan, float]:
    """A search, and the evaluations a sample that it made."""
    denoiser, noise = problem
    before = denoiser.states
    plan = search_solvers(
        denoiser, NFE, references=noise, evaluations=700, budget_seconds=600, seed=3
    )
    return plan, (denoiser.states - before) / len(noise)


def test_the_budget_is_kept_and_counted(found) -> None:
    plan, evaluations = found
    assert plan.nfe <= NFE
    assert 500 < evaluations <= 700
    assert plan.origin["evaluations"] == pytest.approx(evaluations, abs=0.01)


def test_it_is_never_worse_than_any_hand_made_solver(problem, found) -> None:
    denoiser, noise = problem
    plan, _ = found
    fit, held_out = noise.split(72)
    seeds = [made.plan(denoiser.schedule) for made in hand_made(denoiser, NFE)]
    seeds.append(ef.solvers.get("auto").largest(denoiser.schedule, NFE))
    known = ef.Statistics.from_data(noise.samples, kind="exact")  # the model has none
    seeds.append(ef.solvers.get("auto").largest(denoiser.schedule, NFE, known))
    best = min(seeds, key=lambda seed: fit.errors(denoiser, seed).mean().item())
    after = held_out.errors(denoiser, plan).mean().item()
    assert after <= held_out.errors(denoiser, best).mean().item() + 1e-12
    assert plan.origin["error_after"] == pytest.approx(after, rel=1e-9)
    assert after < 0.9 * min(fit.errors(denoiser, seed).mean().item() for seed in seeds)


def test_the_best_never_rises(found) -> None:
    history = found[0].origin["history"]
    assert len(history) > 2
    assert history == sorted(history, reverse=True)
    assert history[-1] < 0.95 * history[0]


def test_the_same_seed_finds_the_same_plan(problem) -> None:
    denoiser, noise = problem

    def search(seed: int) -> ef.Plan:
        return search_solvers(
            denoiser, 3, references=noise.rows(slice(32)), seed=seed, evaluations=200
        )

    first, again, other = search(0), search(0), search(1)
    assert first.stages == again.stages
    assert first.origin["history"] == again.origin["history"] != other.origin["history"]


def test_little_time_still_gives_a_plan_and_too_few_evaluations_an_error(problem) -> None:
    denoiser, noise = problem
    plan = search_solvers(denoiser, NFE, references=noise, budget_seconds=1e-3)
    assert plan.nfe <= NFE
    with pytest.raises(ValueError, match=r"6 evaluations does not suffice for 2 plan\(s\) of 5"):
        search_solvers(denoiser, NFE, references=noise, evaluations=6)


def sampled(denoiser: ef.Denoiser, noise: References, count: int) -> dict[Candidate, float]:
    """Choices and their errors."""
    space, chance = Space(denoiser.schedule, NFE), random.Random(0)
    first = [space.candidate(made) for made in hand_made(denoiser, NFE)]
    chosen = propose(first, space, chance, count=count)
    return {c: noise.errors(denoiser, space.plan(c)).mean().item() for c in chosen}


def test_the_predictor_ranks_choices_that_it_has_not_seen(problem) -> None:
    denoiser, noise = problem
    errors = sampled(denoiser, noise.rows(slice(32)), 160)
    known, unseen = list(errors)[:110], list(errors)[110:]
    truth = [errors[c] for c in unseen]
    predictor = Predictor(NFE, seed=0)
    predictor.fit({c: errors[c] for c in known}, steps=300)
    assert kendall(predictor(unseen).tolist(), truth) > 0.5
    # Fitted to errors that belong to other choices it ranks nothing.
    shuffled = random.Random(0).sample([errors[c] for c in known], len(known))
    blind = Predictor(NFE, seed=0)
    blind.fit(dict(zip(known, shuffled, strict=True)), steps=300)
    assert abs(kendall(blind(unseen).tolist(), truth)) < 0.35


def test_kendall_is_scipy_s() -> None:
    from scipy.stats import kendalltau

    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (40,), generator=g).double()
    b = a + torch.randint(0, 6, (40,), generator=g)
    assert kendall(a.tolist(), b.tolist()) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)
    assert math.isnan(kendall([1.0, 1.0], [1.0, 2.0]))


@pytest.mark.parametrize("schedule", [ef.schedules.VP(), ef.schedules.Linear(), ef.schedules.VE()])
def test_the_canonical_form_is_the_same_sampler_and_mutants_are_allowed(schedule) -> None:
    law = ef.oracles.GaussianMixture(torch.eye(2) - 0.5, torch.full((2,), 0.04), torch.ones(2))
    denoiser = law.denoiser(schedule)
    space, chance = Space(schedule, 6), random.Random(2)
    wild = [
        Choice("noise", 3, "linear", True, 2),
        Choice("x0", 3, "difference", True),
        Choice("x0", 2, "exponential", True, 2),
    ]
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * schedule.sigma(1.0)
    first = space.candidate(hand_made(denoiser, 6)[0])
    for child in propose([first], space, chance, count=40):
        steps = tuple(chance.choice(wild) for _ in child.choices)
        free = child._replace(choices=steps)
        ends = [space.plan(c).run(denoiser, x) for c in (free, space.canonical(free))]
        assert torch.allclose(*ends, rtol=0, atol=1e-13)
        assert space.plan(child).nfe == space.cost(child) <= 6


def test_other_objectives_are_searched(problem) -> None:
    denoiser, noise = problem
    plan = search_solvers(
        denoiser, 3, references=noise, evaluations=200, objective=energy, own_solvers=False
    )
    assert plan.origin["solver"] == "unified"
    assert plan.origin["objective"] == "energy"
    worst = ef.solvers.get("ddim").plan(denoiser.schedule, 3)
    found, coarse = (energy(noise.run(denoiser, p), noise) for p in (plan, worst))
    assert found < 0.5 * coarse


def test_objectives_vanish_on_the_references_and_see_their_features(problem) -> None:
    _, noise = problem
    ends = noise.end
    assert mean_error(ends, noise) == 0
    assert abs(frechet(ends, noise)) < 1e-9
    turned = ends.flip(0)  # the same set, every sample another
    assert mean_error(turned, noise) > 0.5
    assert abs(frechet(turned, noise)) < 1e-9
    assert abs(energy(turned, noise) - energy(ends, noise)) < 1e-9
    assert frechet(ends + 1.0, noise) == pytest.approx(2.0, rel=1e-6)
