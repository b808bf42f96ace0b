"""Statistics: every representation against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

import ebbflow as ef
from ebbflow import Statistics
from ebbflow.schedules import Schedule

SHAPE = (2, 3, 4)
D = 24


def data(n: int = 400) -> Tensor:
    """Correlated pictures, off-centre."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=random, dtype=torch.float64) / D**0.5
    z = torch.randn(n, D, generator=random, dtype=torch.float64)
    scale = torch.linspace(0.05, 2, D, dtype=torch.float64)
    return (z * scale @ mix + 0.3).reshape(n, *SHAPE)


LABELS = torch.arange(400) % 3
KINDS = ("exact", "low-rank", "cosine")


def dense_cosine(x: Tensor) -> Tensor:
    """The covariance with all but its diagonal in scipy's orthonormal cosines dropped."""
    centred = (x - x.mean(0)).numpy()
    unit = np.eye(D).reshape(D, *SHAPE)
    basis = np.stack([dctn(u, axes=(1, 2), norm="ortho").ravel() for u in unit], 1)
    rotated = centred.reshape(len(x), -1) @ basis.T
    variance = (rotated**2).sum(0) / (len(x) - 1)
    return torch.from_numpy(basis.T @ np.diag(variance) @ basis)


@pytest.mark.parametrize("n", [400, 10])
def test_exact_and_low_rank_are_the_sample_covariance(n: int) -> None:
    """Also of fewer samples than coordinates, where it is singular."""
    x = data(n)
    expected = torch.cov(x.reshape(n, -1).T)
    for kind in ("exact", "low-rank"):
        found = Statistics.from_data(x, kind=kind)
        torch.testing.assert_close(found.mean, x.mean(0))
        if kind == "exact" or n == 400:
            torch.testing.assert_close(found.covariance(), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.covariance().trace(), expected.trace())


def test_a_truncated_basis_keeps_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebbflow.statistics.LOW_RANK", 5)
    x = data()
    found = Statistics.from_data(x, kind="low-rank")
    covariance = torch.cov(x.reshape(len(x), -1).T)
    values, vectors = torch.linalg.eigh(covariance)
    top, rest = vectors[:, -5:], values[:-5].mean()
    kept = top * values[-5:] @ top.T
    expected = kept + rest * (torch.eye(D, dtype=torch.float64) - top @ top.T)
    torch.testing.assert_close(found.covariance(), expected, rtol=1e-9, atol=1e-10)
    check_scale(found)


def test_cosines_are_the_diagonal_in_the_cosine_basis() -> None:
    x = data()
    found = Statistics.from_data(x, kind="cosine")
    torch.testing.assert_close(found.covariance(), dense_cosine(x), rtol=1e-9, atol=1e-10)


def check_scale(statistics: Statistics) -> None:
    """`scale` is a power of the dense matrix, for each alpha and sigma."""
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    for alpha, sigma, power in ((1.0, 0.0, 1.0), (0.6, 0.8, -1.0), (0.3, 1.5, 0.5), (1, 0.4, -0.5)):
        eye = torch.eye(D, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(alpha**2 * statistics.covariance() + sigma**2 * eye)
        matrix = vectors * values.clamp(min=0) ** power @ vectors.T
        expected = (x.reshape(3, -1) @ matrix).reshape(x.shape)
        found = statistics.scale(x, alpha, sigma, power)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
        single = statistics.scale(x.float(), alpha, sigma, power)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_is_a_power_of_the_covariance(kind: str) -> None:
    check_scale(Statistics.from_data(data(), kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_statistics_of_their_own(kind: str) -> None:
    x = data()
    found = Statistics.from_data(x, LABELS, kind=kind)
    for label in range(3):
        alone = Statistics.from_data(x[label == LABELS], kind=kind)
        for given in (label, torch.tensor(label), torch.full((5,), label)):
            part = found.given(label=given)
            assert part is not None
            torch.testing.assert_close(part.mean, alone.mean)
            torch.testing.assert_close(part.covariance(), alone.covariance())
    pooled = Statistics.from_data(x, kind=kind)
    torch.testing.assert_close(found.covariance(), pooled.covariance())
    for condition in ({}, {"label": None}, {"text": "a"}):
        assert found.given(**condition) is found
    # Of several classes at once, or of one that is not known, there is no one law.
    for unknown in (7, torch.tensor([0, 1])):
        assert found.given(label=unknown) is None


def test_the_size_chooses_the_kind() -> None:
    assert Statistics.from_data(torch.randn(9, 5)).basis is not None
    assert Statistics.from_data(torch.randn(9, 1)).covariance().shape == (1, 1)
    assert Statistics.from_data(torch.randn(9, 3, 24, 24)).basis is None
    wide = Statistics.from_data(torch.randn(9, 2000))
    assert wide.basis is not None and wide.basis.shape == (2000, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(1, 3),), "at least two samples, got 1"),
        ((torch.tensor([[1.0], [float("nan")]]),), "NaN or infinite"),
        ((torch.randn(4, 3), torch.zeros(3)), r"labels have shape \(3,\), expected \(4,\)"),
        ((torch.randn(4, 3), None, "cosine"), "for images, cosine"),
        ((torch.randn(4, 3), None, "diagonal"), "use exact, low-rank"),
    ],
)
def test_bad_data_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statistics.from_data(*arguments)


def test_what_is_no_covariance_is_refused() -> None:
    with pytest.raises(ValueError, match="a variance is negative: -1"):
        Statistics.exact(torch.zeros(2), torch.diag(torch.tensor([2.0, -1.0])))
    with pytest.raises(ValueError, match="negative"):
        Statistics(torch.zeros(2), torch.tensor([1.0, -0.5]), torch.eye(2))
    with pytest.raises(ValueError, match=r"variance \(3,\) does not fit mean \(2,\)"):
        Statistics(torch.zeros(2), torch.ones(3), torch.eye(2))
    # Round-off below zero is no offence.
    rank_one = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    assert bool((Statistics.exact(torch.zeros(3), rank_one).variance >= 0).all())


@pytest.mark.parametrize("schedule", [ef.schedules.VP(), ef.schedules.VE(), ef.schedules.Linear()])
def test_a_denoiser_tells_its_own_statistics(schedule: Schedule) -> None:
    """Probed far above the data's deviation, a mixture looks like one Gaussian."""
    mixture = ef.oracles.GaussianMixture(
        torch.tensor([[1.0, -0.5, 0.2], [-1.2, 0.8, 0.0]]), torch.tensor([0.3, 0.5]), torch.ones(2)
    )
    found = Statistics.from_model(mixture.denoiser(schedule), noise_ratio=60.0)
    torch.testing.assert_close(found.mean, mixture.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.covariance(), mixture.covariance, rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match="give shape="):
        Statistics.from_model(ef.Denoiser(lambda x, t: x, schedule))
    with pytest.raises(ValueError, match="only images may exceed 256"):
        Statistics.from_model(ef.Denoiser(lambda x, t: x, schedule), shape=(300,))


def test_a_model_of_pictures_tells_its_cosines() -> None:
    """Exact when the covariance is diagonal in cosines: white noise and a constant picture."""
    cosine = Statistics(torch.zeros(1, 20, 20).double(), torch.rand(1, 20, 20).double() + 0.5)

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        r = ef.schedules.VE().sigma(t[0]).item()
        return cosine.scale(cosine.scale(x), sigma=r, power=-1.0)

    denoiser = ef.Denoiser(posterior_mean, ef.schedules.VE(), shape=(1, 20, 20))
    found = Statistics.from_model(denoiser, probes=2)
    torch.testing.assert_close(found.variance, cosine.variance, rtol=1e-6, atol=1e-6)
