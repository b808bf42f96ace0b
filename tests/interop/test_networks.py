"""Every row of the table of conventions: an exact denoiser, called that way, is itself again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebbflow as ef
from ebbflow.denoiser import CLOCKS
from ebbflow.interop import networks
from ebbflow.schedules import VE, VP, Betas, Linear, Schedule
from tests.parity import peers
from tests.parity.problem import denoiser, levels, start

CHAIN = Betas(torch.linspace(1e-3, 0.05, 100, dtype=torch.float64))
TIMES = torch.tensor([0.05, 0.31, 0.62, 0.97], dtype=torch.float64)


def column(values: Tensor) -> Tensor:
    return values.double()[:, None]


def at(schedule: Schedule, clock: str, told: Tensor) -> Tensor:
    """The times (B,) at which this clock shows `told`, by bisection of the table of clocks."""
    low, high = torch.zeros(len(told)).double(), torch.ones(len(told)).double()
    rising = CLOCKS[clock](schedule, high - 1e-9) > CLOCKS[clock](schedule, low + 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        below = (CLOCKS[clock](schedule, middle) < told) == rising
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def same(made: ef.Denoiser, schedule: Schedule, **condition: Any) -> None:
    x = start(schedule, 0.5)
    expected = denoiser(schedule)(x, TIMES)
    torch.testing.assert_close(made(x, TIMES, **condition), expected, rtol=1e-5, atol=1e-6)


class Preconditioned(nn.Module):
    """D(x; sigma) of EDM, which adds a shift of 0.1 times the class to what is exact."""

    label_dim = 3

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert sigma.shape == (len(x),)
        exact = denoiser(VE())(x, at(VE(), "sigma", sigma.double()))
        if class_labels is None:
            return exact
        return exact + 0.1 * column(class_labels @ torch.arange(3).to(class_labels))


def test_edm() -> None:
    made = networks.edm(Preconditioned())
    same(made, VE())
    x, label = start(VE(), 0.5), torch.tensor([0, 2, 1, 2])
    shift = made(x, TIMES, label=label) - made(x, TIMES)
    torch.testing.assert_close(shift, 0.1 * column(label).expand(-1, 3))
    rows = nn.functional.one_hot(label, 3).double()
    assert torch.equal(made(x, TIMES, label=rows), made(x, TIMES, label=label))


def test_edm_refuses_a_class_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"label \[3, 0, 0, 0\]: the network knows 0 … 2"):
        networks.edm(Preconditioned())(start(VE(), 0.5), 0.5, label=torch.tensor([3, 0, 0, 0]))
    with pytest.raises(ValueError, match="states no label_dim"):
        networks.edm(lambda x, sigma, label: x)(torch.zeros(1, 3), 0.5, label=torch.tensor([0]))


def test_the_raw_output_of_an_edm_network() -> None:
    def raw(x: Tensor, quarter: Tensor) -> Tensor:
        sigma, data = column(torch.exp(4 * quarter.double())), 0.5
        total = sigma**2 + data**2
        state = x * total.sqrt()
        exact = denoiser(VE())(state, at(VE(), "sigma", sigma[:, 0]))
        return (exact - data**2 / total * state) * total.sqrt() / (sigma * data)

    made = ef.Denoiser(raw, VE(), "edm", time="quarter_log_sigma", sigma_data=0.5)
    same(made, VE())


@pytest.mark.parametrize("schedule", [VE(), VP(), Linear(), CHAIN], ids=lambda s: type(s).__name__)
def test_k_diffusion(schedule: Schedule) -> None:
    def model(y: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        assert extra == {"strength": 2.0}
        t = at(schedule, "sigma", sigma.double())
        return denoiser(schedule)(column(schedule.alpha(t)) * y, t)

    same(networks.k_diffusion(model, schedule), schedule, strength=2.0)


def test_k_diffusion_s_own_sampler_agrees() -> None:
    """Heun's method of k-diffusion on a callable, and ours on the denoiser made of it."""
    try:
        sampling: Any = peers.k_diffusion()
    except ImportError as error:
        pytest.skip(f"runs k-diffusion itself ({error}); the test above needs nothing")
    schedule = VP()

    def model(y: Tensor, sigma: Tensor) -> Tensor:
        t = schedule.time(-2 * torch.log(sigma))
        return denoiser(schedule)(column(schedule.alpha(t)) * y, t)

    nodes = (0.98, 0.8, 0.6, 0.4, 0.2, 0.05)
    alpha, sigma = levels(schedule, nodes)
    x = start(schedule, nodes[0])
    theirs = sampling.sample_heun(model, x / alpha[0], sigma / alpha, disable=True) * alpha[-1]
    made = networks.k_diffusion(model, schedule)
    ours = ef.sample(made, x.shape, solver="edm", times=nodes, x_init=x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_integer_steps(whole: bool) -> None:
    def net(x: Tensor, step: Tensor) -> Tensor:
        assert step.dtype == (torch.int64 if whole else torch.float64)
        t = (step.double() + 1) / 100
        alpha, sigma = column(CHAIN.alpha(t)), column(CHAIN.sigma(t))
        return (x - alpha * denoiser(CHAIN)(x, t)) / sigma

    same(
        ef.Denoiser(networks.whole_steps(net) if whole else net, CHAIN, "noise", time="step"), CHAIN
    )


def test_sigma_and_x0() -> None:
    def net(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(VE())(x, at(VE(), "sigma", sigma.double()))

    same(ef.Denoiser(net, VE(), time="sigma"), VE())


def test_log_snr_and_v() -> None:
    schedule = VP()

    def net(x: Tensor, log_snr: Tensor) -> Tensor:
        return denoiser(schedule).v(x, at(schedule, "log_snr", log_snr.double()))

    same(ef.Denoiser(net, schedule, "v", time="log_snr"), schedule)


@pytest.mark.parametrize("reverse", [True, False])
def test_velocity_in_either_direction(reverse: bool) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        t = 1 - t.double() if reverse else t.double()
        velocity = denoiser(Linear()).velocity(x, t)
        return -velocity if reverse else velocity

    same(networks.from_noise(net) if reverse else ef.Denoiser(net, Linear(), "velocity"), Linear())


def test_a_direction_taken_for_the_other_is_seen() -> None:
    """The mutant of the test above."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(Linear()).velocity(x, t.double())

    with pytest.raises(AssertionError):
        same(networks.from_noise(net), Linear())
