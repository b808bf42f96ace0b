"""Denoising Langevin Gibbs on a mixture whose modes plain Langevin never leaves."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.particles import denoising_mcmc, exact_levels
from ebbflow.particles.denoising_mcmc import Emission

SCHEDULE = ef.schedules.Linear()
RATIOS = torch.exp(torch.linspace(math.log(0.1), math.log(6.0), 12, dtype=torch.float64))
TIMES = SCHEDULE.time(-2 * torch.log(RATIOS)).tolist()
# Ten deviations apart, of different widths.
LAW = ef.oracles.GaussianMixture(
    torch.tensor([[-3.0, 0.5], [3.0, 0.0]]), torch.tensor([0.09, 0.16]), torch.tensor([0.3, 0.7])
)
CHAINS = 256


def right_mode() -> Tensor:
    """Every chain in the same mode, the heavier one."""
    return LAW.means[1].expand(CHAINS, 2).clone()


@functools.cache
def run(
    emissions: int = 14,
    skip: int = 10,
    lowest: bool = False,
    levels: int = 12,
    chains: int = CHAINS,
) -> tuple[Emission, ...]:
    times = TIMES[:levels]
    denoiser = LAW.denoiser(SCHEDULE)
    return tuple(
        denoising_mcmc(
            denoiser,
            right_mode()[:chains],
            times=times,
            level_logits=exact_levels(LAW, SCHEDULE, times),
            emissions=emissions,
            step=2.0,
            skip=skip,
            lowest=lowest,
            solver="dpm-solver++2m",
            steps=6,
            seed=3,
        )
    )


def left(emissions: tuple[Emission, ...], first: int = 6) -> float:
    return torch.cat([e.samples for e in emissions[first:]])[:, 0].lt(0).double().mean().item()


@pytest.mark.parametrize("lowest", [False, True])
def test_the_weights_of_the_modes_are_recovered(lowest: bool) -> None:
    """From one mode, .3/.7: the error of 256 chains that remember a few emissions."""
    found = run(lowest=lowest)
    assert abs(left(found) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / CHAINS)
    assert left(found[:1], 0) < 0.1, "the chains start in the right mode"


def test_plain_langevin_is_stuck() -> None:
    """The same chain with the lowest level alone."""
    stuck = run(levels=1)
    assert left(stuck) == 0
    assert torch.cat([e.samples for e in stuck]).isfinite().all()


def test_a_move_is_the_langevin_step() -> None:
    """On a Gaussian of variance v in y it is `y' = (1 - h/2v) y + sqrt(h) Z`, whose own variance is
    v / (1 - h/4v): the closed form, with the bias of the step."""
    one = ef.oracles.GaussianMixture(torch.zeros(1, 2), torch.full((1,), 0.5), torch.ones(1))
    r, step = 0.8, 0.6
    t = SCHEDULE.time(-2 * math.log(r)).item()
    chain = denoising_mcmc(
        one.denoiser(SCHEDULE),
        torch.zeros(8000, 2, dtype=torch.float64),
        times=[t],
        level_logits=exact_levels(one, SCHEDULE, [t]),
        emissions=1,
        step=step,
        skip=25,
        lowest=False,
        solver="ddim",
        steps=1,
    )
    (emission,) = chain
    v = 0.5 + r**2
    expected = v / (1 - step / (4 * v))
    found = emission.state.square().mean().item()
    assert abs(found / expected - 1) < 4 * math.sqrt(2 / 16_000)
    # One step to the data is the posterior mean.
    torch.testing.assert_close(emission.samples, emission.state * 0.5 / v)


def test_samples_have_the_law_of_their_mode() -> None:
    found = torch.cat([e.samples for e in run()[6:]])
    for k, sign in enumerate((-1, 1)):
        mode = found[found[:, 0] * sign > 0]
        assert (mode.mean(0) - LAW.means[k]).abs().max() < 0.06
        ratio = mode.std(0) / LAW.covariances[k].diagonal().sqrt()
        assert ratio.min() > 0.8 and ratio.max() < 1.15


def test_the_chain_visits_levels_evenly_and_has_their_laws() -> None:
    """p(level) is even, and given a level the state has the noisy mixture's moments."""
    found = run()[6:]
    states = torch.cat([e.state for e in found])
    times = torch.cat([e.times for e in found])
    shares, misses = [], []
    for t, r in zip(TIMES, RATIOS.tolist(), strict=True):
        here = states[times == t]
        shares.append(len(here) / len(states))
        variance = (LAW.covariance.diagonal() + r**2) / max(len(here), 1)
        misses.append(((here.mean(0) - LAW.mean) / variance.sqrt()).abs().max().item())
    assert max(shares) < 2 / 12 and min(shares) > 0.4 / 12
    # Successive states are correlated: chains, not states, are independent.
    assert np.mean(misses) < 4


def test_the_lowest_level_is_cheaper_and_biased() -> None:
    """The paper's emission starts nearer to the data; it is no exact draw of the chain's law."""
    present, lowest = (
        torch.cat([e.times for e in run(lowest=b)[6:]]).mean() for b in (False, True)
    )
    assert lowest < 0.7 * present


def test_fewer_moves_between_emissions_remember_more() -> None:
    """Correlation of the mode between successive emissions falls with skip."""

    def memory(skip: int) -> float:
        modes = torch.stack([e.samples[:, 0] > 0 for e in run(14, skip, False)[6:]]).double()
        return (modes[1:] != modes[:-1]).double().mean().item()

    assert memory(10) > 1.5 * memory(2)


def test_chains_do_not_know_their_neighbours() -> None:
    few, many = run(3, 4, False, 12, 8), run(3, 4, False, 12, 64)
    for one, two in zip(few, many, strict=True):
        torch.testing.assert_close(one.samples, two.samples[:8], rtol=1e-9, atol=1e-9)
        assert torch.equal(one.times, two.times[:8])


def test_exact_levels_are_the_posterior() -> None:
    """A point mass at zero: log p(y | r) = -y²/(2 r²) - d log r + constant."""
    point = ef.oracles.GaussianMixture(torch.zeros(1, 2), torch.zeros(1), torch.ones(1))
    y = torch.tensor([[0.3, -0.4], [2.0, 1.0]], dtype=torch.float64)
    found = exact_levels(point, SCHEDULE, TIMES)(y)
    expected = -y.square().sum(1, keepdim=True) / (2 * RATIOS**2) - 2 * torch.log(RATIOS)
    difference = found - expected
    torch.testing.assert_close(difference, torch.full_like(difference, -math.log(2 * math.pi)))


def test_conditions_are_cut_by_chain() -> None:
    """A network that shifts by a number a chain, at whatever levels the chains are."""
    inner = LAW.denoiser(SCHEDULE)
    shift = torch.linspace(-5, 5, 24, dtype=torch.float64)[:, None].expand(24, 2)

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return inner(x - SCHEDULE.alpha(t)[:, None] * shift, t) + shift

    plain, moved = (
        next(
            denoising_mcmc(
                denoiser,
                right_mode()[:24] + moved,
                times=TIMES,
                level_logits=lambda y, moved=moved: exact_levels(LAW, SCHEDULE, TIMES)(y - moved),
                emissions=1,
                solver="dpm-solver++2m",  # "auto" expects data around zero
                **condition,
            )
        )
        for denoiser, moved, condition in (
            (inner, 0 * shift, {}),
            (ef.Denoiser(net, SCHEDULE), shift, {"shift": shift}),
        )
    )
    assert len(plain.times.unique()) > 1
    torch.testing.assert_close(moved.samples, plain.samples + shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "ddpm"}, "ddpm is stochastic"),
        ({"times": [1.0, 0.5]}, "signal and noise"),
        ({"times": [0.5, 0.0]}, "signal and noise"),
        ({"skip": 0}, "skip 0"),
        ({"step": 0.0}, "step 0"),
        ({"level_logits": lambda y: y}, "level_logits gave"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict, message: str) -> None:
    right = {"times": TIMES, "level_logits": exact_levels(LAW, SCHEDULE, TIMES), "emissions": 1}
    with pytest.raises(ValueError, match=message):
        next(denoising_mcmc(LAW.denoiser(SCHEDULE), right_mode(), **{**right, **wrong}))
