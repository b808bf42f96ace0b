"""Diagnostics against closed forms: of linear fields, point masses, Gaussians and mixtures.

Mutants that these tests kill: pairs of a probe with itself; |J| of the symmetric part; the rule's
ends counted whole; a triangle that is not closed; the mean score with one sign of the noise or
without the scatter taken off; alpha in place of alpha² in the gap; dz/ds with a sign flipped; the
chord over the wrong share; turning by the cosine's first order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.diagnostics import asymmetry, circulation, mean_score, paths, prior_gap
from ebbflow.diagnostics.conservative import clenshaw_curtis, noisy
from ebbflow.likelihood.angle import AngleFlow
from tests.likelihood.test_log_likelihood import law

SCHEDULES = [ef.schedules.VP(), ef.schedules.VE(), ef.schedules.Linear()]


def names(schedule: object) -> str:
    return type(schedule).__name__


def linear(matrix: Tensor) -> ef.Denoiser:
    """A noise prediction that is `matrix x`."""
    return ef.Denoiser(lambda x, t: x @ matrix.T.to(x.dtype), ef.schedules.Cosine(), "noise")


def matrix(d: int = 4) -> Tensor:
    return torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_score_of_a_law_is_a_gradient(schedule: Any) -> None:
    data = law(3)
    x0 = data.sample(16, 0)
    denoiser = data.denoiser(schedule)
    for t in (0.3, 0.7):
        assert asymmetry(denoiser, x0, t).value < 1e-10
        around, error = circulation(denoiser, x0, t, nodes=33)
        assert around < 2e-3
        # The rule's own estimate says when a side is too hard for it.
        assert around < 10 * error + 1e-12


def test_asymmetry_of_a_matrix() -> None:
    m = matrix()
    expected = ((m - m.T).norm() / m.norm()).item()
    x0 = torch.zeros(4000, 4, dtype=torch.float64)
    found, error = asymmetry(linear(m), x0, 0.5)
    assert abs(found - expected) < 4 * error
    assert error < 0.03
    skew, _ = asymmetry(linear(m - m.T), x0, 0.5)
    assert abs(skew - 2) < 0.06
    assert asymmetry(linear(m + m.T), x0, 0.5).value < 1e-12


def test_circulation_of_a_linear_field() -> None:
    m = matrix()
    x0 = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    corners = [noisy(linear(m), x0, 0.4, 0, draw) for draw in (0, 1, 2)]
    a, b = corners[1] - corners[0], corners[2] - corners[0]
    # Stokes: half of bᵀ (M - Mᵀ) a.
    exact = 0.5 * torch.einsum("bi,ij,bj->b", b, m - m.T, a)
    length = torch.zeros(8, dtype=torch.float64)
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for k in range(3):
        side = corners[(k + 1) % 3] - corners[k]
        points = corners[k] + share[:, None, None] * side
        length += (points @ m.T).norm(dim=2).mean(0) * side.norm(dim=1)
    found, error = circulation(linear(m), x0, 0.4)
    expected = (exact.square().mean().sqrt() / length.mean()).item()
    assert found == pytest.approx(expected, rel=1e-2)
    assert error < 1e-12


def test_the_rule_is_exact_for_polynomials_and_nested() -> None:
    places, weights = clenshaw_curtis(9)
    for power in range(10):
        assert (weights * places**power).sum().item() == pytest.approx(1 / (power + 1), abs=1e-14)
    torch.testing.assert_close(places[::2], clenshaw_curtis(5)[0])


def test_a_rotation_leaves_the_law_and_is_found() -> None:
    """K C⁻¹ (x - m) with K antisymmetric is no gradient, though the density stays."""
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    schedule = ef.schedules.Linear()
    data = ef.oracles.GaussianMixture(torch.zeros(1, 2), covariance[None], torch.ones(1))
    exact = data.denoiser(schedule)
    k = torch.tensor([[0.0, 0.4], [-0.4, 0.0]], dtype=torch.float64)

    def turned(x: Tensor, t: Tensor) -> Tensor:
        sigma = schedule.sigma(t)[:, None].to(x)
        alpha = schedule.alpha(t)[:, None].to(x)
        total = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(2)
        around = torch.linalg.solve(total, x[..., None])[..., 0] @ k.T
        return exact(x, t) + alpha * sigma**2 * around

    wrong = ef.Denoiser(
        turned, schedule, statistics=ef.Statistics.exact(data.mean, data.covariance)
    )
    x0 = data.sample(32, 0)
    assert asymmetry(wrong, x0, 0.5).value > 0.05
    assert circulation(wrong, x0, 0.5).value > 0.01
    likely, _ = ef.log_likelihood(wrong, x0, divergence="exact")
    torch.testing.assert_close(likely, data.log_prob(x0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_mean_score_is_that_of_a_shift(schedule: Any) -> None:
    data = law(2)
    exact = data.denoiser(schedule)
    x0 = data.sample(4000, 1)
    t = schedule.time(0.0).item()  # alpha = sigma
    fair = mean_score(exact, x0, t)
    # A mean of three squares of unit variance, 5 deviations.
    assert fair.ratio < 1 + 5 * math.sqrt(2 / 3)
    shift = torch.tensor([0.3, 0.0, -0.1], dtype=torch.float64)
    shifted = ef.Denoiser(lambda x, t: exact(x, t) + shift, schedule)
    wrong = mean_score(shifted, x0, t)
    assert wrong.value == pytest.approx(shift.square().mean().sqrt().item(), rel=0.1)
    assert wrong.ratio > 20
    assert wrong.error > fair.error


def test_the_prior_gap_is_the_divergence_of_gaussians() -> None:
    data = law(1)
    statistics = ef.Statistics.exact(data.mean, data.covariance)
    alpha, sigma = 0.3, 0.9
    covariance = alpha**2 * data.covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    exact = torch.distributions.kl_divergence(
        normal(alpha * data.mean, covariance),
        normal(torch.zeros(3).double(), sigma**2 * torch.eye(3).double()),
    )
    assert prior_gap(statistics, alpha, sigma) == pytest.approx(exact.item(), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_paths_of_a_point_are_straight(schedule: Any) -> None:
    denoiser = ef.Denoiser(
        lambda x, t: torch.tensor([0.5, -1.0], dtype=x.dtype).expand(x.shape), schedule, shape=(2,)
    )
    x1 = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = paths(AngleFlow.of(denoiser, x1, 1e-2, 1.0), x1, {}, rtol=1e-7)
    assert found.straightness.max() < 1e-8
    assert (found.length - 1).abs().max() < 1e-6
    assert found.turning.max() < 1e-4


def test_paths_of_a_gaussian_have_their_closed_form() -> None:
    """z = m (1 - s) + z_1 sqrt((1 - s)² v + s²): two variances bend the path."""
    v = torch.tensor([0.04, 4.0], dtype=torch.float64)
    data = ef.oracles.GaussianMixture(torch.zeros(1, 2), torch.diag(v)[None], torch.ones(1))
    flow = AngleFlow.of(data.denoiser(ef.schedules.Linear()), torch.zeros(1, 2).double(), 1e-3, 1.0)
    x1 = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    found = paths(flow, x1, {}, pieces=256, rtol=1e-8)
    s = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    z = x1[:, None] * torch.sqrt((1 - s[:, None]) ** 2 * v + s[:, None] ** 2)
    pieces = z.diff(dim=1)
    chord = z[:, -1] - z[:, 0]
    step = s[1] - s[0]
    apart = (pieces / step - chord[:, None] / (1 - 1e-3)).square().sum(2).mean(1)
    expected = apart / (chord / (1 - 1e-3)).square().sum(1)
    torch.testing.assert_close(found.straightness, expected, atol=1e-4, rtol=1e-3)
    length = pieces.norm(dim=2).sum(1) / chord.norm(dim=1)
    torch.testing.assert_close(found.length, length, atol=1e-4, rtol=1e-3)
    angle = torch.atan2(pieces[..., 1], pieces[..., 0])
    turning = (angle.diff(dim=1) + math.pi).remainder(2 * math.pi) - math.pi
    torch.testing.assert_close(found.turning, turning.abs().sum(1), atol=1e-3, rtol=1e-2)
    assert found.turning.min() > 0.1


def test_ends_show_a_wrong_score_at_high_noise() -> None:
    """A score that is wrong near the noise makes an earlier end the better one."""
    data = law(2)
    schedule = ef.schedules.VP()
    exact = data.denoiser(schedule, statistics=True)

    def late(x: Tensor, t: Tensor) -> Tensor:
        return exact(x, t) + 20 * (t > 0.6)[:, None] * torch.ones(3).to(x)

    wrong = ef.Denoiser(late, schedule, statistics=exact.statistics)
    x0 = data.sample(64, 0)
    fine = ef.diagnose(exact, x0, times=5, trajectories=2)
    assert fine.ends[-1].bound.value > fine.ends[0].bound.value
    found = ef.diagnose(wrong, x0, times=5, trajectories=2)
    assert found.best_end < 0.62
    gaps = [end.gap for end in found.ends]
    assert gaps == sorted(gaps, reverse=True)


def test_a_report_is_saved_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = law(2)
    report = ef.diagnose(data.denoiser(ef.schedules.Cosine()), data.sample(24, 0), times=3)
    assert len(report.times) == len(report.asymmetry) == len(report.mean_score) == 3
    assert report.paths.curvature.shape == (16, 32)
    summary = report.summary()
    assert summary["paths"]["length"]["mean"] >= 1
    report.save_figure(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_labels_go_with_the_data() -> None:
    data = law(1)
    exact = data.denoiser(ef.schedules.Linear())

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert label.shape == (len(x),)
        return exact(x, t) + 0 * label[:, None]

    denoiser = ef.Denoiser(net, ef.schedules.Linear())
    report = ef.diagnose(
        denoiser, data.sample(20, 0), times=2, loops=8, trajectories=4, label=torch.arange(20)
    )
    assert report.paths.turning.shape == (4,)


@pytest.mark.parametrize("data", [torch.zeros(1, 3), torch.full((4, 3), math.nan)])
def test_bad_data(data: Tensor) -> None:
    with pytest.raises(ValueError, match="finite samples"):
        ef.diagnose(law(1).denoiser(ef.schedules.Linear()), data)
