from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebbflow import schedules
from ebbflow.denoiser import Denoiser
from ebbflow.schedules import along
from ebbflow.training import denoising_loss, noise_times

SCHEDULES = [schedules.Cosine(), schedules.VP(), schedules.VE(), schedules.Linear()]
PREDICTIONS = ["x0", "noise", "v", "velocity", "edm"]
DEVIATION = 0.7


def ideal(schedule: schedules.Schedule, prediction: str) -> Denoiser:
    """A network that answers with the exact posterior mean of N(0, DEVIATION²)."""
    sigma_data = 0.5 if prediction == "edm" else None
    denoiser = Denoiser(lambda x, t: x, schedule, prediction, sigma_data=sigma_data, time="t")

    def net(scaled: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        p, q, c_in = (along(c, scaled) for c in denoiser.coefficients(t))
        alpha, sigma = along(schedule.alpha(t), scaled), along(schedule.sigma(t), scaled)
        x = scaled / c_in
        mean = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * x
        return (mean - p * x) / q

    denoiser.net = net
    return denoiser


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_optimum_on_gaussian_data_is_the_posterior_variance(
    schedule: schedules.Schedule, prediction: str
) -> None:
    count, size = 400, 64
    t = torch.linspace(0.2, 0.8, count, dtype=torch.float64)
    x0 = DEVIATION * torch.randn(count, size, dtype=torch.float64)
    noise = torch.randn(count, size, dtype=torch.float64)
    denoiser = ideal(schedule, prediction)
    loss = denoising_loss(denoiser, x0, t, noise)
    assert loss.shape == (count,)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variance = (DEVIATION * sigma) ** 2 / ((alpha * DEVIATION) ** 2 + sigma**2)
    ratio = loss * denoiser.coefficients(t)[1] ** 2 / variance
    # Each ratio is chi-squared with `size` degrees of freedom, divided by `size`.
    assert abs(ratio.mean() - 1) < 5 * (2 / size / count) ** 0.5
    assert abs(ratio.var() / (2 / size) - 1) < 0.4


def test_an_error_of_the_network_costs_its_square_at_every_time() -> None:
    schedule = schedules.Cosine()
    t = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    for prediction in ("x0", "v", "edm"):
        exact = ideal(schedule, prediction)
        net = exact.net
        x0 = torch.zeros(50, 16, dtype=torch.float64)
        noise = torch.zeros_like(x0)
        assert torch.allclose(denoising_loss(exact, x0, t, noise), torch.zeros(50).double())
        exact.net = lambda x, time, net=net: net(x, time) + 0.3
        loss = denoising_loss(exact, x0, t, noise)
        assert torch.allclose(loss, torch.full_like(loss, 0.09))


def test_edm_output_zero_has_loss_one_on_data_of_its_deviation() -> None:
    denoiser = Denoiser(
        lambda x, t: torch.zeros_like(x), schedules.Cosine(), "edm", sigma_data=DEVIATION
    )
    t = torch.linspace(0.01, 1, 300, dtype=torch.float64)
    x0 = DEVIATION * torch.randn(300, 256, dtype=torch.float64)
    loss = denoising_loss(denoiser, x0, t, torch.randn_like(x0))
    assert abs(loss[:150].mean() - 1) < 0.03
    assert abs(loss[150:].mean() - 1) < 0.03


def test_the_condition_reaches_the_network() -> None:
    seen = []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return x

    label = torch.tensor([1, 2])
    denoising_loss(
        Denoiser(net, schedules.Linear()),
        torch.zeros(2, 3),
        torch.rand(2),
        torch.randn(2, 3),
        label=label,
    )
    assert seen == [label]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_noise_levels_have_the_asked_quantiles(schedule: schedules.Schedule) -> None:
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t = noise_times(schedule, quantiles, -0.5, 1.2)
    level = torch.log(schedule.sigma(t) / schedule.alpha(t))
    expected = torch.distributions.Normal(-0.5, 1.2).icdf(quantiles)
    assert torch.allclose(level, expected, atol=1e-6)


def test_noise_levels_beyond_the_ends_become_the_ends() -> None:
    schedule = schedules.VE(sigma_min=0.5, sigma_max=2.0)
    t = noise_times(schedule, torch.tensor([1e-9, 1 - 1e-9]), 0.0, 3.0)
    assert torch.allclose(t, torch.tensor([0.0, 1.0], dtype=torch.float64))
