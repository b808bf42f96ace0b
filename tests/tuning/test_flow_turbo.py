"""FlowTurbo's refiner: with the exact difference it is Heun, untrained it keeps the velocity, and
trained it is worth more than the steps it costs."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebbflow as ef
from ebbflow.schedules import Schedule, along
from ebbflow.tuning import FlowTurbo, Refiner, cost_share, train_refiner
from ebbflow.tuning.refiner import _Draws, small_network, velocity
from tests.laws import cases
from tests.laws.cases import SCHEDULES

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
LINEAR = SCHEDULES["Linear"]


class Exact(nn.Module):
    """r that knows the model: `v(y, tau) - v`, wrong by a factor."""

    def __init__(self, denoiser: ef.Denoiser, factor: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.factor = denoiser, factor

    def forward(self, y: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        return self.factor * velocity(self.denoiser, y, tau) - v


class Keep(nn.Module):
    """r = 0: the velocity stays what it was."""

    def forward(self, y: Tensor, v: Tensor, tau: Tensor, **condition: Any) -> Tensor:
        return torch.zeros_like(y)


def check_exact(schedule: Schedule, factor: float = 1.0) -> None:
    denoiser = cases.oracle("mixture").denoiser(schedule)
    refiner = Refiner(Exact(denoiser, factor))
    x = torch.randn(5, 2, dtype=torch.float64) * schedule.sigma(1.0)
    for nodes in ([1.0, 0.7, 0.5, 0.2, 0.0], cases.uneven(5)):
        steps = len(nodes) - 1
        for heun in (1, 2):
            ours = FlowTurbo(refiner, heun, 0, steps - heun).plan(schedule, times=nodes)
            all_heun = ef.solvers.get("flow-turbo", heun=steps).plan(schedule, times=nodes)
            torch.testing.assert_close(ours.run(denoiser, x), all_heun.run(denoiser, x), **TIGHT)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_difference_is_heun(schedule: str) -> None:
    check_exact(SCHEDULES[schedule])


def test_a_difference_off_by_a_thousandth_is_not() -> None:
    with pytest.raises(AssertionError):
        check_exact(LINEAR, 1 + 1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_refined_steps_it_is_the_solver_of_the_list(schedule: str) -> None:
    process = SCHEDULES[schedule]
    denoiser, x = cases.oracle("mixture").denoiser(process), torch.randn(5, 2, dtype=torch.float64)
    for heun in (1, 3):
        ours = FlowTurbo(Refiner(Keep()), heun, None, 0).plan(process, 6)
        plan = ef.solvers.get("flow-turbo", heun=heun).plan(process, 6)
        assert ours.times == plan.times and ours.nfe == plan.nfe
        points = ef.trajectory(denoiser, x.shape, plan=ours, x_init=x)
        others = ef.trajectory(denoiser, x.shape, plan=plan, x_init=x)
        for one, other in zip(points, others, strict=True):
            torch.testing.assert_close(one.state, other.state, **TIGHT)
            torch.testing.assert_close(one.prediction, other.prediction, **TIGHT)


class Narrow(Keep):
    """One number a sample, where as many are due as y has."""

    def forward(self, y: Tensor, v: Tensor, tau: Tensor, **condition: Any) -> Tensor:
        return y[:, :1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_keeping_the_velocity_of_a_straight_flow_is_exact(schedule: str) -> None:
    """x_0 = A eps along straight lines: velocities do not change, so nothing is left to refine."""
    process = SCHEDULES[schedule]
    a = torch.tensor([0.3, 2.0, -0.1], dtype=torch.float64)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return a * x / (along(process.sigma(t), x) + along(process.alpha(t), x) * a)

    eps = torch.randn(4, 3, dtype=torch.float64)
    t, s = 0.9, 0.3
    x, exact = ((process.sigma(u) + process.alpha(u) * a) * eps for u in (t, s))
    walk = FlowTurbo(Refiner(Keep()), 1, 1, 2).plan(process, times=[t, 0.75, 0.6, 0.5, s])
    found = walk.run(ef.Denoiser(predict, process), x)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)
    assert walk.nfe == 3


def test_calls_are_as_stated() -> None:
    calls, refined = [], []

    class Counted(Keep):
        def forward(self, y: Tensor, v: Tensor, tau: Tensor, **condition: Any) -> Tensor:
            refined.append(tau[0].item())
            return torch.zeros_like(y)

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return 0.5 * x

    denoiser = ef.Denoiser(net, LINEAR)
    for heun, pseudo, steps in ((1, 0, 3), (1, 2, 2), (2, 1, 0), (1, 0, 0)):
        for times in (None, [0.9 - 0.1 * k for k in range(heun + pseudo + steps + 1)]):
            solver = FlowTurbo(Refiner(Counted()), heun, pseudo, steps)
            walk = solver.plan(LINEAR, times=times)
            calls.clear()
            refined.clear()
            found = ef.sample(denoiser, (2, 3), plan=walk, full=True, x_init=torch.randn(2, 3))
            assert len(calls) == walk.nfe == found.nfe
            assert len(refined) == solver.refiner_calls(LINEAR, walk.times)
            whole = walk.times[-1] == 0
            assert walk.nfe == 2 * heun + pseudo - (whole and steps == 0 and pseudo == 0)
            assert len(refined) == 2 * steps - (whole and steps > 0)
            assert all(0 < tau <= 1 for tau in refined)
    budget = FlowTurbo(Refiner(Keep()), 1, None, 2).largest(LINEAR, 6)
    assert budget.nfe == 6 and len(budget.times) == 1 + 1 + 4 + 2
    assert FlowTurbo(Refiner(Keep()), 1, None, 0).largest(LINEAR, 2).nfe == 1
    with pytest.raises(ValueError, match="needs 2 calls, the budget is 1"):
        FlowTurbo(Refiner(Keep()), 1, None, 2).largest(LINEAR, 1)


def test_words_that_do_not_fit_are_refused() -> None:
    refiner = Refiner(Keep())
    assert FlowTurbo(refiner, 1, None, 2).word(6) == "HPPPRR"
    for solver, steps in ((FlowTurbo(refiner, 1, 2, 2), 6), (FlowTurbo(refiner, 2, None, 2), 3)):
        with pytest.raises(ValueError, match="steps do not hold"):
            solver.plan(LINEAR, steps)
    with pytest.raises(ValueError, match="heun 0 must be at least 1"):
        FlowTurbo(refiner, 0)
    with pytest.raises(ValueError, match="towards data only"):
        FlowTurbo(refiner, 1, 0, 1).plan(LINEAR, times=[0.2, 0.5, 0.9])
    with pytest.raises(ValueError, match="returned shape"):
        Refiner(Narrow())(torch.zeros(2, 3), torch.zeros(2, 3), 0.5)


# Training.

TURNS = torch.arange(6) * (2 * math.pi / 6)
RING = ef.oracles.GaussianMixture(
    2 * torch.stack([TURNS.cos(), TURNS.sin()], 1), torch.full((6,), 0.09), torch.ones(6)
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_pairs_are_on_the_flow(schedule: str) -> None:
    """y' lies on the ray of the velocity before, by a step in tau that is uniform; and the state
    before has the moments of `(1 - tau) x_0 + tau eps`, whatever the schedule."""
    process, width, count = SCHEDULES[schedule], 0.12, 4000
    data = torch.full((5, 2), 3.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    point = ef.Denoiser(lambda x, t: torch.full_like(x, 3.0), process)
    draws = _Draws(point, data, width, {}, generator, 0, 5)
    y, before, tau, after, _ = draws.batch(count)
    # For a point mass v = eps - x_0 is constant along a ray, and y' = (1 - tau') x_0 + tau' eps.
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)
    eps = before + 3
    torch.testing.assert_close(y, (1 - tau[:, None]) * 3 + tau[:, None] * eps)
    assert abs(eps.mean()) < 4 / (2 * count) ** 0.5
    assert abs(eps.square().mean() - 1) < 4 * (2 / (2 * count)) ** 0.5
    # Uniform over the schedule's own range, less half a step.
    low, high = process.sigma(torch.tensor([0.0, 1.0])) / (
        process.sigma(torch.tensor([0.0, 1.0])) + process.alpha(torch.tensor([0.0, 1.0]))
    )
    assert tau.min() >= low and tau.max() <= high
    assert abs(tau.mean() - ((low + high) / 2 - width / 2)) < 0.02


@functools.cache
def trained(steps: int = 400, seed: int = 0) -> Refiner:
    data = RING.sample(2048, seed=1).float()
    return train_refiner(RING.denoiser(LINEAR), data, steps=steps, seed=seed)


def test_training_leaves_little_of_the_change() -> None:
    few, many = trained(20), trained()
    assert many.remaining < 0.25 < few.remaining <= 1.2
    assert not any(m.training for m in many.modules())


def errors(walk: Any, denoiser: ef.Denoiser, x: Tensor, exact: Tensor) -> float:
    return (walk.run(denoiser, x) - exact).square().mean().sqrt().item()


def test_refined_steps_beat_euler_and_heun_at_equal_cost() -> None:
    """Costs in passes of a network of 6 blocks of 256 features, of which the refiner has 1.5 %. The
    velocities are exact, so that errors are those of sampling and of the refiner."""
    denoiser, refiner = RING.denoiser(LINEAR), trained()
    big = ef.Denoiser(ef.networks.MLP(2, 256, 6), LINEAR, "velocity")
    share = cost_share(refiner, big, (1, 2))
    assert 0.01 < share < 0.02
    x = torch.randn(400, 2)
    exact = ef.solvers.get("flow-turbo", heun=10**6).plan(LINEAR, 200).run(denoiser, x)
    for pseudo, refined in ((0, 3), (1, 3), (2, 2)):
        walk = FlowTurbo(refiner, 1, pseudo, refined).plan(LINEAR)
        cost = (walk.nfe or 0) + share * walk.solver.refiner_calls(LINEAR, walk.times)
        assert cost < 2 + pseudo + 0.1
        ours = errors(walk, denoiser, x, exact)
        # Rivals get up to one pass more.
        for name in ("euler", "heun", "flow-turbo"):
            rival = ef.solvers.get(name).largest(LINEAR, math.ceil(cost))
            assert ours < errors(rival, denoiser, x, exact), (name, rival.nfe, cost)
        # And keeping the velocity, in place of refining it, is worse.
        kept = FlowTurbo(Refiner(Keep()), 1, pseudo, refined).plan(LINEAR)
        assert ours < 0.7 * errors(kept, denoiser, x, exact)


def test_a_refiner_knows_no_schedule() -> None:
    """The same model on another schedule has the same velocities on the straight path."""
    refiner, x = trained(), torch.randn(50, 2)
    nodes = torch.tensor([0.98, 0.8, 0.5, 0.3], dtype=torch.float64)
    ends = []
    for process in (LINEAR, SCHEDULES["VP"], SCHEDULES["VE"]):
        times = process.time(2 * torch.log((1 - nodes) / nodes))
        size = process.alpha(times) + process.sigma(times)
        walk = FlowTurbo(refiner, 1, 0, 2).plan(process, times=times)
        end = walk.run(RING.denoiser(process), x.double() * size[0])
        ends.append(end / size[-1])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-6, atol=1e-6)


def test_the_seed_makes_the_refiner() -> None:
    data, denoiser = RING.sample(64, seed=1).float(), RING.denoiser(LINEAR)
    state = torch.random.get_rng_state()
    first, again, other = (
        train_refiner(denoiser, data, steps=3, batch=8, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two, three = (list(r.parameters()) for r in (first, again, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_its_weights_and_scale_are_saved_together() -> None:
    fresh = Refiner(small_network((2,)))
    fresh.load_state_dict(trained().state_dict())
    y, v = torch.randn(2, 5, 2)
    assert torch.equal(fresh(y, v, 0.3), trained()(y, v, 0.3)) and fresh.scale > 1


def test_a_budget_of_seconds_ends_it() -> None:
    data, denoiser = RING.sample(64, seed=1).float(), RING.denoiser(LINEAR)
    began = time.monotonic()
    found = train_refiner(denoiser, data, steps=10**7, batch=8, budget_seconds=0.5)
    assert time.monotonic() - began < 10 and math.isfinite(found.remaining)


def test_a_sample_is_itself_in_any_batch() -> None:
    walk, denoiser = FlowTurbo(trained(), 1, 1, 2).plan(LINEAR), RING.denoiser(LINEAR)
    every = ef.sample(denoiser, (20, 2), plan=walk, seed=4, batch=5)
    rows = ef.sample(denoiser, (6, 2), plan=walk, seed=4, batch=5, first_index=7)
    assert torch.equal(rows, every[7:13])


def test_conditions_reach_both_networks() -> None:
    """Classes that are points: given its label, a velocity does not change."""
    points = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return points[label]

    seen: list[Tensor] = []

    class Told(Keep):
        def forward(self, y: Tensor, v: Tensor, tau: Tensor, **condition: Any) -> Tensor:
            seen.append(condition["label"])
            return torch.zeros_like(y) + 0 * next(self.parameters())

    told = Told()
    told.register_parameter("unused", nn.Parameter(torch.zeros(())))
    labels = torch.arange(40) % 2
    denoiser = ef.Denoiser(net, LINEAR)
    refiner = train_refiner(denoiser, points[labels], told, steps=2, batch=16, label=labels)
    assert all(len(label) in (16, 64) for label in seen)
    walk = FlowTurbo(refiner, 1, 0, 2).plan(LINEAR)
    asked = torch.tensor([1, 0, 1])
    found = ef.sample(denoiser, (3, 2), plan=walk, label=asked)
    torch.testing.assert_close(found, points[asked], rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[-1], asked)


def test_pictures_have_a_small_network() -> None:
    denoiser = ef.Denoiser(lambda x, t: 0.5 * x, SCHEDULES["VP"], shape=(1, 8, 8))
    network = small_network((1, 8, 8), 8)
    refiner = train_refiner(denoiser, torch.randn(20, 1, 8, 8), network, steps=2, batch=4)
    walk = FlowTurbo(refiner, 1, 1, 1).plan(SCHEDULES["VP"])
    assert ef.sample(denoiser, (2, 1, 8, 8), plan=walk).isfinite().all()
    with pytest.raises(ValueError, match="no small network for samples of shape"):
        small_network((3, 4))


def test_cost_share_by_hand() -> None:
    """Of linear layers: products of their sizes."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, y: Tensor, v: Tensor, tau: Tensor) -> Tensor:
            return self.layer(torch.cat((y, v), 1))

    layers = nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 3))
    denoiser = ef.Denoiser(lambda x, t: layers(x), LINEAR)
    assert cost_share(Refiner(Small()), denoiser, (4, 3)) == pytest.approx(18 / 300)
    with pytest.raises(ValueError, match="multiplies no matrices"):
        cost_share(Refiner(Small()), ef.Denoiser(lambda x, t: x, LINEAR), (4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(5, 2, dtype=torch.int64)}, "give floats"),
        ({"data": torch.zeros(5, 3)}, r"takes \(N, \*\(2,\)\)"),
        ({"data": torch.full((5, 2), math.nan)}, "NaN"),
        ({"width": 1.0}, "width 1.0 in"),
        ({"steps": 0}, "steps 0"),
        ({"budget_seconds": 0.0}, "budget_seconds 0.0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    given = {"data": RING.sample(5, seed=1).float(), **change}
    with pytest.raises(ValueError, match=message):
        train_refiner(RING.denoiser(LINEAR), **given)
