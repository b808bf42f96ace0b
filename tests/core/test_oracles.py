"""Oracles against an independent implementation, Tweedie's formula, quadrature and sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.oracles import Empirical, GaussianMixture
from ebbflow.schedules import Schedule
from tests.laws import cases
from tests.laws.cases import LAWS, SCHEDULES

T = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64)


def points(law: str, schedule: Schedule) -> Tensor:
    """One x_t at each of the times T."""
    x0 = torch.tensor(LAWS[law].draw(len(T), 5))
    return schedule.add_noise(x0, T, torch.randn(len(T), 2, dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("law", LAWS)
def test_the_posterior_mean_is_the_references(law: str, schedule: str) -> None:
    process, known = SCHEDULES[schedule], LAWS[law]
    x = points(law, process)
    found = cases.oracle(law).denoiser(process)(x, T)
    alpha, sigma = process.alpha(T).tolist(), process.sigma(T).tolist()
    for i in range(len(T)):
        expected = known.posterior_mean(x[i : i + 1].numpy(), alpha[i], sigma[i])
        np.testing.assert_allclose(found[i : i + 1], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("law", LAWS)
def test_tweedie(law: str) -> None:
    """The score is the gradient of log p(x_t), by differences of the reference's density."""
    process, known, h = SCHEDULES["VP"], LAWS[law], 1e-5
    x = points(law, process)
    score = cases.oracle(law).denoiser(process).score(x, T)
    for i, t in enumerate(T):
        levels = process.alpha(t).item(), process.sigma(t).item()
        for j in range(2):
            step = h * np.eye(2)[j]
            up, down = (known.log_density(x[i : i + 1].numpy() + s, *levels) for s in (step, -step))
            assert score[i, j].item() == pytest.approx((up - down)[0] / (2 * h), abs=1e-6)


def test_the_posterior_mean_by_brute_force() -> None:
    """E[x_0 | x_t] of samples of the mixture, weighted by how likely each makes x_t."""
    mixture, process = cases.oracle("mixture"), SCHEDULES["Cosine"]
    x0, x = mixture.sample(40_000, seed=1), torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    alpha, sigma = process.alpha(0.5), process.sigma(0.5)
    weight = torch.softmax(-0.5 * ((x - alpha * x0) / sigma).square().sum(1), 0)
    mean = weight @ x0
    error = (weight**2 @ (x0 - mean) ** 2).sqrt()
    found = mixture.denoiser(process)(x, 0.5)[0]
    assert bool(((found - mean).abs() < 4.5 * error).all())


@pytest.mark.parametrize("law", LAWS)
def test_samples_have_the_moments_and_the_density(law: str) -> None:
    oracle, known, n = cases.oracle(law), LAWS[law], 20_000
    x = oracle.sample(n, seed=2)
    np.testing.assert_allclose(oracle.log_prob(x), known.log_density(x.numpy()), atol=1e-10)
    np.testing.assert_allclose(oracle.mean, known.mean)
    np.testing.assert_allclose(oracle.covariance, known.covariance)
    error = (oracle.covariance.diagonal() / n).sqrt()
    assert bool(((x.mean(0) - oracle.mean).abs() < 4.5 * error).all())
    fourth = ((x - oracle.mean)[:, :, None] * (x - oracle.mean)[:, None]).var(0)
    spread = (torch.cov(x.T) - oracle.covariance).abs()
    assert bool((spread < 4.5 * (fourth / n).sqrt()).all())
    assert torch.equal(oracle.sample(100, seed=2), x[:100])
    assert not torch.equal(oracle.sample(100, seed=3), x[:100])


def test_densities_integrate_to_one() -> None:
    line = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    cell = (line[1] - line[0]).item() ** 2
    empirical = Empirical(torch.tensor([[0.5, -0.3], [1.0, 1.0], [-1.0, 0.4]]), bandwidth=0.4)
    for law in (cases.oracle("mixture"), empirical):
        total = law.log_prob(grid).exp().sum().item() * cell
        assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_empirical_law_is_a_mixture_of_its_points(schedule: str) -> None:
    process, n = SCHEDULES[schedule], 7
    data = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    empirical = Empirical(data, bandwidth=0.3)
    flat = data.reshape(n, -1)
    mixture = GaussianMixture(flat, torch.full((n,), 0.09, dtype=torch.float64), torch.ones(n))
    x = process.add_noise(data[:4], T, torch.randn(4, 2, 3, dtype=torch.float64))
    expected = mixture.denoiser(process)(x.reshape(4, -1), T)
    found = empirical.denoiser(process)(x, T)
    torch.testing.assert_close(found.reshape(4, -1), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(empirical.log_prob(data), mixture.log_prob(flat))
    one, two = (o.denoiser(process, statistics=True).statistics for o in (empirical, mixture))
    assert one is not None and two is not None and one.mean.shape == (2, 3)
    torch.testing.assert_close(one.mean.flatten(), two.mean)
    torch.testing.assert_close(one.covariance(), two.covariance())


def test_without_bandwidth_the_answer_is_a_mean_of_points() -> None:
    """Near the data, the nearest; from pure noise, the mean of all."""
    process = SCHEDULES["Linear"]
    data = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]], dtype=torch.float64)
    denoiser = Empirical(data).denoiser(process)
    near = process.add_noise(data, 0.01, torch.full((3, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(denoiser(near, 0.01), data)
    far = denoiser(torch.randn(3, 2, dtype=torch.float64), 1.0)
    torch.testing.assert_close(far, data.mean(0).expand(3, 2))
    with pytest.raises(ValueError, match="bandwidth 0 has no density"):
        Empirical(data).log_prob(data)


@pytest.mark.parametrize("name", ["dpm-solver++2m", "sde-dpm-solver++2m"])
def test_samples_of_the_oracle_return_to_the_data(name: str) -> None:
    """Sampling a data set's own denoiser ends on its points, each about equally often."""
    data = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]])
    denoiser = Empirical(data).denoiser(SCHEDULES["VP"])
    x = ef.sample(denoiser, (300, 2), solver=name, steps=30)
    distance = torch.cdist(x, data)
    assert distance.min(1).values.max() < 1e-2
    counts = torch.bincount(distance.argmin(1), minlength=3)
    assert bool(((counts - 100).abs() < 4.5 * (300 * 2 / 9) ** 0.5).all())


def test_oracles_work_where_a_direction_has_no_width() -> None:
    flat = GaussianMixture(
        torch.zeros(1, 2), torch.diag(torch.tensor([1.0, 0.0]))[None], torch.ones(1)
    )
    x = torch.tensor([[0.8, 0.3]], dtype=torch.float64)
    found = flat.denoiser(SCHEDULES["Linear"])(x, 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.0]], dtype=torch.float64))
    assert bool((flat.sample(10)[:, 1] == 0).all())


def test_half_and_single_precision_keep_their_dtype() -> None:
    for oracle in (cases.oracle("mixture"), Empirical(torch.randn(5, 2), 0.1)):
        denoiser = oracle.denoiser(SCHEDULES["VP"])
        assert denoiser(torch.randn(3, 2), 0.5).dtype == torch.float32
        assert denoiser(torch.randn(3, 2).double(), 0.5).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianMixture(torch.zeros(2), torch.ones(1), torch.ones(1)),
            r"must be \(K, d\)",
        ),
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(3), torch.ones(2)), "need covar"),
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(2), torch.ones(3)), "and weights"),
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(2), -torch.ones(2)), "non-negative"),
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(2), torch.zeros(2)), "positive sum"),
        (lambda: GaussianMixture(torch.zeros(1, 3), -torch.ones(1), torch.ones(1)), "negative eig"),
        (lambda: Empirical(torch.zeros(3)), r"\(N, \*shape\)"),
        (lambda: Empirical(torch.full((3, 2), float("inf"))), "finite"),
        (lambda: Empirical(torch.zeros(3, 2), -0.1), "non-negative, got -0.1"),
    ],
)
def test_bad_laws_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
