"""Law 3: levels in closed form to the last digits, derivatives, inverses, and infinite ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import VE, VP, Betas, Cosine, Linear, Schedule, TimeLike, known
from tests.laws.test_betas import TABLES

# Enrolment: at least one of every kind that a file can name.
SCHEDULES: dict[str, Schedule] = {
    "VP": VP(),
    "VP slow": VP(0.5, 0.5),
    "Cosine": Cosine(),
    "VE": VE(),
    "VE narrow": VE(0.1, 3.0),
    "Linear": Linear(),
    **{f"Betas {name}": Betas(table.tolist()) for name, table in TABLES.items()},
}

INNER = torch.linspace(0.001, 0.999, 777, dtype=torch.float64)


def check(schedule: Schedule) -> None:
    """alpha, sigma, log-SNR, their derivatives and the inverse all describe one process."""
    t, piecewise = INNER.clone(), isinstance(getattr(schedule, "right", schedule), Betas)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    for value in (alpha, sigma, log_snr):
        assert value.dtype == torch.float64 and value.shape == t.shape
        assert bool(torch.isfinite(value).all())
    assert bool((alpha > 0).all()) and bool((sigma > 0).all())
    assert bool((log_snr.diff() < 0).all()), "log-SNR must fall with time"
    close(log_snr, 2 * torch.log(alpha / sigma), 1e-11)
    close(schedule.time(log_snr), t, 1e-11)
    close(schedule.log_snr(schedule.time(log_snr)), log_snr, 1e-9)
    by_quotients = 2 * (schedule.alpha_prime(t) / alpha - schedule.sigma_prime(t) / sigma)
    for function, derivative in (
        (schedule.alpha, schedule.alpha_prime(t)),
        (schedule.sigma, schedule.sigma_prime(t)),
        (schedule.log_snr, by_quotients),
    ):
        close(derivative, reverse_mode(function, t), 1e-10)
        if not piecewise:  # differences would straddle a knot
            close(derivative, differences(function, t), 2e-7)
    assert schedule.alpha(0.0).item() == 1
    variance = schedule.sigma(0.0).item() ** 2
    assert variance < 0.02 * schedule.sigma(1.0).item() ** 2


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the larger of 1 and the value."""
    error = (found - expected).abs() / expected.abs().clamp(min=1)
    worst = int(error.argmax())
    assert error.max() <= tolerance, f"{found[worst]} for {expected[worst]} at {INNER[worst]}"


def reverse_mode(function: Callable[[TimeLike], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(t).sum() + 0 * t.sum(), t)
    return gradient


def differences(function: Callable[[TimeLike], Tensor], t: Tensor, h: float = 2e-5) -> Tensor:
    """Fourth-order central differences."""
    near, far = function(t + h) - function(t - h), function(t + 2 * h) - function(t - 2 * h)
    return (8 * near - far) / (12 * h)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_agrees_with_itself(name: str) -> None:
    check(SCHEDULES[name])


def test_every_schedule_is_enrolled() -> None:
    assert {type(schedule).__name__ for schedule in SCHEDULES.values()} == set(known())


@dataclass(frozen=True)
class Wrong(Schedule):
    """A schedule with one method spoilt; the others stay those of `right`."""

    right: Schedule
    what: str
    spoil: Callable[[Tensor, Tensor], Tensor]

    def _value(self, what: str, t: TimeLike) -> Tensor:
        value = getattr(self.right, what)(t)
        return self.spoil(value, torch.as_tensor(t)) if what == self.what else value

    def alpha(self, t: TimeLike) -> Tensor:
        return self._value("alpha", t)

    def sigma(self, t: TimeLike) -> Tensor:
        return self._value("sigma", t)

    def log_snr(self, t: TimeLike) -> Tensor:
        return self._value("log_snr", t)

    def alpha_prime(self, t: TimeLike) -> Tensor:
        return self._value("alpha_prime", t)

    def sigma_prime(self, t: TimeLike) -> Tensor:
        return self._value("sigma_prime", t)

    def time(self, log_snr: TimeLike) -> Tensor:
        return self._value("time", log_snr)


SPOILT: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "alpha off": ("alpha", lambda value, t: value * (1 + 1e-6 * t)),
    "sigma off": ("sigma", lambda value, t: value * (1 + 1e-6 * t)),
    "log-SNR tilted": ("log_snr", lambda value, t: value + 1e-6 * t),
    "log-SNR of amplitudes": ("log_snr", lambda value, t: value / 2),
    "alpha' scaled": ("alpha_prime", lambda value, t: value * 1.001),
    "sigma' scaled": ("sigma_prime", lambda value, t: value * 1.001),
    "sigma' negative": ("sigma_prime", lambda value, t: -value),
    "inverse shifted": ("time", lambda value, t: value + 1e-8),
    "inverse reversed": ("time", lambda value, t: 1 - value),
    "single precision": ("log_snr", lambda value, t: value.float().double()),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_mutants_are_made_from_is_right(name: str) -> None:
    check(Wrong(SCHEDULES[name], "nothing", lambda value, t: value))


# A derivative that is zero everywhere stays so, however scaled.
EQUIVALENT = {("VE", "alpha' scaled"), ("VE narrow", "alpha' scaled")}


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [(n, s) for n in SCHEDULES for s in SPOILT if (n, s) not in EQUIVALENT],
)
def test_mutants_are_seen(name: str, spoilt: str) -> None:
    with pytest.raises(AssertionError):
        check(Wrong(SCHEDULES[name], *SPOILT[spoilt]))


def _precisely(name: str, t: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """(alpha, sigma) from the definitions, in 60 digits."""
    with mpmath.workdps(60):
        x = mpmath.mpf(t)
        if name == "VP":
            integral = x * mpmath.mpf(0.1) + x * x * (mpmath.mpf(20) - mpmath.mpf(0.1)) / 2
            return mpmath.exp(-integral / 2), mpmath.sqrt(1 - mpmath.exp(-integral))
        if name == "VE":
            low, high = mpmath.mpf(0.002), mpmath.mpf(80)
            return mpmath.mpf(1), low * (high / low) ** x
        if name == "Cosine":
            return mpmath.cos(mpmath.pi * x / 2), mpmath.sin(mpmath.pi * x / 2)
        return 1 - x, x


@pytest.mark.parametrize("name", ["VP", "Cosine", "VE", "Linear"])
@given(t=st.floats(1e-12, 1 - 1e-12))
def test_levels_are_right_to_the_last_digits(name: str, t: float) -> None:
    schedule = SCHEDULES[name]
    alpha, sigma = _precisely(name, t)
    with mpmath.workdps(60):
        log_snr = float(2 * mpmath.log(alpha / sigma))
    assert schedule.alpha(t).item() == pytest.approx(float(alpha), rel=1e-13, abs=0)
    assert schedule.sigma(t).item() == pytest.approx(float(sigma), rel=1e-13, abs=0)
    assert schedule.log_snr(t).item() == pytest.approx(log_snr, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@given(t=st.floats(0, 1))
def test_times_come_back(name: str, t: float) -> None:
    schedule = SCHEDULES[name]
    assert schedule.time(schedule.log_snr(t)).item() == pytest.approx(t, abs=1e-12, rel=1e-9)


INFINITE = {
    "VP": (math.inf, None),
    "VP slow": (math.inf, None),
    "Cosine": (math.inf, -math.inf),
    "VE": (-2 * math.log(0.002), -2 * math.log(80)),
    "VE narrow": (-2 * math.log(0.1), -2 * math.log(3)),
    "Linear": (math.inf, -math.inf),
    **dict.fromkeys((f"Betas {name}" for name in TABLES), (math.inf, None)),
    "Betas zero terminal": (math.inf, -math.inf),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ends_are_exact(name: str) -> None:
    schedule = SCHEDULES[name]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    clean, noisy = INFINITE[name]
    log_snr = schedule.log_snr(ends)
    assert log_snr[0].item() == clean
    if noisy is not None:
        assert log_snr[1].item() == noisy
    if log_snr[0] == math.inf:
        assert (schedule.alpha(0.0), schedule.sigma(0.0)) == (1, 0)
    if log_snr[1] == -math.inf:
        assert (schedule.alpha(1.0), schedule.sigma(1.0)) == (0, 1)
    torch.testing.assert_close(schedule.time(log_snr), ends, rtol=0, atol=1e-15)
    for derivative in (schedule.alpha_prime(ends), schedule.sigma_prime(ends)):
        assert not bool(derivative.isnan().any())


@pytest.mark.parametrize(
    ("name", "at_data", "at_noise"),
    [
        ("VP", (-0.05, math.inf), None),
        ("Cosine", (0.0, math.pi / 2), (-math.pi / 2, 0.0)),
        ("VE", (0.0, 0.002 * math.log(4e4)), (0.0, 80 * math.log(4e4))),
        ("Linear", (-1.0, 1.0), (-1.0, 1.0)),
    ],
)
def test_slopes_at_the_ends(
    name: str, at_data: tuple[float, float], at_noise: tuple[float, float] | None
) -> None:
    schedule = SCHEDULES[name]
    for t, slopes in ((0.0, at_data), (1.0, at_noise)):
        if slopes is not None:
            assert schedule.alpha_prime(t).item() == pytest.approx(slopes[0], abs=1e-15)
            assert schedule.sigma_prime(t).item() == pytest.approx(slopes[1], abs=1e-12)


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_reverse_mode_is_finite_where_the_slope_is(name: str, end: float) -> None:
    """No unused branch of a formula poisons the gradient."""
    schedule = SCHEDULES[name]
    t = torch.tensor([end], dtype=torch.float64)
    for function, derivative in (
        (schedule.alpha, schedule.alpha_prime(t)),
        (schedule.sigma, schedule.sigma_prime(t)),
        (schedule.log_snr, 2 * (_rate(schedule, "alpha", t) - _rate(schedule, "sigma", t))),
    ):
        if bool(torch.isfinite(derivative)):
            torch.testing.assert_close(reverse_mode(function, t), derivative)


def _rate(schedule: Schedule, what: str, t: Tensor) -> Tensor:
    return getattr(schedule, f"{what}_prime")(t) / getattr(schedule, what)(t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_file_says_is_the_same_schedule(name: str) -> None:
    schedule = SCHEDULES[name]
    again = ef.schedules.from_config(schedule.config())
    assert again == schedule and hash(again) == hash(schedule)
    assert torch.equal(again.log_snr(INNER), schedule.log_snr(INNER))
