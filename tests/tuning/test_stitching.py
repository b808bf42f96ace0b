"""Stitching: a small model far from the data, a large one near them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.guidance import ClassifierFree
from ebbflow.tuning import MomentMatched, Stitched, choose_switch, flops
from tests.laws.cases import SCHEDULES, exact_statistics, oracle

LAW = oracle("mixture")
VP = SCHEDULES["VP"]
KNOWN = exact_statistics("mixture")
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pair(schedule: ef.schedules.Schedule = VP) -> tuple[ef.Denoiser, ef.Denoiser]:
    """The Gaussian of the mixture's moments, and the mixture."""
    large = LAW.denoiser(schedule)
    return MomentMatched(large, KNOWN), large


def run(model: ef.Denoiser, plan: ef.Plan, count: int = 64, seed: int = 0) -> Tensor:
    start = ef.noise.normal(seed, range(count), 0, (2,), torch.float64)
    start = start * plan.schedule.sigma(1.0)
    return ef.sample(model, (count, 2), plan=plan, x_init=start)


def error(model: ef.Denoiser, plan: ef.Plan, count: int = 64, seed: int = 0) -> float:
    """Mean distance to the large model's samples, over their deviation."""
    pure = run(pair(plan.schedule)[1], plan, count, seed)
    distance = (run(model, plan, count, seed) - pure).square().mean(1).sqrt().mean()
    return (distance / (pure - pure.mean(0)).square().mean().sqrt()).item()


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++2m", "unipc-b2-2", "heun", "edm"])
def test_the_ends_are_the_pure_models(solver: str) -> None:
    small, large = pair()
    plan = ef.solvers.get(solver).plan(VP, 8)
    assert torch.equal(run(Stitched(small, large, 1.0), plan), run(large, plan))
    assert torch.equal(run(Stitched(small, large, 0.0), plan), run(small, plan))
    half = run(Stitched(small, large, 0.5), plan)
    assert not torch.equal(half, run(large, plan))
    assert not torch.equal(half, run(small, plan))


def check_sides(make: Callable[[ef.Denoiser, ef.Denoiser, float], ef.Denoiser]) -> None:
    """Small above the switch, large at it and below, at one time and at one a sample."""
    small, large = pair()
    model = make(small, large, 0.5)
    for call in ("forward", "noise", "score", "v", "velocity"):
        answers = [getattr(d, call) for d in (model, small, large)]
        for t, expected in ((0.2, 2), (0.5, 2), (0.51, 1), (1.0, 1)):
            if t < 1 or call == "noise":
                assert torch.equal(answers[0](X, t), answers[expected](X, t))
                scalar = torch.tensor(t, dtype=torch.float64)
                torch.testing.assert_close(answers[0](X, scalar), answers[expected](X, t))
        times = torch.tensor([0.2, 0.9, 0.5, 0.51, 0.3, 0.7], dtype=torch.float64)
        rows = [answers[0](X[i : i + 1], t.item()) for i, t in enumerate(times)]
        torch.testing.assert_close(answers[0](X, times), torch.cat(rows))


def test_each_model_answers_on_its_side() -> None:
    check_sides(Stitched)


class _AtTheSwitch(Stitched):
    def cheap(self, t: float) -> bool:
        return t >= self.switch


SIDES: dict[str, Callable[[ef.Denoiser, ef.Denoiser, float], ef.Denoiser]] = {
    "the other way round": lambda small, large, switch: Stitched(large, small, switch),
    "too late": lambda small, large, switch: Stitched(small, large, switch + 0.02),
    "small at the switch": _AtTheSwitch,
    "large alone": lambda small, large, switch: large,
}


@pytest.mark.parametrize("mutant", SIDES)
def test_wrong_sides_are_seen(mutant: str) -> None:
    with pytest.raises(AssertionError):
        check_sides(SIDES[mutant])


def check_moment_matched(make: Callable[[ef.Denoiser], ef.Denoiser]) -> None:
    """It is the oracle of one Gaussian, at a time for all and one for each sample."""
    covariance = LAW.covariance[None]
    gaussian = ef.oracles.GaussianMixture(LAW.mean[None], covariance, torch.ones(1))
    times = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.02, 1.0], dtype=torch.float64)
    for schedule in SCHEDULES.values():
        exact, model = gaussian.denoiser(schedule), make(LAW.denoiser(schedule))
        torch.testing.assert_close(model(X, times), exact(X, times))
        torch.testing.assert_close(model(X, 0.3), exact(X, 0.3))
        assert model.passes(0.5) == 0


def test_the_moment_matched_model_is_the_gaussian_oracle() -> None:
    check_moment_matched(lambda like: MomentMatched(like, KNOWN))
    with pytest.raises(ValueError, match="no statistics"):
        MomentMatched(LAW.denoiser(VP))


@pytest.mark.parametrize("kind", ["exact", "low-rank", "cosine"])
def test_it_uses_every_kind_of_statistics(kind: str) -> None:
    """Against the covariance written out; and its slope in time against finite differences."""
    generator = torch.Generator().manual_seed(2)
    scales = torch.linspace(0.2, 2.0, 4, dtype=torch.float64)
    data = torch.randn(60, 1, 4, 4, generator=generator, dtype=torch.float64) * scales + 0.3
    known = ef.Statistics.from_data(data, kind=kind)
    if kind == "low-rank":
        assert known.basis is not None
        rank = (known.variance[:5], known.basis[:, :5])
        known = ef.Statistics(known.mean, *rank, residual=0.1)
    like = ef.Denoiser(lambda x, t: x, VP, statistics=known)
    model, x = MomentMatched(like), data[:3]
    times = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    covariance, mean = known.covariance(), known.mean.flatten()
    for row, t in zip(x, times, strict=True):
        alpha, sigma = VP.alpha(t), VP.sigma(t)
        total = alpha**2 * covariance + sigma**2 * torch.eye(16, dtype=torch.float64)
        away = torch.linalg.solve(total, row.flatten() - alpha * mean)
        expected = (mean + alpha * covariance @ away).reshape(1, 4, 4)
        torch.testing.assert_close(model(row[None], t)[0], expected)
    together = torch.cat([model(row[None], t) for row, t in zip(x, times, strict=True)])
    torch.testing.assert_close(model(x, times), together)
    slope = torch.func.jvp(lambda t: model(x, t), (times,), (torch.ones_like(times),))[1]
    around = (model(x, times + 1e-6) - model(x, times - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, around, rtol=1e-5, atol=1e-6)


def test_derivatives_and_vmap_pass_through() -> None:
    small, large = pair()
    model = Stitched(small, large, 0.5)
    times = torch.tensor([0.2, 0.9, 0.45, 0.55, 0.3, 0.7], dtype=torch.float64)
    for t in (times, torch.full((6,), 0.3, dtype=torch.float64)):
        slope = torch.func.jvp(lambda t: model(X, t), (t,), (torch.ones_like(t),))[1]
        around = (model(X, t + 1e-6) - model(X, t - 1e-6)) / 2e-6
        torch.testing.assert_close(slope, around, rtol=1e-5, atol=1e-6)
    mapped = torch.func.vmap(lambda x, t: model(x[None], t)[0])(X, times)
    torch.testing.assert_close(mapped, model(X, times))


def test_a_wrong_gaussian_is_seen() -> None:
    wrong = replace(KNOWN, variance=1.001 * KNOWN.variance)
    with pytest.raises(AssertionError):
        check_moment_matched(lambda like: MomentMatched(like, wrong))


def test_the_moment_matched_model_knows_the_class() -> None:
    data = LAW.sample(100)
    labels = torch.arange(100) % 2
    known = ef.Statistics.from_data(data + 5.0 * labels[:, None], labels)
    model = MomentMatched(LAW.denoiser(VP), known)
    one = MomentMatched(LAW.denoiser(VP), known.classes[1])
    label = torch.ones(6, dtype=torch.long)
    assert torch.equal(model(X, 0.5, label=label), one(X, 0.5))
    assert not torch.equal(model(X, 0.5), one(X, 0.5))


def after(plan: ef.Plan, calls: int) -> float:
    """The switch that gives the small model this many calls."""
    times = [*(stage.time for stage in plan.stages), 0.0]
    return (times[calls - 1] + times[calls]) / 2 if calls else 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_error_is_flat_at_first_and_grows_then(schedule: str) -> None:
    """A fifth of the calls costs less than 0.6% of the deviation; then the error only rises."""
    small, large = pair(SCHEDULES[schedule])
    for solver in ("ddim", "dpm-solver++2m"):
        plan = ef.solvers.get(solver).plan(SCHEDULES[schedule], 20)
        errors = [error(Stitched(small, large, after(plan, k)), plan) for k in (4, 8, 12, 16, 19)]
        assert errors[0] < 0.006
        assert errors[1] > 5 * errors[0]
        assert all(late >= early for early, late in pairwise(errors))
        assert errors[-1] > 0.2


def test_the_small_model_comes_first() -> None:
    """The same share at the other end costs more than five times as much."""
    small, large = pair(SCHEDULES["Cosine"])
    plan = ef.solvers.get("ddim").plan(SCHEDULES["Cosine"], 20)
    first = error(Stitched(small, large, after(plan, 4)), plan)
    last = error(Stitched(large, small, after(plan, 16)), plan)
    assert last > 5 * first


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", ["dpm-solver++2m", "dpm-solver++3m", "ipndm3"])
def test_keeping_the_history_at_the_switch_is_better_than_starting_anew(
    solver: str, schedule: str
) -> None:
    """Past predictions of the small model are closer to the large one's than an order is worth."""
    small, large = pair(SCHEDULES[schedule])
    maker = ef.solvers.get(solver)
    plan = maker.plan(SCHEDULES[schedule], 12)
    pure = run(large, plan)
    for k in (3, 4, 5, 6):
        model = Stitched(small, large, after(plan, k))
        first = maker.plan(SCHEDULES[schedule], times=plan.times[: k + 1])
        second = maker.plan(SCHEDULES[schedule], times=plan.times[k:])
        anew = second.run(large, run(model, first))
        kept = run(model, plan)
        assert (kept - pure).norm() < 0.95 * (anew - pure).norm()


@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.1])
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++2m"])
def test_the_chosen_switch_holds_on_fresh_noise(solver: str, tolerance: float) -> None:
    small, large = pair()
    plan = ef.solvers.get(solver).plan(VP, 20)
    choice = choose_switch(small, large, plan, tolerance, count=100, costs=(0.0, 1.0))
    assert 0 < choice.share < 1
    fresh = [error(Stitched(small, large, choice.switch), plan, 100, seed) for seed in (11, 12, 13)]
    assert max(fresh) < tolerance
    # One call more of the small model does not pass: the share is the largest.
    further = max(s.time for s in plan.stages if s.time < choice.switch) - 1e-6
    assert error(Stitched(small, large, further), plan, 100) > 0.7 * tolerance
    assert len(choice.measured) <= 7
    assert choice.cost == pytest.approx(1 - choice.share)
    assert any(share == choice.share for share, _ in choice.measured)


def test_a_choice_can_be_everything_or_nothing() -> None:
    _, large = pair()
    plan = ef.solvers.get("ddim").plan(VP, 10)
    everything = choose_switch(large, large, plan, 0.01, count=16)
    assert (everything.switch, everything.share, everything.error) == (0.0, 1.0, 0.0)
    wrong = ef.Denoiser(lambda x, t: x + 3, VP, shape=(2,))
    nothing = choose_switch(wrong, large, plan, 0.01, count=16)
    assert (nothing.switch, nothing.share, nothing.cost) == (1.0, 0.0, 1.0)


def test_another_distance_in_its_own_units() -> None:
    small, large = pair()
    plan = ef.solvers.get("ddim").plan(VP, 10)

    def of_the_means(a: Tensor, b: Tensor) -> Tensor:
        return (a.mean(0) - b.mean(0)).norm()

    choice = choose_switch(small, large, plan, 0.05, count=32, distance=of_the_means)
    stitched, pure = (
        ef.sample(Stitched(small, large, s), (32, 2), plan=plan).double()
        for s in (choice.switch, 1.0)
    )
    assert choice.error == pytest.approx(of_the_means(stitched, pure).item(), abs=1e-9)
    assert choice.standard_error == 0


def test_models_nest_and_costs_add_up() -> None:
    """Three models and two switches; guidance is each model's own, and is counted."""

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return 0.1 * label[:, None] * x

    plain = [ef.Denoiser(network, VP, shape=(2,)) for _ in range(3)]
    small, medium, large = (
        ClassifierFree(d, scale, {"label": 0}) for d, scale in zip(plain, (1, 2, 3), strict=True)
    )
    inner = Stitched(medium, large, 0.3, (4.0, 10.0))
    model = Stitched(small, inner, 0.6, (1.0, 1.0))
    label = torch.ones(6, dtype=torch.long)
    for t, used, passes, cost in (
        (0.9, small, 1, 1.0), (0.6, medium, 2, 8.0), (0.3, large, 2, 20.0)
    ):  # fmt: skip
        assert torch.equal(model(X, t, label=label), used(X, t, label=label))
        assert (model.passes(t), model.cost(t)) == (passes, cost)
    plan = ef.solvers.get("ddim").plan(VP, 10)
    result = ef.sample(model, (6, 2), plan=plan, full=True, label=label)
    first = sum(stage.time > 0.6 for stage in plan.stages)
    assert 0 < first < 10
    assert result.passes == first + 2 * (10 - first)


def test_flops_are_those_of_the_products() -> None:
    net = ef.networks.MLP(2, width=16, blocks=1)
    model = ef.Denoiser(net, VP, shape=(2,))
    products = sum(2 * m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear))
    assert flops(model, torch.zeros(5, 2)) == products
    guided = ClassifierFree(model, 2.0, {})
    assert flops(guided, torch.zeros(5, 2)) == products


def test_statistics_stay_only_where_both_describe_one_law() -> None:
    small, large = pair()
    large.statistics = KNOWN
    assert Stitched(small, large, 0.5).statistics is KNOWN
    large.statistics = exact_statistics("gaussian")
    assert Stitched(small, large, 0.5).statistics is None
    assert Stitched(small, large, 1.0).statistics is large.statistics


def test_what_does_not_fit_is_refused() -> None:
    small, large = pair()
    for switch in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            Stitched(small, large, switch)
    with pytest.raises(ValueError, match="one schedule"):
        Stitched(small, LAW.denoiser(SCHEDULES["Linear"]), 0.5)
    with pytest.raises(ValueError, match="must be one"):
        Stitched(ef.Denoiser(lambda x, t: x, VP, shape=(3,)), large, 0.5)
    with pytest.raises(ValueError, match="costs"):
        Stitched(small, large, 0.5, (1.0, float("inf")))
    plan = ef.solvers.get("ddim").plan(VP, 4)
    with pytest.raises(ValueError, match="tolerance"):
        choose_switch(small, large, plan, 0.0)
    nameless = ef.Denoiser(lambda x, t: x, VP)
    with pytest.raises(ValueError, match="shape="):
        choose_switch(nameless, nameless, plan)
