"""The evidence lower bound and dequantisation against closed forms.

Mutants that these tests kill: the decoder's deviation or its control variate with another factor;
the prior's term without the entropy or the trace; strata of another width; a standard error of
draws that ignores the strata; bits with another spacing; log q without the sigmoid's slope.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.images import to_uint8
from ebbflow.likelihood import VariationalDequantiser, bits_per_dimension, dequantise, elbo
from tests.likelihood.test_log_likelihood import SCHEDULES, law, names


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("components", [1, 3])
def test_the_bound_of_an_exact_denoiser_is_sharp(schedule: Any, components: int) -> None:
    data = law(components)
    x0 = data.sample(64, 1)
    value, error = elbo(data.denoiser(schedule, statistics=components == 1), x0, samples=128)
    z = (value - data.log_prob(x0)) / error
    assert 0.45 < z.abs().median() < 0.95
    assert z.abs().max() < 5
    assert abs(z.mean()) < 5 / math.sqrt(64)


def test_a_constant_error_costs_its_integral() -> None:
    data = law(2)
    schedule = ef.schedules.VP()
    exact = data.denoiser(schedule)
    shift = torch.tensor([0.02, 0.0, -0.01], dtype=torch.float64)
    wrong = ef.Denoiser(lambda x, t: exact(x, t) + shift, schedule)
    x0 = data.sample(256, 2)
    floor = 0.05
    pair = [elbo(d, x0, samples=64, floor=floor)[0] for d in (exact, wrong)]
    found = pair[0] - pair[1]
    # 1/2 |shift|² (∫ SNR dlog_snr + SNR at the floor), the cross term is zero in the mean.
    last = math.exp(schedule.log_snr(1.0).item())
    expected = 0.5 * shift.square().sum().item() * (2 * floor**-2 - last)
    assert abs(found.mean().item() - expected) < 4 * found.std().item() / 16
    assert expected > 10 * found.std().item() / 16


def test_pixels_return_from_their_values() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = dequantise(pixels, seed=3)
    assert bool((to_uint8(values).permute(0, 3, 1, 2) == pixels).all())
    inside = (values + 1) * 127.5 - pixels.double()
    assert inside.abs().max() < 0.5
    assert abs(inside.mean()) < 4 / math.sqrt(12 * 256)
    assert abs(inside.var() - 1 / 12) < 0.02
    with pytest.raises(ValueError, match="uint8"):
        dequantise(pixels.float())


def test_bits_of_uniform_pixels() -> None:
    """A density that is flat over the 256 levels takes 8 bits a pixel."""
    volume = 256 * 2 / 255
    log_density = torch.tensor([-12 * math.log(volume)], dtype=torch.float64)
    bits, error = bits_per_dimension(log_density, torch.tensor([math.log(2)]), 12)
    torch.testing.assert_close(bits, torch.tensor([8.0], dtype=torch.float64))
    torch.testing.assert_close(error, torch.tensor([1 / 12]))


def narrow() -> tuple[ef.Denoiser, Tensor, Tensor]:
    """A denoiser of narrow lines about two levels, its pixels, and log P of each exactly."""
    deviation = 0.15 * 2 / 255
    levels = torch.tensor([40, 200])
    means = levels.double()[:, None] * (2 / 255) - 1
    data = ef.oracles.GaussianMixture(means, torch.full((2,), deviation**2), torch.ones(2))
    pixels = levels[torch.arange(64) % 2, None].to(torch.uint8)
    inside = math.erf(0.5 / 0.15 / math.sqrt(2))
    return (
        data.denoiser(ef.schedules.VE(sigma_min=1e-4)),
        pixels,
        torch.tensor(math.log(inside / 2)),
    )


def test_learned_noise_is_sharper_than_uniform_and_stays_a_bound() -> None:
    denoiser, pixels, exact = narrow()
    spacing = math.log(2 / 255)
    settings: Any = {"divergence": "exact", "floor": 1e-4, "rtol": 1e-5}
    uniform, _ = ef.log_likelihood(denoiser, dequantise(pixels), **settings)
    dequantiser = VariationalDequantiser()
    # At the start it is nearly uniform noise.
    values, log_q = dequantiser(pixels)
    assert log_q.abs().mean() < 0.2
    torch.manual_seed(0)
    dequantiser.fit(denoiser, pixels, steps=60, learning_rate=0.1, samples=16, batch=64)
    with torch.no_grad():
        values, log_q = dequantiser(pixels, seed=5)
    learned, _ = ef.log_likelihood(denoiser, values, **settings)
    found = learned - log_q + spacing
    error = found.std() / 8
    assert found.mean() < exact + 4 * error
    assert exact - found.mean() < 0.3 * (exact - (uniform + spacing).mean())


def test_log_q_is_a_density() -> None:
    dequantiser = VariationalDequantiser()
    with torch.no_grad():
        dequantiser.mean.fill_(0.7)
        dequantiser.log_scale.fill_(-0.3)
    pixels = torch.full((4000, 1), 9, dtype=torch.uint8)
    values, log_q = dequantiser(pixels)
    u = (values[:, 0] + 1) * 127.5 - 9 + 0.5
    # E_q [1 / q] over an interval that holds most of q is its length.
    inside = ((u > 0.3) & (u < 0.95)).double() * torch.exp(-log_q)
    assert abs(inside.mean() - 0.65) < 4 * inside.std() / math.sqrt(4000)


@pytest.mark.parametrize("samples", [7, 2, 9])
def test_samples_are_even(samples: int) -> None:
    data = law(1)
    with pytest.raises(ValueError, match="even"):
        elbo(data.denoiser(ef.schedules.VP()), data.sample(2, 0), samples=samples)
