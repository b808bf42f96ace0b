"""Parallel in time: the loop's sample, for every plan, in fewer rounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.bases import Basis
from ebbflow.solvers import Solver
from tests.laws import cases

PLANS = tuple(
    name for name, solver in cases.SOLVERS.items() if type(solver).stages is not Solver.stages
)
METHODS = ("jacobi", "gauss-seidel", "anderson")
SHAPE = (5, 2)


def mixture(schedule: str = "VP") -> ef.Denoiser:
    return cases.oracle("mixture").denoiser(cases.SCHEDULES[schedule], statistics=True)


def start(seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PLANS)
def test_every_solver_s_sample_in_fewer_rounds(name: str, method: str) -> None:
    denoiser, x = mixture(), start()
    plan = cases.SOLVERS[name].plan(denoiser.schedule, 32, statistics=denoiser.statistics)
    loop = plan.run(denoiser, x, seed=3)
    for window in (None, 10):
        found = ef.parallel(
            denoiser, SHAPE, plan=plan, method=method, window=window, x_init=x, seed=3
        )
        assert found.status == "converged"
        assert (found.samples - loop).abs().max() < 1e-6
        assert found.residual.max() <= 1e-7
        assert found.rounds < plan.nfe or (method != "jacobi" and found.rounds == plan.nfe)
        assert found.evaluations >= SHAPE[0] * plan.nfe


@pytest.mark.parametrize("name", PLANS)
def test_after_as_many_rounds_as_calls_the_sample_is_exact(name: str) -> None:
    denoiser, x = mixture("Linear"), start()
    plan = cases.SOLVERS[name].plan(denoiser.schedule, 9, statistics=denoiser.statistics)
    loop = plan.run(denoiser, x, seed=1)
    for window in (None, 4, 1):
        found = ef.parallel(
            denoiser, SHAPE, plan=plan, window=window, tolerance=0.0, x_init=x, seed=1
        )
        assert (found.samples - loop).abs().max() < 1e-13
        assert found.rounds <= plan.nfe


def test_component_k_is_exact_after_k_rounds_and_not_before() -> None:
    """The last prediction needs every round; what `max_rounds` returns is not yet the sample."""
    denoiser, x = mixture(), start()
    plan = ef.solvers.get("ddim").plan(denoiser.schedule, 8)
    loop = plan.run(denoiser, x)
    cut = ef.parallel(denoiser, SHAPE, plan=plan, x_init=x, tolerance=0.0, max_rounds=5)
    assert cut.status == "stopped" and cut.rounds == 5
    assert math.isinf(cut.residual.max()) and (cut.samples - loop).abs().max() > 1e-9


def test_the_start_and_the_arguments_are_those_of_sample() -> None:
    denoiser = mixture()
    for rest in ({"solver": "ddpm", "steps": 12}, {"times": [1.0, 0.6, 0.3, 0.1, 0.0]}):
        loop = ef.sample(denoiser, SHAPE, seed=7, first_index=2, **rest)
        found = ef.parallel(denoiser, SHAPE, seed=7, first_index=2, tolerance=1e-5, **rest)
        assert found.samples.dtype == loop.dtype
        assert (found.samples - loop).abs().max() < 1e-5


def test_a_sample_does_not_know_its_neighbours() -> None:
    denoiser, x = mixture(), start()
    whole = ef.parallel(denoiser, SHAPE, solver="ddpm", steps=30, x_init=x, window=8)
    for i in range(SHAPE[0]):
        alone = ef.parallel(
            denoiser, (1, 2), solver="ddpm", steps=30, x_init=x[i : i + 1], window=8, first_index=i
        )
        assert (alone.samples[0] - whole.samples[i]).abs().max() < 1e-14
        assert int(alone.sample_rounds[0]) == int(whole.sample_rounds[i])
    assert whole.rounds == int(whole.sample_rounds.max())


def test_conditions_follow_their_samples_and_calls_keep_to_the_batch() -> None:
    schedule = ef.schedules.Linear()
    sizes = []

    def net(x: Tensor, t: Tensor, centre: Tensor, scale: float) -> Tensor:
        sizes.append(len(x))
        return centre + scale * torch.tanh(x - centre * (1 - t[:, None]))

    denoiser = ef.Denoiser(net, schedule)
    condition = {"centre": torch.randn(5, 2, dtype=torch.float64), "scale": 0.7}
    x = start()
    plan = ef.solvers.get("heun").plan(schedule, 20)
    loop = plan.run(denoiser, x, **condition)
    sizes.clear()
    found = ef.parallel(denoiser, SHAPE, plan=plan, x_init=x, batch=16, **condition)
    assert (found.samples - loop).abs().max() < 1e-6
    assert max(sizes) == 16 and sum(sizes) == found.evaluations


@pytest.mark.parametrize("kind", ("identity", "cosine", "matrix"))
def test_plans_in_a_basis(kind: str) -> None:
    """Coefficients that differ by coordinate, and coordinates that are not the state's."""
    schedule, shape = ef.schedules.Linear(), (3, 1, 2, 4)
    denoiser = ef.Denoiser(lambda x, t: torch.tanh(x + t.reshape(-1, 1, 1, 1)), schedule)
    matrix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    own = (8,) if kind == "matrix" else shape[1:]
    basis = Basis(kind, own, matrix if kind == "matrix" else None)
    scale = torch.rand(own, dtype=torch.float64) / 10 + 0.95
    plain = ef.solvers.get("ddpm").plan(schedule, 12)
    stages = tuple(
        replace(s, update=tuple({n: v * scale for n, v in row.items()} for row in s.update))
        for s in plain.stages
    )
    plan = replace(plain, stages=stages, basis=basis)
    x = torch.randn(shape, dtype=torch.float64)
    found = ef.parallel(denoiser, shape, plan=plan, x_init=x, window=5)
    assert (found.samples - plan.run(denoiser, x)).abs().max() < 1e-6
    assert (found.samples - plain.run(denoiser, x)).abs().max() > 1e-3


def test_steps_that_are_not_linear_are_refused() -> None:
    with pytest.raises(ValueError, match="not linear"):
        ef.parallel(mixture(), SHAPE, solver="genie")


def test_the_window_bounds_what_a_round_evaluates() -> None:
    denoiser, x = mixture(), start()
    sizes = []

    class Counting(ef.Denoiser):
        def at(self, t, x, target="x0"):
            sizes.append(len(x))
            return denoiser.at(t, x, target)

    counting = Counting(lambda x, t: x, denoiser.schedule)
    found = ef.parallel(counting, SHAPE, solver="ddim", steps=40, x_init=x, window=6)
    assert max(sizes) == 6 * SHAPE[0] and len(sizes) == found.rounds
    assert sum(sizes) == found.evaluations


@pytest.mark.parametrize("solver", ("ddim", "sde-dpm-solver++2m"))
def test_the_bundled_model(solver: str) -> None:
    denoiser = ef.load("fashion-mnist")
    assert denoiser.shape is not None
    shape = (2, *denoiser.shape)
    plan = ef.solvers.get(solver).plan(denoiser.schedule, 12)
    loop = ef.sample(denoiser, shape, plan=plan)
    found = ef.parallel(denoiser, shape, plan=plan, window=6, tolerance=1e-4)
    assert (found.samples - loop).abs().max() < 1e-4
    assert found.rounds <= plan.nfe


def test_mistakes_are_refused() -> None:
    denoiser = mixture()
    plan = ef.solvers.get("ddim").plan(denoiser.schedule, 4)
    for rest, message in (
        ({"method": "jacoby"}, "jacobi"),
        ({"plan": plan, "steps": 3}, "at most one"),
        ({"x_init": torch.zeros(3, 2)}, "expected"),
        ({"x_init": torch.zeros(5, 2, requires_grad=True)}, "gradient"),
        ({"times": [0.9, 0.1]}, "x_init"),
        ({"window": 0}, "window"),
        ({"batch": 0}, "batch"),
    ):
        with pytest.raises(ValueError, match=message):
            ef.parallel(denoiser, SHAPE, **rest)


def test_a_prediction_that_is_not_finite_stops_the_run() -> None:
    schedule = ef.schedules.Linear()

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] < 0.45, math.nan, 0.5 * x)

    with pytest.raises(ef.NonFinite, match="step 7 of 10"):
        ef.parallel(ef.Denoiser(net, schedule), SHAPE, solver="euler", steps=10)


def test_the_default_knows_the_class_as_sample_does() -> None:
    """One class for all, several, and statistics that describe each: the plans are `sample`'s."""
    x0 = torch.randn(120, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(120) // 60
    known = ef.Statistics.from_data(x0 * (1 + labels)[:, None] + labels[:, None], labels)
    model = ef.Denoiser(
        lambda x, t, label: torch.tanh(x + label[:, None]), ef.schedules.VP(), statistics=known
    )
    x = torch.randn(4, 3, dtype=torch.float64)
    for label in (torch.ones(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1])):
        asked = {"steps": 8, "x_init": x, "label": label}
        found = ef.parallel(model, (4, 3), **asked).samples
        torch.testing.assert_close(found, ef.sample(model, (4, 3), **asked), rtol=0, atol=1e-6)
