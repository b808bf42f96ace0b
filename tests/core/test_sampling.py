"""`sample` and `trajectory`: what they take, what they refuse, and that they are one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow import Plan
from ebbflow.schedules import Schedule
from tests.laws.cases import GAUSSIAN, SOLVERS

VP = ef.schedules.VP()
MIXTURE = ef.oracles.GaussianMixture(
    torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.5, 0.0]]), torch.tensor([0.1, 0.3]), torch.ones(2)
)


def denoiser(schedule: Schedule = VP) -> ef.Denoiser:
    return MIXTURE.denoiser(schedule)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    "negative steps": ({"steps": -3}, "at least 1, got -3"),
    "half a step": ({"steps": 2.5}, r"integer of at least 1, got 2\.5"),
    "steps True": ({"steps": True}, "got True"),
    "no budget": ({"nfe": 0}, "nfe must be an integer of at least 1, got 0"),
    "batch zero": ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
    "batch negative": ({"batch": -1}, "batch must be an integer of at least 1, got -1"),
    "batch of half": ({"batch": 1.5}, r"batch must be an integer of at least 1, got 1\.5"),
    "one node": ({"times": [1.0]}, r"times has 1 node\(s\): a step needs two"),
    "repeated node": ({"times": [1.0, 0.5, 0.5, 0.0]}, r"times\[2\] = 0\.5 after times\[1\]"),
    "turning nodes": ({"times": [1.0, 0.3, 0.6]}, r"times\[2\] = 0\.6 .* strictly decreasing"),
    "node outside": ({"times": [1.0, 0.5, -0.1]}, r"times\[2\] = -0\.1 lies outside \[0, 1\]"),
    "integer steps as times": ({"times": [999, 500, 0]}, r"times\[0\] = 999 lies outside"),
    "node NaN": ({"times": [1.0, float("nan")]}, r"times\[1\] = nan lies outside"),
    "a start within": ({"times": [0.8, 0.2]}, r"first node is 0\.8, not 1: give x_init"),
    "steps and nfe": ({"steps": 5, "nfe": 5}, r"at most one of .* got \['nfe', 'steps'\]"),
    "plan and times": (
        {"plan": ef.solvers.get("ddim").plan(VP, 2), "times": [1.0, 0.0]},
        r"got \['plan', 'times'\]",
    ),
    "unknown solver": ({"solver": "dpm-solver2m"}, "'dpm-solver2m'; nearest: dpm-solver-2m"),
    "capitals": ({"solver": "DDIM"}, "nearest: ddim"),
    "x_init of another shape": (
        {"x_init": torch.zeros(4, 2)},
        r"x_init has shape \(4, 2\), expected \(4, 3\)",
    ),
    "x_init that would broadcast": ({"x_init": torch.zeros(1, 3)}, r"shape \(1, 3\), expected"),
    "unknown gradient": ({"gradient": "sum"}, "must be None, 'direct', .* got 'sum'"),
    "negative seed": ({"seed": -1}, r"seed must be an integer in \[0, 2\^64\), got -1"),
    "seed of text": ({"seed": "a"}, "seed must be an integer"),
    "negative index": ({"first_index": -2}, "index must be an integer in .* got -2"),
}


@pytest.mark.parametrize("call", [ef.sample, lambda *a, **k: list(ef.trajectory(*a, **k))])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case: str, call: Any) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(denoiser(), (4, 3), **arguments)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (-1, 3), (4, 2), (4, 3, 1), (2.5, 3)])
def test_bad_shapes_are_refused(shape: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"shape|Size"):
        ef.sample(denoiser(), shape)


def test_trajectory_refuses_at_once() -> None:
    """Not when the first state is asked for, far from the mistake."""
    with pytest.raises(ValueError, match="at least 1"):
        ef.trajectory(denoiser(), (4, 3), steps=0)


def test_unknown_parameters_of_solvers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'ddim' has no parameter 'etta'; it has \['eta'\]"):
        ef.solvers.get("ddim", etta=0.5)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
            ef.solvers.get("ddim", eta=bad)
    for bad in ({"churn": -1.0}, {"noise_scale": -0.1}):
        with pytest.raises(ValueError, match="must be >= 0"):
            ef.solvers.get("edm", **bad)
    for bad in ({"tau": -1.0}, {"history": 4}, {"history": 0}):
        with pytest.raises(ValueError, match="history"):
            ef.solvers.get("dpm-solver++2m", **bad)


@pytest.mark.parametrize("name", SOLVERS)
def test_increasing_nodes_run_towards_noise(name: str) -> None:
    """Accepted by deterministic solvers, which then undo their own way at their order."""
    solver = ef.solvers.get(name)
    up, down = [0.1, 0.3, 0.5, 0.8], [0.8, 0.5, 0.3, 0.1]
    if solver.stochastic:
        with pytest.raises(ValueError, match=r"is stochastic: .* deterministic solver"):
            solver.plan(VP, times=up)
        return
    there, back = (
        [b + (a - b) * i / 64 for a, b in zip(nodes[1:], nodes, strict=False) for i in range(64)]
        for nodes in (up, down)
    )
    x = VP.add_noise(MIXTURE.sample(5), 0.1, torch.zeros(5, 3))
    noisy = ef.sample(informed(), (5, 3), solver=solver, times=[*there, 0.8], x_init=x)
    again = ef.sample(informed(), (5, 3), solver=solver, times=[*back, 0.1], x_init=noisy)
    assert (noisy - x).abs().max() > 0.3
    assert (again - x).abs().max() < 0.05


def test_inversion_from_data_itself_needs_a_noisy_start() -> None:
    with pytest.raises(ValueError, match="no noise at t = 0"):
        ef.solvers.get("ddim").plan(VP, times=[0.0, 0.5, 1.0])


def test_times_steps_nfe_and_plan_name_one_thing() -> None:
    solver = ef.solvers.get("heun")
    plan = solver.plan(VP, 4)
    by_steps = ef.sample(denoiser(), (4, 3), solver="heun", steps=4)
    assert torch.equal(ef.sample(denoiser(), (4, 3), plan=plan), by_steps)
    by_times = ef.sample(denoiser(), (4, 3), solver=solver, times=plan.times)
    assert torch.equal(by_times, by_steps)
    assert torch.equal(ef.sample(denoiser(), (4, 3), solver="heun", nfe=plan.nfe), by_steps)
    nodes = torch.tensor(plan.times, dtype=torch.float64)
    by_tensor = ef.sample(denoiser(), (4, 3), solver="heun", times=nodes)
    assert torch.equal(by_tensor, by_steps)
    assert torch.equal(plan.run(denoiser(), noise(4)), by_steps)


def informed() -> ef.Denoiser:
    return MIXTURE.denoiser(VP, statistics=True)


def noise(n: int, seed: int = 0) -> Tensor:
    """The prior's draw, by the contract: noise by (seed, index, 0) times sigma(1)."""
    return ef.noise.normal(seed, range(n), 0, (3,)) * VP.sigma(1.0).item()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_budget_is_spent_and_not_exceeded(name: str) -> None:
    solver = ef.solvers.get(name)
    for budget in (2, 3, 7, 12):
        known = informed().statistics
        plan = solver.largest(VP, budget, known)
        steps = len(plan.times) - 1
        assert plan.nfe <= budget < solver.plan(VP, steps + 1, statistics=known).nfe


def test_ten_steps_are_the_default() -> None:
    expected = ef.sample(denoiser(), (4, 3), solver="auto", steps=10)
    assert torch.equal(ef.sample(denoiser(), (4, 3)), expected)
    assert "auto" not in ef.solvers.list()
    assert torch.equal(ef.sample(denoiser(), (4, 3), solver="unit-residual"), expected)


def check_trajectory(**asked: Any) -> list[Any]:
    points = list(ef.trajectory(denoiser(), (5, 3), **asked))
    expected = ef.sample(denoiser(), (5, 3), **asked)
    assert torch.equal(points[-1].state, expected)
    return points


@pytest.mark.parametrize("batch", [None, 2, 8])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_trajectory_ends_at_the_sample(name: str, batch: int | None) -> None:
    plan = ef.solvers.get(name).plan(VP, 4, statistics=informed().statistics)
    points = check_trajectory(plan=plan, batch=batch, first_index=3, seed=5)
    assert tuple(point.time for point in points) == plan.times[1:]
    for point in points:
        assert point.state.shape == point.prediction.shape == (5, 3)
        assert bool(torch.isfinite(point.prediction).all())
    # At sigma = 0 the state is the last prediction, or the limit of more than one.
    if name not in GAUSSIAN:
        torch.testing.assert_close(points[-1].state, points[-1].prediction)


def test_predictions_of_a_trajectory_are_the_denoisers() -> None:
    x, t = noise(5).double(), 1.0
    for point in ef.trajectory(denoiser(), (5, 3), solver="ddim", steps=4, x_init=x):
        torch.testing.assert_close(point.prediction, denoiser()(x, t))
        x, t = point.state, point.time


def test_on_step_sees_every_node() -> None:
    seen: list[Any] = []
    samples = ef.sample(denoiser(), (5, 3), solver="edm", steps=4, on_step=seen.append)
    plan = ef.solvers.get("edm").plan(VP, 4)
    assert tuple(point.time for point in seen) == plan.times[1:]
    assert torch.equal(seen[-1].state, samples)


@pytest.mark.parametrize("name", SOLVERS)
def test_full_results_count_what_was_done(name: str) -> None:
    calls: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.5 * x

    model = ef.Denoiser(net, VP, statistics=informed().statistics)
    result = ef.sample(model, (5, 3), solver=name, steps=3, full=True)
    plan = ef.solvers.get(name).plan(VP, 3, statistics=model.statistics)
    assert result.nfe == result.passes == len(calls) == plan.nfe
    assert set(calls) == {5} and result.status == "completed"
    assert result.samples.shape == (5, 3) and 0 < result.seconds < 60


@pytest.mark.parametrize("schedule", [ef.schedules.VE(), VP, ef.schedules.Linear()])
def test_denoise_spends_a_call_only_where_noise_is_left(schedule: Schedule) -> None:
    plain = ef.sample(denoiser(schedule), (5, 3), steps=6, full=True)
    clean = ef.sample(denoiser(schedule), (5, 3), steps=6, denoise=True, full=True)
    left = schedule.sigma(0.0).item() > 0
    assert (clean.nfe, clean.passes) == (plain.nfe + left, plain.passes + left)
    if left:
        expected = denoiser(schedule)(plain.samples, 0.0)
        torch.testing.assert_close(clean.samples, expected)
        assert not torch.equal(clean.samples, plain.samples)
    else:
        assert torch.equal(clean.samples, plain.samples)
    points = list(ef.trajectory(denoiser(schedule), (5, 3), steps=6, denoise=True))
    assert torch.equal(points[-1].state, clean.samples)


def test_a_plan_saved_and_loaded_samples_the_same(tmp_path: Any) -> None:
    plan = ef.solvers.get("sde-dpm-solver++2m").plan(VP, 5)
    plan.save(tmp_path / "plan.json")
    one = ef.sample(denoiser(), (4, 3), plan=Plan.load(tmp_path / "plan.json"), seed=3)
    assert torch.equal(one, ef.sample(denoiser(), (4, 3), plan=plan, seed=3))


def test_what_is_no_batch_of_conditions_is_shared() -> None:
    """Tensors of another length, numbers and text pass through whole."""
    seen: list[Any] = []

    def net(x: Tensor, t: Tensor, label: Tensor, table: Tensor, name: str, k: float) -> Tensor:
        seen.append((label.tolist(), tuple(table.shape), name, k))
        return 0.5 * x

    label, table = torch.arange(5), torch.zeros(7, 2)
    ef.sample(
        ef.Denoiser(net, VP), (5, 3), steps=1, batch=4, label=label, table=table, name="a", k=2.0
    )
    # The last chunk is filled up with the last sample.
    assert seen == [([0, 1, 2, 3], (7, 2), "a", 2.0), ([4, 4, 4, 4], (7, 2), "a", 2.0)]


def test_the_default_knows_the_class() -> None:
    """One class for all: its statistics. Several: of each sample's class the mean alone."""
    x0 = torch.cat([MIXTURE.sample(60, seed=s) * (1 + s) for s in (1, 2)])
    statistics = ef.Statistics.from_data(x0, torch.arange(120) // 60)
    model = ef.Denoiser(lambda x, t, label: 0.5 * x, VP, statistics=statistics)
    one, mixed = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1])
    for label, known in ((one, statistics.classes[0]), (mixed, None)):
        plan = ef.solvers.get("auto").plan(VP, 5, statistics=known)
        plan = replace(plan, centred=known is None)
        drawn = ef.sample(model, (4, 3), steps=5, label=label)
        assert torch.equal(drawn, ef.sample(model, (4, 3), plan=plan, label=label))
    with pytest.raises(ValueError, match="needs the data's statistics"):
        ef.sample(model, (4, 3), solver="gaussian-residual", label=mixed)
