"""Solvers that are no plan: `sample` drives them as it drives plans, and keeps their accounts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.solvers.stepping import Model, Point, Stepping, Walk

VP = ef.schedules.VP()
MIXTURE = ef.oracles.GaussianMixture(
    torch.tensor([[1.0, -1.0], [-1.0, 0.5]]), torch.tensor([0.1, 0.3]), torch.ones(2)
)


@dataclass(frozen=True)
class Ancestral(Stepping):
    """DDIM or DDPM by hand, as a step."""

    eta: float = 0.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def initial(self, model: Model, x: Tensor, walk: Walk) -> int:
        return 1

    def step(self, model: Model, x: Tensor, t: float, s: float, state: int) -> Any:
        alpha, sigma = model.schedule.alpha(t).item(), model.schedule.sigma(t).item()
        alpha_s, sigma_s = model.schedule.alpha(s).item(), model.schedule.sigma(s).item()
        clean = model(x, t)
        fresh = 1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2
        noise = sigma_s * (1 - self.eta**2 * fresh) ** 0.5 * (x - alpha * clean) / sigma
        x = alpha_s * clean + noise
        if self.eta and sigma_s:
            x = x + self.eta * sigma_s * fresh**0.5 * model.normal(x, state)
        return x, clean, state + 1


@dataclass(frozen=True)
class Impatient(Stepping):
    """Leaves sample i after i + 1 calls."""

    @property
    def adaptive(self) -> bool:
        return True

    def calls(self, schedule: Any, times: Any) -> None:
        return None

    def walk(self, model: Model, x: Tensor, walk: Walk) -> Iterator[Point]:
        rows = torch.arange(len(x))
        while len(rows):
            model(x[rows], torch.full((len(rows),), 0.5), rows)
            rows = rows[model.evaluations[rows] <= rows]
        model.times = torch.where(torch.arange(len(x)) < 2, 0.0, 0.5).double()
        yield Point(0.0, x, x)


HAND = Ancestral("hand", 1, 1, "written for this test")
HAND_NOISE = Ancestral("hand-noise", 1, 1, "written for this test", eta=1.0)


@pytest.mark.parametrize(("hand", "name"), [(HAND, "ddim"), (HAND_NOISE, "ddpm")])
@pytest.mark.parametrize("batch", [None, 3])
def test_a_step_gives_what_its_plan_gives(hand: Ancestral, name: str, batch: int | None) -> None:
    denoiser, times = MIXTURE.denoiser(VP), [1.0, 0.6, 0.3, 0.0]
    x = torch.randn(7, 2, dtype=torch.float64)
    for start in (None, x):
        drawn = [
            ef.sample(
                denoiser,
                (7, 2),
                solver=s,
                times=times,
                seed=5,
                first_index=2,
                batch=batch,
                x_init=start,
            )
            for s in (hand, ef.solvers.get(name))
        ]
        tolerance = 1e-12 if start is not None else 1e-5
        torch.testing.assert_close(*drawn, rtol=tolerance, atol=tolerance)


def test_trajectories_have_the_same_nodes() -> None:
    denoiser = MIXTURE.denoiser(VP)
    runs = [list(ef.trajectory(denoiser, (3, 2), solver=s, steps=4)) for s in (HAND, "ddim")]
    for one, two in zip(*runs, strict=True):
        assert one.time == two.time
        torch.testing.assert_close(one.state, two.state)
        torch.testing.assert_close(one.prediction, two.prediction)


def test_evaluations_are_counted() -> None:
    calls = []

    def answer(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0 * x

    found = ef.sample(ef.Denoiser(answer, VP), (5, 2), solver=HAND, steps=6, full=True)
    assert (found.nfe, found.passes, found.status, len(calls)) == (6, 6, "completed", 6)
    assert found.evaluations.tolist() == [6] * 5
    assert HAND.plan(VP, 6).nfe == 6 and HAND.largest(VP, 6).times == HAND.plan(VP, 6).times


def test_samples_that_stop_early_are_told() -> None:
    sizes = []

    def answer(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        sizes.append(shift.tolist())
        return x + shift[:, None]

    solver = Impatient("impatient", 1, 1, "written for this test")
    shift = torch.arange(4.0)
    found = ef.sample(ef.Denoiser(answer, VP), (4, 2), solver=solver, full=True, shift=shift)
    assert found.evaluations.tolist() == [1, 2, 3, 4]
    assert sizes == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]], "conditions are cut with the rows"
    assert found.status == "2 of 4 samples reached their cap"
    assert found.times.tolist() == [0, 0, 0.5, 0.5] and found.nfe == 4


def test_derivatives_are_those_of_finite_differences() -> None:
    denoiser = MIXTURE.denoiser(VP)
    model = Model(denoiser, {}, 0, range(3))
    x, v = torch.randn(2, 3, 2, dtype=torch.float64)
    value, change = model.derivative(x, 0.4, v, 0.7)
    step = 1e-5
    up, down = (denoiser(x + e * v, 0.4 + 0.7 * e) for e in (step, -step))
    torch.testing.assert_close(value, denoiser(x, 0.4))
    torch.testing.assert_close(change, (up - down) / (2 * step), rtol=1e-7, atol=1e-8)
    assert model.evaluations.tolist() == [2, 2, 2]


def test_what_is_not_finite_stops_a_walk() -> None:
    broken = ef.Denoiser(lambda x, t: x / (t[0] - 0.5), VP)
    with pytest.raises(ef.NonFinite, match=r"t = 0\.5"):
        ef.sample(broken, (2, 2), solver=HAND, times=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="the plan was made for"):
        HAND.plan(ef.schedules.Cosine(), 3).run(broken, torch.randn(2, 2))
    with pytest.raises(ValueError, match="stochastic: it cannot run towards noise"):
        HAND_NOISE.plan(VP, times=[0.2, 0.5])
