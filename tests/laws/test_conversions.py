"""Law 8, first half: every prediction is the same model, whatever a network outputs.

The true x_0 and noise make every network's output by its own paper's definition, written here by
hand; the denoiser must give back the truth as any target, at every schedule and time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow import denoiser as module
from ebbflow.denoiser import CLOCKS, PREDICTIONS
from tests.laws import cases, reference
from tests.laws.cases import SCHEDULES

SIGMA_DATA = 0.7
X0 = torch.tensor([[0.8, -1.1, 0.2], [0.1, 0.5, -0.4]], dtype=torch.float64)
EPS = torch.tensor([[-0.3, 0.9, 1.4], [0.6, -1.2, 0.05]], dtype=torch.float64)
TARGETS = ("x0", "noise", "score", "velocity", "v")


def edm_output(x: Tensor, x0: Tensor, r: float) -> Tensor:
    """F of Elucidating the Design Space, table 1, at noise level r on the unscaled state x."""
    total = r**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, r * SIGMA_DATA / math.sqrt(total)
    return (x0 - c_skip * x) / c_out


def truth(kind: str, schedule: str, t: float, x0: Tensor, eps: Tensor) -> Tensor:
    """What a perfect network of this kind returns."""
    now = reference.LEVELS[schedule](t)
    if kind == "x0":
        return x0
    if kind == "noise":
        return eps
    if kind == "v":
        return now.alpha * eps - now.sigma * x0
    if kind == "score":
        return -eps / now.sigma
    if kind == "velocity":
        return now.alpha_prime * x0 + now.sigma_prime * eps
    assert kind == "edm", f"{kind}: write its definition here"
    r = now.sigma / now.alpha
    return edm_output(x0 + r * eps, x0, r)


def network(kind: str, schedule: str, times: Tensor) -> ef.Denoiser:
    """A network that knows the truth at these times, one a sample."""
    rows = [truth(kind, schedule, t.item(), X0[[i]], EPS[[i]]) for i, t in enumerate(times)]
    sigma_data = SIGMA_DATA if kind == "edm" else None
    process = SCHEDULES[schedule]
    return ef.Denoiser(lambda x, t: torch.cat(rows), process, kind, sigma_data=sigma_data)


def call(denoiser: ef.Denoiser, target: str) -> Callable[[Tensor, Tensor], Tensor]:
    return denoiser if target == "x0" else getattr(denoiser, target)


def check_conversion(kind: str, target: str) -> None:
    for schedule in SCHEDULES:
        for times in ([0.3, 0.3], [0.02, 0.97], [0.6, 0.1]):
            t = torch.tensor(times, dtype=torch.float64)
            x = SCHEDULES[schedule].add_noise(X0, t, EPS)
            found = call(network(kind, schedule, t), target)(x, t)
            expected = [truth(target, schedule, s, X0[[i]], EPS[[i]]) for i, s in enumerate(times)]
            # Through VP's alpha(0.97) = 0.009, noise becomes x0 with its rounding times 100.
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_prediction_becomes_every_target(kind: str, target: str) -> None:
    check_conversion(kind, target)


@contextmanager
def table(kind: str, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Iterator[None]:
    """The conversion table with the row of one prediction spoilt."""
    right = PREDICTIONS[kind]
    assert isinstance(PREDICTIONS, dict)
    PREDICTIONS[kind] = lambda *arguments: change(right(*arguments))
    module._numbers.cache_clear()
    try:
        yield
    finally:
        PREDICTIONS[kind] = right
        module._numbers.cache_clear()


SPOILT = {
    "r negative": lambda row: (-row[0], row[1], row[2]),
    "s negative": lambda row: (row[0], -row[1], row[2]),
    "scale off": lambda row: (row[0], row[1], row[2] * 1.001),
    "r off": lambda row: (row[0] * 1.001, row[1], row[2]),
    "s off": lambda row: (row[0], row[1] * 1.001, row[2]),
    "r and s swapped": lambda row: (row[1], row[0], row[2]),
}
# What is zero stays so with any factor.
EQUIVALENT = {
    ("x0", "s negative"),
    ("x0", "s off"),
    *((kind, what) for kind in ("noise", "score") for what in ("r negative", "r off")),
}


@pytest.mark.parametrize(
    ("kind", "spoilt"), [(k, s) for k in PREDICTIONS for s in SPOILT if (k, s) not in EQUIVALENT]
)
def test_mutants_of_the_table_are_seen(kind: str, spoilt: str) -> None:
    with table(kind, SPOILT[spoilt]), pytest.raises(AssertionError):
        check_conversion(kind, "noise" if kind == "x0" else "x0")


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_executor_converts_as_the_denoiser_does(kind: str) -> None:
    """Python numbers in a run, tensors in a call: the same conversion."""
    t = torch.full((2,), 0.4, dtype=torch.float64)
    process = SCHEDULES["VP"]
    x = process.add_noise(X0, 0.4, EPS)
    plan = ef.solvers.get("ddim").plan(process, times=[0.4, 0.0])
    torch.testing.assert_close(plan.run(network(kind, "VP", t), x), X0, rtol=1e-12, atol=1e-12)


def test_edm_networks_see_a_scaled_input() -> None:
    """c_in x / alpha = x / (alpha sqrt(r² + sigma_data²)): unit variance at every time."""
    seen: list[Tensor] = []
    process = SCHEDULES["VP"]
    net = lambda x, t: seen.append(x) or torch.zeros_like(x)  # noqa: E731
    denoiser = ef.Denoiser(net, process, "edm", sigma_data=SIGMA_DATA)
    x0 = SIGMA_DATA * torch.randn(20000, 1, dtype=torch.float64)
    for t in (0.0, 0.01, 0.3, 1.0):
        denoiser(process.add_noise(x0, t, torch.randn_like(x0)), t)
        assert seen[-1].var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_training_coefficients_are_those_of_the_call(kind: str) -> None:
    """x_0 = p x_t + q F, and 1/q² for EDM is equation 8's weight over sigma_data²."""
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    denoiser = network(kind, "Linear", t)
    p, q, c_in = denoiser.coefficients(t)
    x = SCHEDULES["Linear"].add_noise(X0, t, EPS)
    x0 = p[:, None] * x + q[:, None] * denoiser.net(x, t)
    torch.testing.assert_close(x0, X0, rtol=1e-12, atol=1e-12)
    if kind == "edm":
        r = t / (1 - t)
        weight = (r**2 + SIGMA_DATA**2) / (r * SIGMA_DATA) ** 2
        torch.testing.assert_close(1 / q**2, weight)
        torch.testing.assert_close(c_in * (1 - t), torch.rsqrt(r**2 + SIGMA_DATA**2))
    else:
        assert bool((c_in == 1).all())


def _told(clock: str, schedule: ef.schedules.Schedule, t: float) -> float:
    seen: list[Tensor] = []
    net = lambda x, time: seen.append(time) or x  # noqa: E731
    ef.Denoiser(net, schedule, time=clock)(X0.float(), t)
    assert seen[0].dtype == torch.float32 and seen[0].shape == (2,)
    return seen[0][0].item()


def test_every_clock_by_hand() -> None:
    """For the straight path at t = 0.2: sigma/alpha = 1/4; and the index of a beta table."""
    linear, betas = SCHEDULES["Linear"], ef.schedules.Betas([0.1] * 5)
    expected = {
        "t": 0.2,
        "angle": math.atan(0.25),
        "log_snr": 2 * math.log(4),
        "sigma": 0.25,
        "quarter_log_sigma": math.log(0.25) / 4,
        "step": None,
    }
    assert set(expected) == set(CLOCKS)
    for clock, value in expected.items():
        if value is not None:
            assert _told(clock, linear, 0.2) == pytest.approx(value, rel=1e-6)
    for i in range(5):
        assert _told("step", betas, (i + 1) / 5) == i
    assert _told("step", betas, 0.5) == pytest.approx(1.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.05, 0.9])
def test_oracles_are_the_reference_in_every_prediction(schedule: str, t: float) -> None:
    law, now = cases.LAWS["mixture"], reference.LEVELS[schedule](t)
    x = now.alpha * law.draw(6, 1) + now.sigma * law.draw(6, 2)
    x0 = law.posterior_mean(x, now.alpha, now.sigma)
    eps = (x - now.alpha * x0) / now.sigma
    denoiser = cases.oracle("mixture").denoiser(SCHEDULES[schedule])
    for target in TARGETS:
        expected = truth(target, schedule, t, torch.tensor(x0), torch.tensor(eps))
        found = call(denoiser, target)(torch.tensor(x), torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
