"""Solvers that are no plan, on nodes that the caller gives: the laws of the others, on runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.solvers import channels
from ebbflow.solvers.stepping import Model
from tests.laws import cases, reference
from tests.laws.cases import SCHEDULES, WALKS
from tests.laws.test_same_sample import check_alone, elementwise

VP = SCHEDULES["VP"]
STEADY = tuple(name for name, solver in WALKS.items() if not solver.stochastic)
NOISY = tuple(name for name, solver in WALKS.items() if solver.stochastic)


def run(solver: Any, law: str, schedule: str, steps: int) -> np.ndarray:
    """The error of the end state at t = 0.05."""
    plan = solver.plan(SCHEDULES[schedule], times=cases.interior(steps))
    denoiser = cases.oracle(law).denoiser(SCHEDULES[schedule])
    end = plan.run(denoiser, cases.tensor(cases.start(law, schedule)))
    return end.numpy() - cases.exact_end(law, schedule)


def check_order(solver: Any, schedules: tuple[str, ...] = tuple(SCHEDULES)) -> None:
    slopes = []
    for schedule in schedules:
        coarse, fine = (np.linalg.norm(run(solver, "mixture", schedule, n)) for n in (48, 192))
        slopes.append(math.log2(coarse / fine) / 2)
    assert min(slopes) > solver.order - 0.25, slopes
    assert min(slopes) < solver.order + 0.25, slopes


@pytest.mark.parametrize("name", STEADY)
def test_the_stated_order_is_the_observed_one(name: str) -> None:
    check_order(WALKS[name])


@pytest.mark.parametrize("name", WALKS)
def test_calls_are_as_planned(name: str) -> None:
    solver, calls = WALKS[name], []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.5 * x

    for budget in (4, 7, 12):
        plan = solver.largest(VP, budget)
        assert plan.nfe <= budget < solver.plan(VP, len(plan.times)).nfe
        calls.clear()
        found = ef.sample(ef.Denoiser(net, VP), (5, 3), plan=plan, full=True)
        assert found.nfe == plan.nfe and found.status == "completed"
        # A Jacobian-vector product is one call of the network and costs two.
        assert len(calls) == plan.nfe or "jvp" in solver.needs
    with pytest.raises(ValueError, match=r"no noise at t = 0|is stochastic"):
        solver.plan(VP, times=[0.0, 0.5])


@pytest.mark.parametrize("name", WALKS)
def test_a_sample_is_itself_in_any_batch(name: str) -> None:
    check_alone("vectors", solver=name, steps=3)
    plan = WALKS[name].plan(VP, times=[0.99, 0.7, 0.4, 0.2, 0.05])
    denoiser, x = ef.Denoiser(elementwise, VP, "noise"), torch.randn(37, 5, 3)
    every = plan.run(denoiser, x, seed=9, first_index=100)
    for first, count in ((0, 1), (3, 7), (36, 1)):
        rows = plan.run(denoiser, x[first : first + count], seed=9, first_index=100 + first)
        torch.testing.assert_close(rows, every[first : first + count], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", WALKS)
def test_the_whole_way_ends_at_the_prediction(name: str, schedule: str) -> None:
    """From no signal where the schedule has none, to no noise: finite, and the last prediction."""
    denoiser = cases.oracle("mixture").denoiser(SCHEDULES[schedule])
    for steps in (1, 2, 3, 10):
        points = list(ef.trajectory(denoiser, (6, 2), solver=name, steps=steps, seed=1))
        assert len(points) == steps and bool(torch.isfinite(points[-1].state).all())
        if schedule != "VE":
            assert torch.equal(points[-1].state, points[-1].prediction)


# GENIE.


def still(self: Model, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    self.spend(0.5, calls=2)
    return x, torch.zeros_like(x)


def test_genie_without_its_derivative_is_ddim(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, x = cases.oracle("mixture").denoiser(VP), torch.randn(5, 2).double()
    nodes = [1.0, 0.7, 0.4, 0.1, 0.0]
    genie, ddim = (ef.solvers.get(name).plan(VP, times=nodes) for name in ("genie", "ddim"))
    assert (genie.run(denoiser, x) - ddim.run(denoiser, x)).abs().max() > 1e-3
    monkeypatch.setattr(Model, "derivative", still)
    torch.testing.assert_close(genie.run(denoiser, x), ddim.run(denoiser, x))


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.8])
def test_genie_with_a_wrong_derivative_is_of_first_order(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Model.derivative

    def wrong(self: Model, *asked: Any) -> tuple[Tensor, Tensor]:
        value, change = right(self, *asked)
        return value, factor * change

    monkeypatch.setattr(Model, "derivative", wrong)
    with pytest.raises(AssertionError):
        check_order(WALKS["genie"], ("VP",))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_genie_step_of_a_gaussian_by_hand(schedule: str) -> None:
    """N(0, v): eps = gamma y / (v + gamma²) at y = x/alpha, and d eps/dgamma = v y/(v + gamma²)²
    along the solution y ~ sqrt(v + gamma²)."""
    v, (t, s) = 0.7, (0.6, 0.45)
    process, levels = SCHEDULES[schedule], reference.LEVELS[schedule]
    oracle = ef.oracles.GaussianMixture(torch.zeros(1, 2), torch.tensor([v]), torch.ones(1))
    now, then = levels(t), levels(s)
    gamma, h = now.sigma / now.alpha, then.sigma / then.alpha - now.sigma / now.alpha
    x = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    y, total = x / now.alpha, v + gamma**2
    expected = then.alpha * (y + h * gamma * y / total + h**2 / 2 * v * y / total**2)
    found = WALKS["genie"].plan(process, times=[t, s]).run(oracle.denoiser(process), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# EVODiff.


def evodiff_by_hand(law: reference.Mixture, x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """Written anew in EDM's setting, alpha = 1, from the paper's formulas; one channel a sample."""

    def ask(x: np.ndarray, s: float) -> np.ndarray:
        return law.posterior_mean(x, 1.0, s)

    def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * b, axis=1, keepdims=True)

    def logistic(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    m_old, m = None, ask(x, sigmas[0])
    for i in range(len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        h = 1 / t - 1 / s
        x_e = t / s * x + t * h * m
        if i == len(sigmas) - 2:
            return x_e
        if m_old is None:
            m_old, m, x = m, ask(x_e, t), x_e
            continue
        r = math.log(sigmas[i - 1] / s) / math.log(s / t)
        base = math.sqrt((t / s) / (s / sigmas[i - 1]))
        w = 0.5 * (1 - (math.atan(t) / (math.pi / 2)) ** 2)
        r1 = (1 - w) * base + w * np.clip(inner(m, m_old) / inner(m_old, m_old), -2, 2)
        d1 = m - r1 * m_old
        ri = np.clip(logistic(np.abs(r1) / 4) * r, r / 4, 1.5 * r)
        x_p = x_e + t * h / (2 * ri) * d1
        m_t = ask(x_p, t)
        r2 = (1 - w) * base + w * np.clip(inner(m_t, m) / inner(m, m), -2, 2)
        d2 = m_t - r2 * m
        b_p, b_n = d1 / (r * h), r * d2 / h
        fit = inner(b_n + b_p, b_n - b_p) / inner(b_n - b_p, b_n - b_p)
        eta = logistic(np.abs(np.clip(fit, -2, 2) / 2)) / 2
        b = r * d2 * (1 - eta) - d1 * eta / r
        rest = x_p - x_e - t * h / (2 * ri) * b
        fit = np.clip(inner(rest, d1) / inner(d1, d1), -2, 2) / (h * t)
        x = x_e + t * h / 2 * b / logistic(np.abs(fit) - 0.5)
        assert eta.min() >= 0.25 and eta.max() <= 0.366 + 1e-3
        m_old, m = m, m_t
    raise AssertionError


def check_evodiff() -> None:
    sigmas = [20.0, 6.0, 2.5, 0.9, 0.3, 0.1]
    x = np.random.default_rng(0).standard_normal((6, 2)) * 20
    process = SCHEDULES["VE"]
    times = process.time(-2 * torch.tensor(sigmas, dtype=torch.float64).log()).tolist()
    denoiser = cases.oracle("mixture").denoiser(process)
    found = WALKS["evodiff"].plan(process, times=times).run(denoiser, torch.tensor(x))
    expected = evodiff_by_hand(cases.LAWS["mixture"], x, sigmas)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-9, atol=1e-9)


def test_evodiff_is_its_formulas() -> None:
    check_evodiff()


@pytest.mark.parametrize("what", ["share", "dot"])
def test_a_wrong_evodiff_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"share": ef.solvers.evodiff, "dot": channels}[what]
    right = getattr(place, what)
    wrong = {"share": lambda a, b: 1.001 * right(a, b), "dot": lambda a, b: right(a, b) + 1e-3}
    monkeypatch.setattr(place, what, wrong[what])
    with pytest.raises(AssertionError):
        check_evodiff()


def test_evodiff_fits_each_channel_on_its_own() -> None:
    """Two channels that a model treats apart come out as they do alone."""
    denoiser = ef.Denoiser(lambda x, t: torch.tanh(x) * 0.9, VP)
    plan, x = ef.solvers.get("evodiff").plan(VP, 6), torch.randn(3, 2, 4, 4).double()
    every = plan.run(denoiser, x)
    for channel in range(2):
        alone = plan.run(denoiser, x[:, channel : channel + 1])
        torch.testing.assert_close(alone, every[:, channel : channel + 1])
    flat = plan.run(denoiser, x.reshape(3, 32)).reshape(x.shape)
    assert (flat - every).abs().max() > 1e-4


# Time-Shift.


@pytest.mark.parametrize("neutral", [{"window": 0.0}, {"cutoff": 1.0}])
def test_time_shift_at_its_neutral_settings_is_ddim(neutral: dict[str, float]) -> None:
    denoiser, x = cases.oracle("mixture").denoiser(VP), torch.randn(5, 2).double()
    plans = (
        ef.solvers.get("time-shift", **neutral).plan(VP, 8),
        ef.solvers.get("ddim").plan(VP, 8),
    )
    torch.testing.assert_close(*(plan.run(denoiser, x) for plan in plans))
    moved = ef.solvers.get("time-shift").plan(VP, 8).run(denoiser, x)
    assert (moved - plans[1].run(denoiser, x)).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_shifted_time_is_where_the_noise_has_the_samples_variance(schedule: str) -> None:
    """A perfect state of a law without spread is not moved but by chance, sqrt(1/2d); noise scaled
    by 1 + e moves it to where sigma is larger by as much, or to the window's edge."""
    process, solver, t, d = SCHEDULES[schedule], ef.solvers.get("time-shift"), 0.3, 50_000
    z = torch.randn(3, d, dtype=torch.float64)
    z = (z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True)
    sigma = process.sigma(t)
    for scale in (1.0, 0.97, 1.02):
        moved = solver._time(process, scale * sigma * z, t, 0.2)  # pyright: ignore
        torch.testing.assert_close(process.sigma(moved), (scale * sigma).expand(3))
    moved = solver._time(process, 2 * sigma * z, t, 0.01)  # pyright: ignore
    torch.testing.assert_close(moved, torch.full((3,), 0.31, dtype=torch.float64))


def test_time_shift_mends_noise_of_the_wrong_size() -> None:
    """Exposure bias put in by hand: whether the start has 5% too little noise or 8% too much, the
    end is the same; DDIM carries the bias along."""
    spread, d = 0.1, 1000

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        return alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x

    denoiser, times = ef.Denoiser(posterior_mean, VP), np.linspace(0.5, 0.0, 9).tolist()
    z = VP.sigma(0.5) * torch.randn(4, d, dtype=torch.float64)
    apart = []
    for solver in (ef.solvers.get("ddim"), ef.solvers.get("time-shift", cutoff=0.05, window=20.0)):
        plan = solver.plan(VP, times=times)
        ends = [plan.run(denoiser, bias * z).std(1) for bias in (0.95, 1.08)]
        apart.append((ends[1] - ends[0]).abs().mean().item())
    assert apart[1] < 1e-3 * apart[0], apart


# Predictor-corrector.


def test_without_corrections_it_is_ddpm() -> None:
    denoiser, x = cases.oracle("mixture").denoiser(VP), torch.randn(5, 2).double()
    nodes = [1.0, 0.8, 0.5, 0.2, 0.0]
    for neutral in ({"corrections": 0}, {"snr": 0.0}):
        solver = ef.solvers.get("langevin-corrector", **neutral)
        expected = ef.solvers.get("ddpm").plan(VP, times=nodes).run(denoiser, x, seed=4)
        if "snr" in neutral:  # it draws and does not use them
            monkey = WALKS["langevin-corrector"].plan(VP, times=nodes).run(denoiser, x, seed=4)
            assert (monkey - expected).abs().max() > 1e-2
            continue
        torch.testing.assert_close(solver.plan(VP, times=nodes).run(denoiser, x, seed=4), expected)


@functools.cache
def wide(spread: float = 0.8) -> ef.Denoiser:
    """N(0, spread²) in many dimensions."""

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        return (alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)).to(x.dtype) * x

    return ef.Denoiser(posterior_mean, VP)


def variance_error(solver: Any, steps: int) -> float:
    """Relative, at t = 0.3, from the process' own law at t = 0.9."""
    first, last = ((VP.alpha(t) * 0.8) ** 2 + VP.sigma(t) ** 2 for t in (0.9, 0.3))
    x = first.sqrt() * ef.noise.normal(1, range(400), 0, (500,), torch.float64)
    plan = solver.plan(VP, times=np.linspace(0.9, 0.3, steps + 1).tolist())
    return (plan.run(wide(), x, seed=2).var() / last - 1).item()


def check_corrector() -> None:
    """The law is reached at weak order 1: twice the steps, half the error."""
    errors = [variance_error(WALKS["langevin-corrector"], n) for n in (4, 8, 16, 32)]
    assert abs(errors[-1]) < 0.03 and abs(errors[0]) < 0.5, errors
    for coarse, fine in pairwise(errors):
        assert abs(fine) < 0.65 * abs(coarse) + 4 * (2 / 200_000) ** 0.5, errors


def test_the_corrector_keeps_the_law() -> None:
    check_corrector()


def _louder(self: Model, x: Tensor, draw: int, rows: Any = None) -> Tensor:
    return 1.05 * ef.noise.normal(self.seed, self.indices, draw, x.shape[1:], x.dtype)


def _the_same(self: Model, x: Tensor, draw: int, rows: Any = None) -> Tensor:
    return ef.noise.normal(self.seed, self.indices, 1, x.shape[1:], x.dtype)


@pytest.mark.parametrize("wrong", [_louder, _the_same])
def test_a_corrector_with_wrong_noise_is_seen(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "normal", wrong)
    with pytest.raises(AssertionError):
        check_corrector()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("langevin-corrector", {"snr": -1.0}),
        ("langevin-corrector", {"corrections": -1}),
        ("time-shift", {"window": -0.1}),
        ("time-shift", {"cutoff": 1.5}),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        ef.solvers.get(name, **bad)
