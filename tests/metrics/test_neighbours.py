"""Precision, recall, density and coverage against double loops, at their limits and means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ebbflow.metrics import _vectors, density_coverage, precision_recall


def radius(x: Tensor, i: int, k: int) -> float:
    others = sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)
    return others[k - 1]


def by_loops(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    n, m = len(real), len(fake)
    in_real = [
        [float((real[i] - fake[j]).norm()) <= radius(real, i, k) for j in range(m)]
        for i in range(n)
    ]
    in_fake = [
        [float((real[i] - fake[j]).norm()) <= radius(fake, j, k) for j in range(m)]
        for i in range(n)
    ]
    precision = sum(any(in_real[i][j] for i in range(n)) for j in range(m)) / m
    recall = sum(any(row) for row in in_fake) / n
    density = sum(sum(row) for row in in_real) / (k * m)
    coverage = sum(any(row) for row in in_real) / n
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_double_loops_on_small_sets(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vectors, "BLOCK", 50)  # several blocks of rows, the last one shorter
    real = torch.randn(11, 2, dtype=torch.float64)
    fake = 0.5 + 0.7 * torch.randn(13, 2, dtype=torch.float64)
    expected = by_loops(real, fake, k)
    assert precision_recall(real, fake, neighbours=k) == pytest.approx(expected[:2])
    assert density_coverage(real, fake, neighbours=k) == pytest.approx(expected[2:])
    assert 0 < expected[0] < 1 or 0 < expected[1] < 1


def test_a_set_against_itself() -> None:
    """Every ball holds its centre and k neighbours: the density is (k + 1) / k."""
    x = torch.randn(200, 4)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert density_coverage(x, x, neighbours=5) == pytest.approx((6 / 5, 1.0))


def test_repeated_points_lie_in_their_own_ball_of_radius_zero() -> None:
    x = torch.randn(10, 64).repeat(8, 1)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert density_coverage(x, x).coverage == 1.0


def test_disjoint_sets() -> None:
    x = torch.randn(100, 4)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    assert density_coverage(x, x + 100) == (0.0, 0.0)


def test_density_can_exceed_one() -> None:
    """Three balls of radius 1 at -1, 0 and 1 all hold the point 0."""
    real, fake = torch.tensor([[-1.0], [0.0], [1.0]]), torch.zeros(2, 1)
    assert density_coverage(real, fake, neighbours=1) == (3.0, 1.0)


def test_dropped_modes_lower_recall_and_coverage_only() -> None:
    real = torch.cat([torch.randn(200, 3), 50 + torch.randn(200, 3)])
    fake = 0.5 * torch.randn(300, 3)
    assert density_coverage(real, fake).density > 0.8
    assert density_coverage(real, fake).coverage <= 0.5
    assert precision_recall(real, fake).precision > 0.95
    assert precision_recall(real, fake).recall <= 0.5


def test_means_for_equal_laws() -> None:
    """A new point falls among the k nearest of n with chance k/n; Naeem et al. give the coverage.

    E density = 1 and E coverage = 1 - prod (n - 1 - i)/(n + m - 1 - i), i < k, in any dimension.
    """
    n, m, k = 60, 80, 3
    draws = [
        density_coverage(torch.randn(n, 3), torch.randn(m, 3), neighbours=k) for _ in range(300)
    ]
    values = torch.tensor(draws, dtype=torch.float64)
    missed = math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    expected = torch.tensor([1.0, 1 - missed], dtype=torch.float64)
    z = (values.mean(0) - expected) / (values.std(0) / math.sqrt(len(values)))
    assert z.abs().max() < 3.5


@given(seed=st.integers(0, 2**31), block=st.integers(100, 2000))
def test_blind_to_order_and_blocks(seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, 30, 3, generator=generator)
    expected = (*precision_recall(real, fake), *density_coverage(real, fake))
    real = real[torch.randperm(30, generator=generator)]
    fake = fake[torch.randperm(30, generator=generator)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_vectors, "BLOCK", block)
        found = (*precision_recall(real, fake), *density_coverage(real, fake))
    assert found == pytest.approx(expected, rel=1e-12)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="the second set holds 5 vectors, at least 6"):
        density_coverage(torch.randn(20, 2), torch.randn(5, 2), neighbours=5)
