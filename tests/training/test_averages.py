from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate

from ebbflow.training import PowerAverage, power_exponent, reconstruct
from ebbflow.training.averages import _inner


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_has_the_asked_width(sigma_rel: float) -> None:
    gamma = power_exponent(sigma_rel)
    mean = (gamma + 1) / (gamma + 2)
    square = (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_a_width_out_of_range_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=str(sigma_rel)):
        power_exponent(sigma_rel)


def test_the_weight_of_each_step_is_the_integral_of_the_power() -> None:
    average = PowerAverage(0.1, [torch.zeros(30, dtype=torch.float64)])
    for step in range(1, 31):
        average.update([torch.eye(30, dtype=torch.float64)[step - 1]], step)
    edges = (torch.arange(31, dtype=torch.float64) / 30) ** (average.exponent + 1)
    assert torch.allclose(average.tensors[0], edges.diff(), atol=1e-14)


@pytest.mark.parametrize("late", [5.0, 2.0])
def test_inner_products_are_integrals(late: float) -> None:
    def profile(s: float, at: float, gamma: float) -> float:
        return (gamma + 1) * s**gamma / at ** (gamma + 1) if s <= at else 0.0

    a, b = (3.0, 4.0), (late, 9.0)
    expected, _ = integrate.quad(lambda s: profile(s, *a) * profile(s, *b), 0, min(3.0, late))
    assert _inner(*a, *b) == pytest.approx(expected, rel=1e-9)
    assert _inner(*b, *a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.1, 0.15])
def test_reconstruction_is_near_the_average_that_was_tracked(sigma_rel: float) -> None:
    steps, every = 1000, 50
    walk = torch.randn(steps, 500, dtype=torch.float64).cumsum(0)
    tracked = [PowerAverage(width, [walk[0]]) for width in (0.05, 0.1, sigma_rel)]
    snapshots = {}
    for step in range(1, steps + 1):
        for average in tracked:
            average.update([walk[step - 1]], step)
        if step % every == 0:
            for average in tracked[:2]:
                snapshots[step, average.sigma_rel] = average.tensors[0].clone()
    shares = reconstruct(list(snapshots), steps, sigma_rel)
    combined = torch.einsum("k,kd->d", shares, torch.stack(list(snapshots.values())))
    error = (combined - tracked[2].tensors[0]).norm()
    assert error < 0.02 * (walk[-1] - tracked[2].tensors[0]).norm()
    assert float(shares.sum()) == pytest.approx(1, abs=1e-9)


def test_a_snapshot_of_the_asked_width_is_returned_as_it_is() -> None:
    shares = reconstruct([(100, 0.05), (100, 0.1), (200, 0.05), (200, 0.1)], 200, 0.1)
    assert torch.allclose(shares, torch.tensor([0.0, 0, 0, 1]).double(), atol=1e-8)


def test_snapshots_later_than_the_end_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="later than step 50"):
        reconstruct([(100, 0.05)], 50, 0.1)
    with pytest.raises(ValueError, match="no snapshots"):
        reconstruct([], 50, 0.1)
