"""What the benchmark reports, against closed forms and against counts made elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ebbflow import solvers
from ebbflow.benchmark import measure
from ebbflow.benchmark.measure import AUTO, PLAIN, Case, run_ours
from ebbflow.benchmark.problems import LAWS, SETTINGS, of_denoiser, oracle
from ebbflow.denoiser import Denoiser
from ebbflow.networks import MLP
from ebbflow.sampling import Result
from ebbflow.schedules import VP, Cosine
from tests.benchmark.laws import MEAN, VARIANCES, exact, gaussian


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_reference_is_the_closed_form_path(setting: str) -> None:
    case = Case(gaussian(setting), 16, seed=3)
    levels = [50.0, 1.7, 1.0, 0.3, 0.01] + ([] if math.isinf(case.top) else [case.top])
    for ratio in levels:
        found = case.reference.at(ratio) * math.hypot(1, ratio)
        torch.testing.assert_close(found, exact(case, ratio), rtol=1e-5, atol=1e-6)
    # Its own estimate of its error is honest to an order of magnitude, and below what was asked.
    true = (case.reference.end - exact(case, 0)).square().mean().sqrt().item() / case.deviation
    assert case.reference.error < 1e-5
    assert true < 10 * case.reference.error + 1e-7


def test_the_reference_refuses_levels_above_its_start() -> None:
    case = Case(gaussian("edm"), 8, seed=0)
    with pytest.raises(ValueError, match=r"sigma/alpha = 90 is above the start at 80"):
        case.reference.at(90.0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_model_answers_in_any_frame_and_counts(setting: str) -> None:
    case = Case(oracle("mixture-2d", setting), 8, seed=0)
    model = case.model()
    x = case.noise
    for t in (0.2, 0.6):
        schedule = VP()
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        expected = LAWS["mixture-2d"]().denoiser(schedule)(x, t)
        torch.testing.assert_close(model(x, alpha, sigma), expected)
        torch.testing.assert_close(model(3 * x, 3 * alpha, 3 * sigma), expected)
    assert model.calls == 4


def test_figures_of_known_errors() -> None:
    case = Case(gaussian(), 20, seed=0)
    end = case.reference.at(0.0).clone()
    # Half a deviation, in every coordinate, for one sample in ten; a hundredth for the others.
    shift = torch.full((20, 1), 0.01 * case.deviation, dtype=torch.float64)
    shift[:2] = 0.5 * case.deviation
    row = case.row("other", "m", "c", 7, 7.0, 1.0, (end + shift, 1.0, 0.0))
    unit = case.deviation
    assert row.rms == pytest.approx(unit * math.sqrt((2 * 0.25 + 18 * 1e-4) / 20))
    assert row.mean == pytest.approx(unit * (2 * 0.5 + 18 * 0.01) / 20)
    assert row.median == pytest.approx(unit * 0.01)
    assert row.p95 == pytest.approx(unit * 0.5, rel=1e-9)
    assert row.flipped == pytest.approx(0.1)
    assert (row.budget, row.evaluations, row.stops, row.samples) == (7, 7.0, 0.0, 20)
    assert row.sliced is not None
    # In another frame and at another level, the exact state has no error.
    level = case.reference.at(0.3)
    scaled = case.row(
        "other",
        "m",
        "c",
        7,
        7.0,
        1.0,
        (5 * level, 5 / math.hypot(1, 0.3), 1.5 / math.hypot(1, 0.3)),
    )
    assert scaled.rms == pytest.approx(0, abs=1e-12)


def test_ddim_has_the_error_of_its_closed_form() -> None:
    case = Case(gaussian("vp"), 16, seed=1)
    schedule = case.problem.denoiser.schedule
    times = solvers.get("ddim").plan(schedule, 10).times
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = case.noise * sigma[0]
    for k in range(10):
        gain = alpha[k] * VARIANCES / (alpha[k] ** 2 * VARIANCES + sigma[k] ** 2)
        d = MEAN + gain * (x - alpha[k] * MEAN)
        x = alpha[k + 1] * d + sigma[k + 1] / sigma[k] * (x - alpha[k] * d)
    expected = (x - exact(case, 0)).square().mean().sqrt().item()
    (row,) = run_ours(case, "ddim", (10,))
    assert row.rms == pytest.approx(expected, rel=1e-4)
    assert row.evaluations == 10


class Counting:
    """A net that counts its calls."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x, t)


@pytest.mark.parametrize("name", [*solvers.list(), AUTO, PLAIN])
def test_evaluations_are_those_that_the_model_saw(name: str) -> None:
    problem = gaussian("vp")
    net = Counting(problem.denoiser.net)
    counted = Denoiser(net, problem.denoiser.schedule, shape=(3,))
    counted.statistics = problem.denoiser.statistics
    case = Case(replace(problem, denoiser=counted), 8, seed=0)
    solver = measure.solver_called(name)
    if solver.adaptive or "jvp" in solver.needs:
        rows = run_ours(case, name, (9,))
        assert all(row.evaluations > 0 for row in rows)
        return
    for budget in (9, 12):
        net.calls = 0
        rows = run_ours(case, name, (budget,))
        assert sum(row.evaluations for row in rows) == net.calls <= budget


def test_an_adaptive_solver_is_swept_over_tolerances(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(gaussian("vp"), 8, seed=0)
    asked = []

    class Adaptive:
        adaptive, stochastic, needs = True, False, frozenset()

        def __init__(self, tolerance: float) -> None:
            self.tolerance = tolerance

    def sample(denoiser: Any, shape: Any, *, solver: Any, nfe: int | None, **rest: Any) -> Result:
        asked.append((solver.tolerance, nfe))
        end = exact(case, 0) + solver.tolerance
        # Samples differ in what they spend; the mean counts.
        each = torch.tensor([8 if i % 2 else 12 for i in range(8)]) * round(1 / solver.tolerance)
        reached = torch.zeros(8, dtype=torch.float64)
        return Result(end, int(each.max()), 1, "completed", 0.0, each, reached)

    monkeypatch.setattr(measure.solvers, "get", lambda name, tolerance=0.5: Adaptive(tolerance))
    monkeypatch.setattr(measure, "sample", sample)
    rows = run_ours(case, "adaptive", (5, 10))
    assert asked == [(tolerance, None) for tolerance in measure.TOLERANCES]
    for row, tolerance in zip(rows, measure.TOLERANCES, strict=True):
        assert (row.budget, row.evaluations) == (None, 10 * round(1 / tolerance))
        assert row.rms == pytest.approx(tolerance, rel=1e-3)


def test_stochastic_samplers_have_distances_and_no_errors() -> None:
    (row,) = run_ours(Case(gaussian("vp"), 64, seed=0), "ddpm", (20,))
    assert row.rms is row.median is row.flipped is None
    assert row.sliced is not None and row.sliced > 0


def test_a_budget_that_is_too_small_is_left_out() -> None:
    case = Case(gaussian("edm"), 8, seed=0)
    least = solvers.get("heun").plan(case.problem.denoiser.schedule, 1).nfe
    rows = run_ours(case, "heun", (least - 1, least)) if least > 1 else run_ours(case, "heun", (1,))
    assert [row.budget for row in rows] == [least]


def test_statistics_are_there_and_can_be_dropped() -> None:
    problem = oracle("mixture-64d", "edm")
    law = LAWS["mixture-64d"]()
    known = problem.denoiser.statistics
    assert known is not None
    spread = law.covariance.diagonal()  # pyright: ignore[reportAttributeAccessIssue]
    assert problem.deviation == pytest.approx(spread.mean().sqrt().item(), rel=0.03)
    bare = problem.bare()
    assert bare.denoiser.statistics is None
    x = torch.ones(2, 64, dtype=torch.float64)
    assert torch.equal(bare.denoiser(x, 0.4), problem.denoiser(x, 0.4))


def test_a_network_is_measured_in_its_own_precision() -> None:
    torch.manual_seed(0)
    net = MLP(4, width=8)
    problem = of_denoiser("net", Denoiser(net, Cosine(), "v", (4,), time="angle"))
    case = Case(problem, 8, seed=0)
    coarse, fine = run_ours(case, "dpm-solver++2m", (10, 80))
    assert coarse.rms is not None and fine.rms is not None
    assert fine.rms < 0.1 * coarse.rms + 1e-3 * case.deviation
    assert case.deviation == case.reference.deviation
    with pytest.raises(ValueError, match="model net states no shape"):
        of_denoiser("net", Denoiser(net, Cosine(), "v"))
