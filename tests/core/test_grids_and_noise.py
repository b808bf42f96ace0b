"""Grids by their formulas, noise by its counters, schedules by their errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import ebbflow as ef
from ebbflow import grids, noise
from ebbflow.schedules import VE, VP, Betas, Cosine, Linear, Schedule
from tests.laws.test_schedules import SCHEDULES

GRIDS = {
    "uniform": grids.uniform,
    "angle": grids.angle,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "shifted": grids.shifted,
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_run_from_noise_to_data(schedule: str, grid: str) -> None:
    for steps in (1, 2, 3, 4, 17, 1000):
        times = GRIDS[grid](SCHEDULES[schedule], steps)
        assert len(times) == steps + 1 and (times[0], times[-1]) == (1.0, 0.0)
        assert all(isinstance(t, float) for t in times)
        assert all(b < a for a, b in itertools.pairwise(times))


def ratios(schedule: Schedule, times: Any) -> np.ndarray:
    return np.exp(-0.5 * schedule.log_snr(torch.tensor(times, dtype=torch.float64)).numpy())


def test_grids_by_their_formulas() -> None:
    """On VE, where sigma/alpha spans exactly 0.002 to 80 and no step is added at an end."""
    n, i = 12, np.arange(13)
    ve = ratios(VE(), grids.karras(VE(), n))
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    np.testing.assert_allclose(ve, (high + i / n * (low - high)) ** 7, rtol=1e-9)
    even = ratios(VE(), grids.log_snr(VE(), n))
    np.testing.assert_allclose(even, 80 * (0.002 / 80) ** (i / n), rtol=1e-9)
    np.testing.assert_allclose(grids.uniform(VE(), n), 1 - i / n, rtol=1e-15)
    angles = np.arctan(ratios(VP(), grids.angle(VP(), n)))
    np.testing.assert_allclose(np.diff(angles), np.diff(angles)[0], rtol=1e-9)
    np.testing.assert_allclose(grids.angle(Cosine(), n), 1 - i / n, atol=1e-12)
    shifted = np.array(grids.shifted(Linear(), n, 3.0))
    t = 1 - i / n
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t), rtol=1e-15)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_infinite_ends_take_a_step_each(schedule: Schedule) -> None:
    """Between them the formula runs from 80 to 0.002 over the steps that are left."""
    for grid, power in ((grids.karras, 1 / 7), (grids.log_snr, None)):
        inner = ratios(schedule, grid(schedule, 12)[1:-1])
        spaced = np.log(inner) if power is None else inner**power
        np.testing.assert_allclose(np.diff(spaced), np.diff(spaced)[0], rtol=1e-7)
        assert (inner[0], inner[-1]) == (pytest.approx(80), pytest.approx(0.002))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3", None])
def test_bad_steps_are_refused(grid: str, steps: Any) -> None:
    with pytest.raises(ValueError, match="integer of at least 1, got"):
        GRIDS[grid](VP(), steps)


def test_bad_parameters_of_grids_are_refused() -> None:
    for bad in ({"rho": 0.0}, {"rho": -7.0}):
        with pytest.raises(ValueError, match="rho must be positive"):
            grids.karras(VP(), 5, **bad)
    for low, high in ((0.0, 80.0), (-1.0, 80.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max"):
            grids.log_snr(VP(), 5, low, high)
    with pytest.raises(ValueError, match="shift must be positive"):
        grids.shifted(VP(), 5, 0.0)


@given(times=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_given_nodes_are_kept_or_refused(times: list[float]) -> None:
    falling = all(b < a for a, b in itertools.pairwise(times))
    rising = all(b > a for a, b in itertools.pairwise(times))
    if falling or rising:
        assert grids.given(times) == tuple(times)
    else:
        with pytest.raises(ValueError, match=r"times\[\d\] = .* after times\[\d\]"):
            grids.given(times)


def test_noise_is_standard_normal_and_independent() -> None:
    z = noise.normal(3, range(300), 1, (4, 5), torch.float64)
    assert z.shape == (300, 4, 5)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    others = [
        noise.normal(4, range(300), 1, (4, 5), torch.float64),
        noise.normal(3, range(300), 2, (4, 5), torch.float64),
        noise.normal(3, range(300, 600), 1, (4, 5), torch.float64),
        noise.normal(3, range(300), 1, (4, 5), torch.float64, stream=1),
    ]
    for other in [*others, z.roll(1, 0), z.roll(1, 1), z.roll(1, 2)]:
        correlation = (z * other).mean().item()
        assert abs(correlation) < 4.5 / math.sqrt(z.numel())


@given(
    seed=st.integers(0, 2**64 - 1),
    indices=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    step=st.integers(0, 1000),
)
def test_noise_depends_on_its_counter_only(seed: int, indices: list[int], step: int) -> None:
    together = noise.normal(seed, indices, step, (3,))
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, noise.normal(seed, [index], step, (3,))[0])


def test_noise_is_the_counters_of_philox() -> None:
    """Key (seed, index), counter (0, 0, stream, step): anyone can draw it again."""
    bits = np.random.Philox(key=[9, 337], counter=[0, 0, 2, 5])
    expected = np.random.Generator(bits).standard_normal((2, 3))
    found = noise.normal(9, [337], 5, (2, 3), torch.float64, stream=2)[0]
    np.testing.assert_array_equal(found, expected)


def test_every_precision_sees_the_same_noise() -> None:
    exact = noise.normal(0, range(50), 0, (7,), torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(noise.normal(0, range(50), 0, (7,), dtype), exact.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, [0], 0), "seed"),
        ((2**64, [0], 0), "seed"),
        ((1.0, [0], 0), "seed"),
        ((True, [0], 0), "seed"),
        ((0, [-1], 0), "sample index"),
        ((0, [0.5], 0), "sample index"),
        ((0, [0], -1), "step"),
        ((0, [0], 2**64), "step"),
    ],
)
def test_bad_counters_are_refused(arguments: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be an integer in \[0, 2\^64\), got"):
        noise.normal(*arguments, (2,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(0.0, 20.0), "0 < beta_min <= beta_max"),
        (lambda: VP(2.0, 1.0), "0 < beta_min <= beta_max"),
        (lambda: VP(math.nan, 20.0), "0 < beta_min"),
        (lambda: VP(0.1, math.inf), "0 < beta_min"),
        (lambda: VE(0.0, 80.0), "0 < sigma_min < sigma_max"),
        (lambda: VE(80.0, 0.002), r"sigma_min 80\.0, sigma_max 0\.002"),
        (lambda: Betas([]), "betas is empty"),
        (lambda: Betas([0.1, 0.0]), r"betas\[1\] = 0\.0"),
        (lambda: Betas([0.1, 1.0, 0.1]), r"betas\[1\] = 1\.0"),
        (lambda: Betas([0.1, 3.0]), r"betas\[1\] = 3\.0: every beta lies in \(0, 1\)"),
        (lambda: Betas([0.1, math.nan]), r"betas\[1\] = nan"),
        (lambda: ef.schedules.from_config({"name": "VPP"}), "unknown schedule .*known: VP, Cosine"),
        (lambda: ef.schedules.from_config({"name": "VE", "sigma": 1}), "did you mean 'sigma_m"),
        (lambda: VE().time(100.0), "log-SNR 100 is not reached: VE spans -8.76"),
        (lambda: VP().time(-11.0), "log-SNR -11 is not reached: VP spans -10.05"),
        (lambda: VP().time(math.nan), "log-SNR nan is not reached"),
    ],
)
def test_bad_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_values() -> None:
    """Equal settings are equal, usable as keys, and cannot be changed."""
    assert VP() == VP(0.1, 20.0) != VP(0.1, 19.0) and VP() != Cosine()
    assert len({VP(), VP(), Betas([0.1]), Betas([0.1]), Betas([0.2])}) == 3
    with pytest.raises(AttributeError):
        VP().beta_min = 1.0  # pyright: ignore


def test_noise_is_added_in_the_datas_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x0, eps = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
        found = VP().add_noise(x0, 0.5, eps)
        assert found.dtype == dtype
        torch.testing.assert_close(found[0, 0], VP().alpha(0.5).to(dtype))
