"""Sliced Wasserstein and energy distances against exact values on a line and double loops."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.metrics import _vectors, energy_distance, sliced_wasserstein


@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_on_a_line_sliced_is_exact_for_any_counts(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    y = 2 * torch.randn(m, 1, generator=generator, dtype=torch.float64) + 1
    expected = scipy.stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    found = sliced_wasserstein(x, y, p=1.0, projections=3, seed=seed)
    assert found == pytest.approx(expected, rel=1e-11)
    common = math.lcm(n, m)  # repeated to equal counts, sorted points are coupled in order
    repeated_x = x.repeat_interleave(common // n, 0).sort(0).values
    repeated_y = y.repeat_interleave(common // m, 0).sort(0).values
    squared = float((repeated_x - repeated_y).square().mean())
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(math.sqrt(squared), rel=1e-11)


def test_shifted_and_scaled_gaussians() -> None:
    """W2² of N(u·a, s²) and N(u·b, r²) is (u·(a - b))² + (s - r)², |a - b|²/d on average over u."""
    shift = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0])
    x = 0.5 * torch.randn(6_000, 5) + shift
    y = 2.0 * torch.randn(4_000, 5)
    expected = math.sqrt(float(shift.square().sum()) / 5 + 1.5**2)
    found = sliced_wasserstein(x, y, projections=1000)
    # The directions' own error: the deviation of (u·a)² is below |a|² sqrt(2)/d.
    assert found == pytest.approx(expected, rel=0.03)


def test_a_shift_alone_is_exact_on_every_direction() -> None:
    x = torch.randn(100, 1, dtype=torch.float64) @ torch.ones(1, 2, dtype=torch.float64)
    whole_circle = sliced_wasserstein(x, x + 2.0, projections=4000)
    assert whole_circle == pytest.approx(2.0, rel=0.03)
    assert sliced_wasserstein(x, x.flip(0)) == 0.0
    assert sliced_wasserstein(x, x + 2, seed=0) != sliced_wasserstein(x, x + 2, seed=1)
    assert sliced_wasserstein(x, x + 2, seed=3) == sliced_wasserstein(x, x + 2, seed=3)


def test_energy_is_the_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vectors, "BLOCK", 30)
    x = torch.randn(9, 3, dtype=torch.float64)
    y = torch.randn(12, 3, dtype=torch.float64) + 0.4
    between = sum(float((a - b).norm()) for a in x for b in y) / (9 * 12)
    sum_x = sum(float((a - b).norm()) for a in x for b in x)
    sum_y = sum(float((a - b).norm()) for a in y for b in y)
    unbiased = 2 * between - sum_x / (9 * 8) - sum_y / (12 * 11)
    biased = 2 * between - sum_x / 81 - sum_y / 144
    assert energy_distance(x, y) == pytest.approx(unbiased, rel=1e-12)
    assert energy_distance(x, y, unbiased=False) == pytest.approx(biased, rel=1e-12)


def test_energy_on_a_line_agrees_with_scipy() -> None:
    """scipy integrates the squared difference of the distribution functions, and takes the root."""
    x, y = torch.randn(40, dtype=torch.float64), torch.rand(31, dtype=torch.float64)
    expected = scipy.stats.energy_distance(x.numpy(), y.numpy()) ** 2
    found = energy_distance(x[:, None], y[:, None], unbiased=False)
    assert found == pytest.approx(expected, rel=1e-11)


def test_energy_has_no_bias_for_equal_laws() -> None:
    values = torch.tensor([energy_distance(*torch.randn(2, 30, 3)) for _ in range(300)])
    z = values.mean() / (values.std() / math.sqrt(len(values)))
    assert abs(z) < 3.5
    assert energy_distance(*torch.randn(2, 30, 3), unbiased=False) >= 0


@given(seed=st.integers(0, 2**31), block=st.integers(100, 2000))
def test_energy_is_blind_to_order_and_blocks(seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 25, 3, generator=generator, dtype=torch.float64)
    expected = energy_distance(x, y + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_vectors, "BLOCK", block)
        order = torch.randperm(25, generator=generator)
        assert energy_distance(y[order] + 1, x) == pytest.approx(expected, rel=1e-11)
