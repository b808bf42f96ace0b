"""The kernel distance against double loops and the closed form of polynomial moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebbflow.metrics import kernel_distance


def kernel(a: Tensor, b: Tensor) -> float:
    return (float(a @ b) / len(a) + 1) ** 3


def by_loops(x: Tensor, y: Tensor) -> float:
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    between = sum(kernel(a, b) for a in x for b in y)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)


def test_one_block_is_the_double_loop() -> None:
    x, y = torch.randn(7, 3, dtype=torch.float64), 1 + torch.randn(5, 3, dtype=torch.float64)
    value, error = kernel_distance(x, y, blocks=1)
    assert value == pytest.approx(by_loops(x, y), rel=1e-12)
    assert math.isnan(error)


def test_one_block_is_blind_to_order_and_seed() -> None:
    x, y = torch.randn(2, 20, 3, dtype=torch.float64)
    value = kernel_distance(x, y, blocks=1).value
    other = kernel_distance(x[torch.randperm(20)], y, blocks=1, seed=5).value
    assert other == pytest.approx(value, rel=1e-11)


def test_no_bias_and_an_honest_error_for_equal_laws() -> None:
    x, y = torch.randn(300, 40, 4), torch.randn(300, 60, 4)
    estimates = [kernel_distance(a, b, blocks=10) for a, b in zip(x, y, strict=True)]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    z = values.mean() / (values.std() / math.sqrt(len(values)))
    assert abs(z) < 3.5
    stated = torch.tensor([e.standard_error for e in estimates]).square().mean().sqrt()
    assert 0.8 < float(stated / values.std()) < 1.25


def test_no_bias_for_shifted_gaussians() -> None:
    """On a line, MMD² under (x y + 1)³ is sum_j binomial(3, j) (E X^j - E Y^j)²."""
    mu = 0.7
    moments = [1.0, mu, 1 + mu**2, 3 * mu + mu**3]
    standard = [1.0, 0.0, 1.0, 0.0]
    binomial = [1, 3, 3, 1]
    expected = sum(c * (a - b) ** 2 for c, a, b in zip(binomial, moments, standard, strict=True))
    x, y = mu + torch.randn(400, 60, 1), torch.randn(400, 60, 1)
    values = torch.tensor(
        [kernel_distance(a, b).value for a, b in zip(x, y, strict=True)], dtype=torch.float64
    )
    z = (values.mean() - expected) / (values.std() / math.sqrt(len(values)))
    assert abs(z) < 3.5


def test_impossible_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"11 blocks.*between 1 and 10"):
        kernel_distance(torch.randn(20, 2), torch.randn(40, 2), blocks=11)
    with pytest.raises(ValueError, match="0 blocks"):
        kernel_distance(torch.randn(20, 2), torch.randn(40, 2), blocks=0)
    with pytest.raises(ValueError, match="of 2 and of 3 numbers"):
        kernel_distance(torch.randn(20, 2), torch.randn(40, 3))
