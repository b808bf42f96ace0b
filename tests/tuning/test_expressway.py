"""DPM-OT's expressway: where it starts, what it costs, and how much of the data it repeats."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from ebbflow.transport import NotConverged, semi_discrete, standard_normal
from ebbflow.tuning import Expressway, expressway

TURNS = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
DEVIATION = 0.1
RING = ef.oracles.GaussianMixture(
    2 * torch.stack([TURNS.cos(), TURNS.sin()], 1), torch.full((8,), DEVIATION**2), torch.ones(8)
)
LINEAR = ef.schedules.Linear()
COUNT = 2000


@functools.cache
def ring_way(time: float = 0.4, reject: float = 0.0, points: int = 160) -> Expressway:
    return expressway(LINEAR, RING.sample(points, seed=1), time=time, reject=reject, tolerance=0.2)


def between(x: Tensor) -> float:
    """Share of samples more than four deviations from every mode; 3e-4 in the law itself."""
    return (torch.cdist(x.double(), RING.means).amin(1) > 4 * DEVIATION).double().mean().item()


def test_fewer_samples_between_modes_than_ddim_with_as_many_calls() -> None:
    """Ten calls, and five: the first steps, where few steps mix modes, are not taken. With as many
    latents as here, the share comes in units of 1/160."""
    denoiser, way = RING.denoiser(LINEAR), ring_way(0.3)
    shares = {}
    for steps in (5, 10):
        whole = ef.sample(denoiser, (COUNT, 2), solver="ddim", steps=steps, seed=3)
        ours = way.sample(denoiser, COUNT, solver="ddim", steps=steps, seed=3)
        shares[steps] = between(whole), between(ours)
        assert torch.cdist(ours.double(), RING.means).argmin(1).unique().numel() == 8
    assert shares[5][0] > 0.1 and shares[5][1] < 0.03
    assert shares[10][0] > 0.005 and shares[10][1] < 0.003
    assert between(RING.sample(COUNT, seed=5)) < 0.003


def test_as_a_law_it_is_a_stored_latent_at_random() -> None:
    """What the transport chooses from noise, a die chooses as well: the share between modes is the
    same, and every latent comes up as often, within the solver's error and counting noise."""
    denoiser, way = RING.denoiser(LINEAR), ring_way()
    latents = way.transport.targets
    die = torch.randint(len(latents), (COUNT,), generator=torch.Generator().manual_seed(0))
    nodes = way.nodes(5)
    states = latents[die].float()
    random = ef.sample(denoiser, (COUNT, 2), solver="ddim", times=nodes, x_init=states)
    ours = way.sample(denoiser, COUNT, solver="ddim", steps=5, seed=3)
    share = (between(random) + between(ours)) / 2
    assert abs(between(random) - between(ours)) < 4 * math.sqrt(2 * (share + 1e-3) / COUNT) + 0.01
    found = torch.bincount(way.start(20_000).index, minlength=len(latents)) / 20_000
    relative = (found * len(latents) - 1).square().mean().sqrt()
    assert relative < 0.2 + math.sqrt(len(latents) / 20_000)


def test_it_repeats_the_data() -> None:
    """Measured: with a deterministic solver no more samples than latents; and in 16 dimensions, the
    distance to the nearest of 24 data points over that of the law's own samples, which grows from
    the data itself (0) to that of the law (1) as the latents are noisier."""
    ours = ring_way().sample(RING.denoiser(LINEAR), COUNT, solver="ddim", steps=4, seed=3)
    assert (ours * 1e5).round().unique(dim=0).shape[0] <= 160
    noisy = ring_way().sample(RING.denoiser(LINEAR), COUNT, solver="ddpm", steps=4, seed=3)
    assert (noisy * 1e5).round().unique(dim=0).shape[0] > 0.9 * COUNT

    law = ef.oracles.GaussianMixture(torch.zeros(1, 16), torch.ones(1), torch.ones(1))
    data = law.sample(24, seed=1)
    own = torch.cdist(law.sample(500, seed=2), data).amin(1).mean()
    ratios = []
    for time in (0.1, 0.4, 0.9):
        way = expressway(LINEAR, data, time=time, tolerance=0.2)
        x = way.sample(law.denoiser(LINEAR), 500, solver="ddpm", steps=12, seed=3)
        ratios.append((torch.cdist(x.double(), data).amin(1).mean() / own).item())
    assert ratios[0] < 0.2 < 0.4 < ratios[1] < 0.85 < 0.9 < ratios[2] < 1.1


@pytest.mark.parametrize("schedule", [ef.schedules.VP(), ef.schedules.VE(), LINEAR], ids=str)
def test_the_latents_are_noisy_data(schedule: Schedule) -> None:
    """`alpha x_0 + sigma eps`, with noise of unit variance: copies of one point show it."""
    data = torch.tensor([[[3.0, -2.0]], [[1.0, 0.5]]], dtype=torch.float64)
    way = expressway(
        schedule, data, time=0.5, copies=100, tolerance=0.9, max_samples=1, strict=False
    )
    latents = way.transport.targets.reshape(2, 100, 1, 2)
    alpha, sigma = schedule.alpha(0.5), schedule.sigma(0.5)
    eps = (latents - alpha * data[:, None]) / sigma
    assert abs(eps.mean()) < 4 / 400**0.5 and abs(eps.var() - 1) < 4 * (2 / 400) ** 0.5


def test_the_source_is_the_noise_of_sampling() -> None:
    """The start of sample i is the map of the noise from which `ef.sample` starts sample i."""
    way = ring_way()
    prior: list[Tensor] = []

    def keep(x: Tensor, t: Tensor) -> Tensor:
        prior.append(x)
        return x

    ef.sample(ef.Denoiser(keep, LINEAR), (5, 2), solver="ddim", steps=1, seed=8, first_index=4)
    assert torch.equal(way.start(5, seed=8, first_index=4).states, way.carry(prior[0]))
    for schedule in (ef.schedules.VE(), ef.schedules.VP()):
        other = Expressway(schedule, 0.4, (2,), way.transport)
        moved = prior[0].double() * schedule.sigma(1.0)
        assert torch.equal(other.carry(moved), way.carry(prior[0].double()))


def test_a_sample_is_itself_in_any_batch() -> None:
    way, denoiser = ring_way(reject=0.2), RING.denoiser(LINEAR)
    every = way.sample(denoiser, 12, solver="ddpm", steps=3, seed=2)
    for first, count in ((0, 1), (5, 7)):
        rows = way.sample(denoiser, count, solver="ddpm", steps=3, seed=2, first_index=first)
        torch.testing.assert_close(rows, every[first : first + count])


def test_rejection_leaves_small_angles_only() -> None:
    free, way = ring_way(), ring_way(reject=0.2)
    start = way.start(COUNT, seed=5)
    assert bool((start.angle <= way.threshold).all())
    plain = free.start(COUNT, seed=5)
    bad = plain.angle > way.threshold
    assert abs(bad.double().mean() - 0.2) < 0.06
    assert torch.equal(start.rejected > 0, bad)
    # A geometric number of draws, in the mean p/(1 - p).
    assert abs(start.rejected.double().mean() - 0.25) < 0.1
    assert torch.equal(start.states[~bad], plain.states[~bad])
    with pytest.raises(RuntimeError, match="rejected the noise of a sample 1000 times"):
        Expressway(LINEAR, 0.4, (2,), way.transport, threshold=1e-9).start(2)


@pytest.mark.parametrize("schedule", [ef.schedules.VP(), ef.schedules.VE(), LINEAR], ids=str)
def test_nodes_and_calls(schedule: Schedule) -> None:
    way = Expressway(schedule, 0.4, (2,), ring_way().transport)
    nodes = way.nodes(6)
    assert nodes[0] == 0.4 and nodes[-1] == 0 and len(nodes) == 7
    t = torch.tensor(nodes, dtype=torch.float64)
    gaps = -torch.atan2(schedule.sigma(t), schedule.alpha(t)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(6), rtol=1e-8, atol=1e-8)
    calls: list[float] = []

    def count(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return x

    found = way.sample(ef.Denoiser(count, schedule), 3, solver="ddim", steps=6)
    assert len(calls) == 6 and calls[0] == pytest.approx(0.4) and found.shape == (3, 2)
    same = way.sample(ef.Denoiser(count, schedule), 3, solver="ddim", times=nodes)
    assert torch.equal(same, found)


def test_what_has_not_converged_is_not_accepted(caplog: pytest.LogCaptureFixture) -> None:
    data = RING.sample(60, seed=1)
    with pytest.raises(NotConverged, match="not converged"):
        expressway(LINEAR, data, time=0.4, tolerance=0.05, max_samples=3000)
    with caplog.at_level("WARNING", "ebbflow"):
        way = expressway(LINEAR, data, time=0.4, tolerance=0.05, max_samples=3000, strict=False)
    assert "not converged" in caplog.text and "not converged" in way.transport.status
    assert way.start(3).states.shape == (3, 2)
    with pytest.raises(NotConverged):
        Expressway(LINEAR, 0.4, (2,), way.transport)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": 0.0}, "time 0 must lie"),
        ({"time": 1.0}, "time 1 must lie"),
        ({"copies": 0}, "copies 0"),
        ({"reject": 1.0}, "reject 1"),
        ({"data": torch.zeros(4, 2, dtype=torch.int64)}, "give floats"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    given = {"data": RING.sample(4, seed=1), "time": 0.4, **change}
    with pytest.raises(ValueError, match=message):
        expressway(LINEAR, given.pop("data"), **given)


def test_wrong_shapes_and_times_are_refused() -> None:
    transport = semi_discrete(torch.eye(3, dtype=torch.float64), standard_normal(3), tolerance=0.2)
    with pytest.raises(ValueError, match="have 2 numbers, the latents 3"):
        Expressway(LINEAR, 0.4, (2,), transport)
    with pytest.raises(ValueError, match=r"times start at 0\.9"):
        ring_way().sample(RING.denoiser(LINEAR), 2, times=[0.9, 0.0])
