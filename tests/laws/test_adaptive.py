"""Solvers that choose their steps keep their word: the tolerance on every sample, the cost of each
sample its own, a cap instead of a hang. Every adaptive solver is enrolled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from ebbflow.solvers import adaptive, dormand_prince, exponential_pair
from ebbflow.solvers.brownian import BrownianPath
from ebbflow.solvers.stepping import Model
from tests.laws import cases
from tests.laws.cases import ADAPTIVE, SCHEDULES

PAIRS = tuple(name for name, solver in ADAPTIVE.items() if not solver.stochastic)
PATHS = tuple(name for name, solver in ADAPTIVE.items() if solver.stochastic)
VP = SCHEDULES["VP"]
CLOSE = ef.oracles.GaussianMixture(  # far narrower than their distance: errors grow in between
    torch.tensor([[2.0, -1.0], [-1.5, 1.0], [0.2, 2.0]]), torch.full((3,), 0.01), torch.ones(3)
)
ORACLES = {"gaussian": cases.oracle("gaussian"), "mixture": cases.oracle("mixture"), "close": CLOSE}


def rms(x: Tensor) -> Tensor:
    return x.double().flatten(1).square().mean(1).sqrt()


def begin(schedule: Schedule, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return ef.noise.normal(5, range(count), 0, (2,), dtype) * schedule.sigma(1.0).item()


def end(oracle: str, schedule: str, solver: Any, count: int) -> ef.sampling.Result:
    process = SCHEDULES[schedule]
    denoiser = ORACLES[oracle].denoiser(process)
    x = begin(process, count)
    return ef.sample(denoiser, (count, 2), solver=solver, x_init=x, full=True)


@functools.cache
def known(oracle: str, schedule: str, count: int) -> Tensor:
    """Where the flow ends: in closed form for the Gaussian, else at a far smaller tolerance, by a
    solver that `test_the_references_agree` checks against scipy's."""
    process = SCHEDULES[schedule]
    if oracle == "gaussian":
        law = cases.LAWS["gaussian"]
        variance, basis = torch.linalg.eigh(torch.tensor(law.covariance))
        mean = torch.tensor(law.mean)
        start, stop = ((process.alpha(t), process.sigma(t)) for t in (1.0, 0.0))
        spread = [(a**2 * variance + s**2).sqrt() for a, s in (start, stop)]
        still = (begin(process, count) - start[0] * mean) @ basis / spread[0]
        return stop[0] * mean + (still * spread[1]) @ basis.T
    solver = ef.solvers.get("dormand-prince", tolerance=1e-12, confirm=False, cap=10**6)
    return end(oracle, schedule, solver, count).samples


def check_tolerance(solver: Any, oracle: str, schedule: str, count: int) -> float:
    """The worst error in units of the tolerance; at most 3 on every sample."""
    found = end(oracle, schedule, solver, count)
    exact = known(oracle, schedule, count)
    error = rms(found.samples - exact) / rms(exact).clamp(min=1) / solver.tolerance
    assert found.status == "completed"
    assert error.max() <= 3, f"{error.max():.2f} tolerances"
    return error.max().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", PAIRS)
def test_every_sample_meets_its_tolerance(name: str, oracle: str, schedule: str) -> None:
    for tolerance in (1e-2, 1e-4, 1e-7)[: 3 if name == "dormand-prince" else 2]:
        solver = ef.solvers.get(name, tolerance=tolerance, cap=100_000)
        check_tolerance(solver, oracle, schedule, 32)


def test_without_confirmation_errors_grow_between_modes() -> None:
    """Why a second run: steps that each keep the tolerance do not keep it at the end."""
    with pytest.raises(AssertionError, match="tolerances"):
        solver = ef.solvers.get("dormand-prince", tolerance=1e-4, confirm=False)
        check_tolerance(solver, "close", "VP", 200)


def test_the_references_agree() -> None:
    from tests.laws import reference

    law = cases.LAWS["mixture"]
    x = cases.tensor(cases.start("mixture", "VP"))
    solver = ef.solvers.get("dormand-prince", tolerance=1e-12, confirm=False, cap=10**6)
    found = solver.plan(VP, times=[0.95, 0.05]).run(ORACLES["mixture"].denoiser(VP), x)
    exact = reference.flow(law, "VP", x.numpy(), 0.95, 0.05)
    assert rms(found - torch.tensor(exact)).max() < 1e-10


@functools.cache
def carried(t: float) -> Tensor:
    """Where scipy's method carries the mixture's states from time 0.5."""
    from tests.laws import reference

    x = cases.start("mixture", "VP")
    return torch.tensor(reference.flow(cases.LAWS["mixture"], "VP", x, 0.5, t))


@pytest.mark.parametrize("name", PAIRS)
def test_the_estimate_has_its_order(name: str) -> None:
    """One step of half the length: what it errs is less by 2^(order + 1), its estimate by
    2^order."""
    solver: Any = ADAPTIVE[name]
    denoiser = ORACLES["mixture"].denoiser(VP)
    x = cases.tensor(cases.start("mixture", "VP"))
    rows = torch.arange(len(x))
    errors, estimates = [], []
    longest = 0.1 if solver.order == 5 else 0.04
    for h in (longest, longest / 2, longest / 4):
        here = adaptive.Place.of_time(VP, torch.full((len(x),), 0.5, dtype=torch.float64))
        there = adaptive.Place.of_angle(VP, here.angle - h)
        model = Model(denoiser, {}, 0, range(len(x)))
        tried = solver.attempt(model, rows, x, model(x, here.time), here, there)
        errors.append(rms(tried.state - carried(there.time[0].item())).max().item())
        estimates.append(rms(tried.error).max().item())
    for values, order in ((errors, solver.order + 1), (estimates, solver.weaker + 1)):
        slopes = [math.log2(a / b) for a, b in pairwise(values)]
        assert min(slopes) > order - 0.4, (values, order)
    assert estimates[-1] > errors[-1]


def _weights(index: int) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(patch: pytest.MonkeyPatch) -> None:
        rows = [list(row) for row in dormand_prince.WEIGHTS]
        rows[index][0] += 1e-2 if index == 0 else 1e-3
        patch.setattr(dormand_prince, "WEIGHTS", tuple(map(tuple, rows)))

    return spoil


def _nodes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dormand_prince, "NODES", (1 / 5, 3 / 10, 4 / 5, 8 / 9 + 1e-3, 1.0, 1.0))


def _error(patch: pytest.MonkeyPatch) -> None:
    wrong = (dormand_prince.ERROR[0] + 1e-3, *dormand_prince.ERROR[1:])
    patch.setattr(dormand_prince, "ERROR", wrong)


@pytest.mark.parametrize("spoil", [*map(_weights, range(6)), _nodes, _error])
def test_a_wrong_tableau_is_seen(
    spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    test_the_estimate_has_its_order("dormand-prince")
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_estimate_has_its_order("dormand-prince")


@pytest.mark.parametrize(
    ("what", "index", "wrong"),
    [
        *(("NODES", 0, 0.35), ("NODES", 1, 0.65), ("WEIGHTS", 0, 1.9), ("WEIGHTS", 1, 1.45)),
        *(("WEIGHTS", 2, 1.45), ("WEIGHTS", 0, -2.0), ("WEIGHTS", 1, -1.5)),
    ],
)
def test_wrong_exponential_weights_are_seen(
    what: str, index: int, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = list(getattr(exponential_pair, what))
    right[index] = wrong
    monkeypatch.setattr(exponential_pair, what, tuple(right))
    with pytest.raises(AssertionError):
        test_the_estimate_has_its_order("dpm-solver-23")


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_stiff_neighbour_changes_nothing(name: str) -> None:
    """Sample by sample: evaluations and results, in a batch and alone; half of the batch sees a law
    a hundred times as narrow."""
    width = torch.tensor([0.5, 0.5, 0.002, 0.002], dtype=torch.float64)

    def posterior_mean(x: Tensor, t: Tensor, width: Tensor) -> Tensor:
        alpha, sigma, v = VP.alpha(t), VP.sigma(t), width**2
        means = torch.tensor([[1.0, -1.0], [-1.0, 0.5], [0.3, 1.0]], dtype=torch.float64)
        total = (alpha**2 * v + sigma**2)[:, None]
        away = x[:, None].double() - alpha[:, None, None] * means
        share = torch.softmax(-0.5 * (away**2).sum(2) / total, 1)
        each = means + (alpha * v)[:, None, None] / total[..., None] * away
        return (share[..., None] * each).sum(1).to(x.dtype)

    denoiser = ef.Denoiser(posterior_mean, VP)
    together = ef.sample(denoiser, (4, 2), solver=name, seed=3, width=width, full=True)
    for i in range(4):
        alone = ef.sample(
            denoiser, (1, 2), solver=name, seed=3, first_index=i, width=width[i : i + 1], full=True
        )
        assert alone.evaluations.item() == together.evaluations[i].item()
        assert torch.equal(alone.samples[0], together.samples[i])
    if name in PAIRS:
        assert together.evaluations[2:].min() > 1.2 * together.evaluations[:2].max()
    assert together.status == "completed"


@pytest.mark.parametrize("name", ADAPTIVE)
def test_only_samples_on_their_way_are_evaluated(name: str) -> None:
    rows = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return CLOSE.denoiser(VP)(x, t)

    found = ef.sample(ef.Denoiser(counted, VP), (16, 2), solver=name, full=True)
    assert sum(rows) == int(found.evaluations.sum()) < 16 * found.nfe
    assert found.evaluations.shape == (16,) and found.nfe == found.evaluations.max()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_cap_stops_and_says_so(name: str) -> None:
    denoiser = CLOSE.denoiser(VP)
    full = ef.sample(denoiser, (16, 2), solver=name, full=True)
    for nfe in (1, 5, 20, int(full.evaluations.min())):
        found = ef.sample(denoiser, (16, 2), solver=name, nfe=nfe, full=True)
        short = found.times != 0
        assert found.nfe <= nfe and bool(torch.isfinite(found.samples).all())
        assert bool(short.any()) == (found.status != "completed")
        assert torch.equal(found.samples[~short], full.samples[~short])
        if nfe <= 5:
            assert bool(short.all()) and found.status == "16 of 16 samples reached their cap"


@pytest.mark.parametrize("name", PAIRS)
def test_an_end_that_is_not_confirmed_is_told(name: str) -> None:
    """The first run's end is worth more than the second's middle; its time is NaN."""
    denoiser = ORACLES["mixture"].denoiser(VP)
    once = ef.sample(
        denoiser, (8, 2), solver=ef.solvers.get(name, tolerance=3e-5, confirm=False), full=True
    )
    solver = ef.solvers.get(name, tolerance=3e-5, cap=int(once.evaluations.max()) + 8)
    found = ef.sample(denoiser, (8, 2), solver=solver, full=True)
    assert bool(found.times.isnan().all()) and "8 of 8" in found.status
    assert torch.equal(found.samples, once.samples)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_adaptive_solvers_are_asked(name: str) -> None:
    solver, denoiser = ADAPTIVE[name], CLOSE.denoiser(VP)
    assert solver.plan(VP).nfe is None
    with pytest.raises(ValueError, match=r"got steps=7: say how accurate, .*tolerance="):
        ef.sample(denoiser, (2, 2), solver=name, steps=7)
    with pytest.raises(ValueError, match="got 3 times: give start and end"):
        solver.plan(VP, times=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"no noise at t = 0|is stochastic"):
        solver.plan(VP, times=[0.0, 1.0])
    for bad in ({"tolerance": 0.0}, {"tolerance": math.nan}, {"cap": 0}, {"cap": 2.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ef.solvers.get(name, **bad)
    with pytest.raises(ef.NonFinite, match="the prediction at t = 1"):
        ef.sample(ef.Denoiser(lambda x, t: x / 0, VP), (2, 2), solver=name)
    if name in PAIRS:
        with pytest.raises(ValueError, match="float64, or a larger tolerance"):
            ef.sample(denoiser, (2, 2), solver=ef.solvers.get(name, tolerance=1e-9))


@pytest.mark.parametrize("schedule", ["VP", "Cosine"])
@pytest.mark.parametrize("name", PAIRS)
def test_they_run_towards_noise_and_back(name: str, schedule: str) -> None:
    process = SCHEDULES[schedule]
    solver = ef.solvers.get(name, tolerance=1e-6)
    x = process.add_noise(ORACLES["mixture"].sample(8), 0.02, torch.ones(8, 2).double())
    up, down = (solver.plan(process, times=t) for t in ([0.02, 1.0], [1.0, 0.02]))
    denoiser = ORACLES["mixture"].denoiser(process)
    assert rms(down.run(denoiser, up.run(denoiser, x)) - x).max() < 1e-4


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_point_mass_costs_nothing_and_is_hit(name: str, schedule: str) -> None:
    process, point = SCHEDULES[schedule], torch.tensor([0.8, -0.3], dtype=torch.float64)
    denoiser = ef.Denoiser(lambda x, t: point.expand_as(x), process)
    x = begin(process, 5)
    eps = (x - process.alpha(1.0) * point) / process.sigma(1.0)
    solver = ef.solvers.get(name, tolerance=1e-8)
    found = ef.sample(denoiser, (5, 2), solver=solver, x_init=x, full=True)
    exact = point + process.sigma(0.0) * eps
    assert rms(found.samples - exact).max() < 3e-8
    if name == "dpm-solver-23":  # exact for a constant prediction: nothing to refuse
        assert rms(found.samples - exact).max() < 1e-12 and found.nfe < 80


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_pass_through_the_steps(name: str) -> None:
    """The derivative of the end in the start, against a difference; steps are held fixed."""
    denoiser, x = ORACLES["gaussian"].denoiser(VP), begin(VP, 3)
    plan = ef.solvers.get(name, tolerance=1e-6).plan(VP, times=[1.0, 0.1])
    direction = torch.ones_like(x)
    slope = torch.autograd.functional.vjp(lambda x: plan.run(denoiser, x), x, direction)[1]
    ends = [plan.run(denoiser, x + e * direction) for e in (1e-3, -1e-3)]
    change = ((ends[0] - ends[1]) / 2e-3).sum(1)
    torch.testing.assert_close(slope.sum(1), change, rtol=1e-4, atol=1e-4)  # pyright: ignore


# The stochastic one.

T1 = ef.oracles.GaussianMixture(
    torch.tensor([[-1.5], [1.0]]), torch.full((2,), 0.1), torch.tensor([0.3, 0.7])
)


def variance_scores(tolerance: float, count: int = 3000) -> tuple[float, float, float]:
    """z-scores of mean, variance, and share of the lower mode of samples in one dimension, where
    the error of a step depends most on its noise."""
    solver = ef.solvers.get("gotta-go-fast", tolerance=tolerance, absolute=0.002)
    x = ef.sample(T1.denoiser(VP), (count, 1), solver=solver, seed=4).double()[:, 0]
    square, share = (x - T1.mean) ** 2, (x < -0.25).double()
    lower = 0.3 * torch.special.ndtr(torch.tensor(1.25 / 0.1**0.5)) + 0.7 * torch.special.ndtr(
        torch.tensor(-1.25 / 0.1**0.5)
    )
    exact = (T1.mean.item(), T1.covariance.item(), lower.item())
    return tuple(  # pyright: ignore
        ((v.mean() - e) / (v.std() / count**0.5)).item()
        for v, e in zip((x, square, share), exact, strict=True)
    )


def test_kept_noise_leaves_the_law_alone() -> None:
    mean, variance, share = variance_scores(0.004)
    assert max(map(abs, (mean, variance, share))) < 4


def test_noise_drawn_anew_bends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's rule: what was refused is forgotten."""
    monkeypatch.setattr(BrownianPath, "keep", lambda self, rows, span, increment: None)
    assert abs(variance_scores(0.004)[1]) > 5


def _fresh_parts(self: BrownianPath, rows: Tensor, span: Tensor, normal: Tensor) -> Any:
    return span, 1.05 * span.sqrt()[:, None].to(normal) * normal


def test_a_wrong_rate_of_noise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrownianPath, "next", _fresh_parts)
    assert max(map(abs, variance_scores(0.004))) > 4


def test_a_path_is_brownian_however_it_is_cut() -> None:
    """Increments over [0, 1] after refusals: variance their length, no correlation, and pieces add
    up to what was drawn at first."""
    count = 4000
    x, rows = torch.zeros(count, 1, dtype=torch.float64), torch.arange(count)
    path, draw = BrownianPath.like(x), iter(range(1, 99))

    def take(span: float) -> tuple[Tensor, Tensor]:
        z = ef.noise.normal(1, range(count), next(draw), (1,), torch.float64)
        return path.next(rows, torch.full((count,), span, dtype=torch.float64), z)

    length, whole = take(1.0)
    path.keep(rows, length, whole)
    length, half = take(0.6)
    path.keep(rows, length, half)  # refused again: two pieces are kept
    pieces = [take(0.25), take(0.5), take(0.4), take(0.3)]
    lengths = torch.stack([piece[0] for piece in pieces])
    torch.testing.assert_close(
        lengths[:, 0], torch.tensor([0.25, 0.35, 0.4, 0.3], dtype=torch.float64)
    )
    torch.testing.assert_close(sum(p[1] for p in pieces[:3]), whole)
    values = torch.cat([piece[1] for piece in pieces], 1)
    covariance = torch.cov(values.T) / torch.outer(lengths[:, 0], lengths[:, 0]).sqrt()
    assert (covariance - torch.eye(4)).abs().max() < 4 * (2 / count) ** 0.5


def test_finer_tolerances_follow_one_law_and_cost_more() -> None:
    denoiser = T1.denoiser(VP)
    spent = [
        ef.sample(
            denoiser, (64, 1), solver=ef.solvers.get("gotta-go-fast", tolerance=tol), full=True
        ).evaluations.double()
        for tol in (0.5, 0.1, 0.02)
    ]
    assert spent[0].mean() < spent[1].mean() / 1.5 < spent[2].mean() / 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_law_of_a_gaussian_in_many_dimensions(schedule: str) -> None:
    process, spread = SCHEDULES[schedule], torch.linspace(0.3, 1.5, 256, dtype=torch.float64)

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return (0.5 + gain * (x.double() - alpha * 0.5)).to(x.dtype)

    solver = ef.solvers.get("gotta-go-fast", tolerance=0.02)
    x = ef.sample(ef.Denoiser(posterior_mean, process), (200, 256), solver=solver).double()
    z = (x - 0.5) / spread
    assert abs(z.mean().item()) < 0.03
    assert abs(z.var().item() - 1) < 0.03, z.var()
