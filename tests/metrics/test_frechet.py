"""The Fréchet distance against closed forms, an independent root, and its own laws."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ebbflow.metrics import Moments, frechet_distance, gaussian_frechet_distance


def random_covariance(dimension: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimension, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T / rank


def by_scipy(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor) -> float:
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy())
    return float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * root.trace().real)


def test_commuting_covariances_have_the_elementary_form() -> None:
    rotation = torch.linalg.qr(random_covariance(6, 6, 0)).Q
    a = torch.tensor([0.1, 1.0, 2.0, 5.0, 0.0, 3.0], dtype=torch.float64)
    b = torch.tensor([4.0, 1.0, 0.5, 0.0, 0.0, 3.5], dtype=torch.float64)
    mean_a = torch.arange(6, dtype=torch.float64)
    expected = float(mean_a.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    value = gaussian_frechet_distance(
        mean_a,
        rotation @ a.diag() @ rotation.T,
        torch.zeros(6),
        rotation @ b.diag() @ rotation.T,
    )
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dimension", [2, 7, 40])
def test_covariances_that_do_not_commute_agree_with_scipy(dimension: int) -> None:
    a = random_covariance(dimension, 2 * dimension, 1)
    b = random_covariance(dimension, 2 * dimension, 2)
    assert not torch.allclose(a @ b, b @ a)
    mean_a, mean_b = torch.randn(2, dimension, dtype=torch.float64)
    value = gaussian_frechet_distance(mean_a, a, mean_b, b)
    assert value == pytest.approx(by_scipy(mean_a, a, mean_b, b), rel=1e-9)


def test_fewer_samples_than_features_are_exact() -> None:
    """tr sqrt(A B) is the nuclear norm of X Yᵀ, which needs no covariance and no root at all."""
    x, y = torch.randn(9, 60, dtype=torch.float64), torch.randn(14, 60, dtype=torch.float64) * 2
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    nuclear = torch.linalg.matrix_norm(centred_x @ centred_y.T, "nuc") / math.sqrt(8 * 13)
    trace = centred_x.square().sum() / 8 + centred_y.square().sum() / 13
    expected = float((x.mean(0) - y.mean(0)).square().sum() + trace - 2 * nuclear)
    assert frechet_distance(x, y, allow_few=True) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(x, x, allow_few=True) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shifted_set_is_at_the_squared_shift(dtype: torch.dtype) -> None:
    x = torch.randn(300, 10, dtype=dtype)
    shift = torch.linspace(-1, 1, 10, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = float(shift.square().sum())
    assert frechet_distance(x, x + shift) == pytest.approx(expected, rel=tolerance)


def test_a_scaled_set_is_at_the_scaled_spread() -> None:
    x = torch.randn(300, 10, dtype=torch.float64)
    expected = float(x.var(0).sum() + 4 * x.mean(0).square().sum() / 4)
    assert frechet_distance(x, 2 * x) == pytest.approx(expected, rel=1e-12)


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 49), max_size=4))
def test_streamed_moments_equal_the_batch(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 100 + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    parts = [part for part in x.tensor_split(sorted(cuts)) if len(part)]
    shuffled = [parts[i] for i in torch.randperm(len(parts), generator=generator)]
    merged = Moments.stream(shuffled)
    assert merged.count == 50
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.covariance, x.T.cov(), rtol=1e-9, atol=1e-12)
    assert frechet_distance(merged, x) < 1e-9


@given(seed=st.integers(0, 2**31))
def test_symmetric_and_blind_to_order_and_rotation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 30, 5, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    value = frechet_distance(x, y)
    order = torch.randperm(30, generator=generator)
    assert frechet_distance(y, x[order]) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-10)


def test_too_few_samples_are_refused_with_the_numbers() -> None:
    x, y = torch.randn(40, 16), torch.randn(15, 16)
    with pytest.raises(ValueError, match=r"15 samples are fewer than the 16 features.*at least 16"):
        frechet_distance(x, y)
    assert frechet_distance(x, y, allow_few=True) > 0
    assert frechet_distance(x, x[:16]) > 0


def test_sets_that_cannot_be_compared_are_refused() -> None:
    x = torch.randn(40, 3)
    with pytest.raises(ValueError, match="3 and 4 features"):
        frechet_distance(x, torch.randn(40, 4))
    with pytest.raises(ValueError, match=r"shape \(n, d\).*int64"):
        frechet_distance(x, torch.ones(40, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(40, 1, 2, 2\).*flatten"):
        frechet_distance(x, torch.randn(40, 1, 2, 2))
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of the 40 vectors"):
        frechet_distance(x, torch.randn(40, 3))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(torch.randn(40, 3), torch.randn(1, 3), allow_few=True)
