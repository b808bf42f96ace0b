"""Exactly invertible schemes: they return their input, through latents of the prior's size."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow import grids
from ebbflow.guidance import ClassifierFree
from ebbflow.inversion import schemes
from ebbflow.inversion.schemes import angles, bdia, edict, leapfrog
from ebbflow.plan import Plan, Stage
from ebbflow.solvers import Levels
from tests.laws import mutants
from tests.laws.cases import SCHEDULES, oracle

EXACT = ("bdia", "edict", "leapfrog")
SCHEMES = {"bdia": bdia, "edict": edict, "leapfrog": leapfrog}


def empirical() -> ef.oracles.Empirical:
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ef.oracles.Empirical(points)


def narrow() -> ef.oracles.GaussianMixture:
    """Four Gaussians of deviation 0.1, where the flow turns sharply."""
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    return ef.oracles.GaussianMixture(means, torch.full((4,), 0.01), torch.ones(4))


ORACLES = {
    "gaussian": lambda: oracle("gaussian"),
    "mixture": lambda: oracle("mixture"),
    "narrow": narrow,
    "empirical": empirical,
}


@pytest.mark.parametrize("law", ORACLES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", EXACT)
def test_the_input_comes_back_through_latents_of_the_right_size(
    method: str, schedule: str, law: str
) -> None:
    known = ORACLES[law]()
    denoiser = known.denoiser(SCHEDULES[schedule])
    x0 = known.sample(128, seed=5)
    found = ef.invert(denoiser, x0, method=method, steps=50)
    sigma = SCHEDULES[schedule].sigma(1.0)
    assert found.start == 0 and found.times[-1] == 1 and len(found.times) == 51
    assert 0 < found.nearest <= found.times[1]
    assert found.round_trip_error < 1e-10
    for latent in found.latents:
        assert latent.abs().max() < 12 * sigma
    # Not only bounded: the noise that the probability flow makes, up to the steps' error.
    assert 0.35 < found.x1.std() / sigma < 1.2


def frozen_data(schedule: ef.schedules.Cosine, times: tuple[float, ...]) -> Plan:
    """EDICT with x_0 frozen in place of v: as exact, and useless."""
    stages = []
    for s, t in pairwise(angles(Levels.of(schedule, times))):
        a, b = t.sigma / s.sigma, t.alpha - s.alpha * t.sigma / s.sigma
        stages.append(Stage(t.time, {"x0": 1.0}, ({"x0": 1.0}, {"x1": a, "D": b})))
        rows = ({"x0": a, "D": b}, {"x1": 1.0})
        stages.append(Stage(t.time, {"x1": 1.0}, rows, t.time))
    return Plan(schedule, times[0], tuple(stages))


def test_a_scheme_that_freezes_the_wrong_prediction_returns_the_input_and_is_useless() -> None:
    schedule, known = ef.schedules.Linear(), narrow()
    x0 = known.sample(64, seed=1)
    denoiser = known.denoiser(schedule)
    nodes = (1e-6, *grids.angle(schedule, 50)[-2::-1])
    plan = frozen_data(schedule, nodes)
    ends = plan.run(denoiser, (x0, x0))
    back = plan.reverse().run(denoiser, ends)[0]
    assert (back - x0).abs().max() < 1e-6
    assert max(end.abs().max() for end in ends) > 1e4


@pytest.mark.parametrize("prediction", ["x0", "noise", "v", "velocity", "score"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_prediction_inverts_alike(schedule: str, prediction: str) -> None:
    process, law = SCHEDULES[schedule], oracle("mixture")
    own = law.denoiser(process)
    call = own if prediction == "x0" else getattr(own, prediction)
    other = ef.Denoiser(call, process, prediction)
    x0 = law.sample(8, seed=2)
    for method in EXACT:
        expected = ef.invert(own, x0, method=method, steps=20)
        found = ef.invert(other, x0, method=method, steps=20)
        assert found.round_trip_error < 1e-10
        torch.testing.assert_close(found.x1, expected.x1, rtol=1e-9, atol=1e-9)


def conditional(schedule: ef.schedules.Cosine) -> ef.Denoiser:
    """Class 0 and class 1 of the mixture, class 2 for both."""
    law = oracle("mixture")
    one = torch.ones(1)
    parts = [ef.oracles.GaussianMixture(law.means[[k]], law.covariances[[k]], one) for k in (0, 1)]
    calls = [part.denoiser(schedule) for part in (*parts, law)]

    def f(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        each = torch.stack([call(x, t) for call in calls])
        return each[label, torch.arange(len(x))]

    return ef.Denoiser(f, schedule, shape=(2,))


@pytest.mark.parametrize("method", EXACT)
def test_guided_inversion_is_exact_and_keeps_the_condition(method: str) -> None:
    schedule = ef.schedules.Cosine()
    denoiser = conditional(schedule)
    guided = ClassifierFree(denoiser, 2.0, {"label": 2})
    label = torch.tensor([0, 1] * 16)
    x0 = ef.sample(denoiser, (32, 2), x_init=start(32), steps=20, label=label)
    found = ef.invert(guided, x0, method=method, label=label)
    assert found.round_trip_error < 1e-10
    assert found.x1.abs().max() < 12
    assert (found.reconstruct(label=1 - label) - x0).abs().max() > 0.5


def start(count: int) -> Tensor:
    return ef.noise.normal(0, range(count), 0, (2,), torch.float64, "cpu")


def gaussian_flow(schedule: str, x0: Tensor, t: float) -> Tensor:
    """The probability flow of the Gaussian law from t = 0, in closed form, in its own directions;
    it starts with the noise level of t = 0, none but for VE."""
    law, process = oracle("gaussian"), SCHEDULES[schedule]
    variances, basis = torch.linalg.eigh(law.covariances[0])
    ends = torch.tensor([0.0, t], dtype=torch.float64)
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    total = alpha[:, None] ** 2 * variances + sigma[:, None] ** 2
    z = (x0 - alpha[0] * law.mean) @ basis * (total[1] / total[0]).sqrt()
    return alpha[1] * law.mean + z @ basis.T


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", EXACT)
def test_latents_approach_the_probability_flow_at_the_stated_order(
    method: str, schedule: str
) -> None:
    # To t = 0.7: over the whole quarter turn leapfrog is exact for a Gaussian, by symmetry.
    x0 = oracle("gaussian").sample(16, seed=4)
    expected = gaussian_flow(schedule, x0, 0.7)
    denoiser = oracle("gaussian").denoiser(SCHEDULES[schedule])
    errors = []
    for n in (32, 64, 128):
        phi = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        ends = [node.phi for node in angles(Levels.of(SCHEDULES[schedule], (0.0, 0.7)))]
        inner = SCHEDULES[schedule].time(
            -2 * torch.log(torch.tan(ends[0] + (ends[1] - ends[0]) * phi[1:-1]))
        )
        times = [0.0, *inner.tolist(), 0.7]
        found = ef.invert(denoiser, x0, method=method, times=times)
        errors.append((found.x1 - expected).abs().max() / expected.std())
    slopes = [torch.log2(a / b).item() for a, b in pairwise(errors)]
    assert min(slopes) > SCHEMES[method].order - 0.25, slopes


@pytest.mark.parametrize("method", EXACT)
def test_a_wrong_coefficient_is_noticed(method: str) -> None:
    """Each coefficient of the forward plan off by a thousandth: the way back no longer fits."""
    process, law = ef.schedules.Cosine(), oracle("mixture")
    denoiser, x0 = law.denoiser(process), law.sample(4, seed=6)
    scheme = SCHEMES[method]
    nodes = grids.angle(process, 6)[::-1]
    plan = scheme.plan(process, nodes)
    back, start = scheme.back(plan), scheme.start(angles(Levels.of(process, nodes[:1]))[0])

    def error(plan: Plan) -> float:
        ends = back.run(denoiser, plan.run(denoiser, tuple(c * x0 for c in start)))
        return (ends[1 if scheme.lost else 0] - x0).abs().max().item()

    assert error(plan) < 1e-12
    spoiled = Plan(process, plan.start, plan.stages[scheme.lost :])
    sites = mutants.sites(spoiled)
    assert sites
    for site in sites:
        wrong = mutants.scaled(plan, site, mutants.SLIGHTLY)
        # A start stage may make another z_1; the pair still comes back.
        if wrong.stages[scheme.lost :] != plan.stages[scheme.lost :]:
            assert error(wrong) > 1e-9, site


def test_what_gamma_costs() -> None:
    """Towards noise latents grow as gamma^-N; sampled pictures come back with g^-N of round-off."""
    law = oracle("mixture")
    denoiser, x0 = law.denoiser(ef.schedules.Cosine()), law.sample(16, seed=7)
    sizes, errors = [], []
    for gamma in (1.0, 0.9, 0.7, 0.5):
        found = ef.invert(denoiser, x0, method=replace(bdia, gamma=gamma), steps=50)
        sizes.append(found.x1.abs().max().item())
        pair = (start(16), start(16))
        ends = found.back.run(denoiser, pair)
        again = found.back.reverse().run(denoiser, ends)
        errors.append((again[0] - pair[0]).abs().max().item())
    assert sizes[1] < 4 < 1e3 < sizes[2] < 1e8 < sizes[3], sizes
    assert errors[0] < 1e-14 < errors[1] < 1e-11 < errors[2] < 1e-6 < errors[3], errors


@pytest.mark.parametrize("method", EXACT)
def test_round_off_in_float32(method: str) -> None:
    law = oracle("mixture")
    x0 = law.sample(64, seed=8).float()
    for process in (ef.schedules.VP(), ef.schedules.Cosine(), ef.schedules.Linear()):
        found = ef.invert(law.denoiser(process), x0, method=method, steps=50)
        assert found.x1.dtype == torch.float32
        assert 1e-8 < found.round_trip_error < 1e-3


@pytest.mark.parametrize("method", EXACT)
def test_half_precision(method: str) -> None:
    """States of half precision become float32; a network may round to bfloat16 for itself."""
    law, process = oracle("mixture"), ef.schedules.Cosine()
    exact = law.denoiser(process)

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.bfloat16().double(), t).bfloat16().to(x.dtype)

    coarse = ef.Denoiser(rounded, process, shape=(2,))
    x0 = law.sample(64, seed=8)
    for half in (torch.bfloat16, torch.float16):
        found = ef.invert(exact, x0.to(half), method=method, steps=50)
        assert found.x0.dtype == found.x1.dtype == torch.float32
        assert found.round_trip_error < 1e-4
    # The same rounding there and back: in float64 round-off seldom meets an edge of bfloat16.
    assert ef.invert(coarse, x0, method=method, steps=50).round_trip_error < 1e-10
    errors = [
        ef.invert(coarse, x0.float(), method=method, steps=n).round_trip_error for n in (10, 50)
    ]
    assert max(errors) < 3e-2


@pytest.mark.parametrize("method", EXACT)
def test_the_model_in_the_package(method: str) -> None:
    denoiser = ef.load("fashion-mnist").requires_grad_(False)
    label = torch.tensor([3])
    x0 = ef.sample(denoiser, (1, 1, 32, 32), steps=5, label=label).double()
    found = ef.invert(denoiser, x0, method=method, steps=50, label=label)
    assert found.round_trip_error < 1e-10
    assert found.x1.abs().max() < 12
    assert 0.5 < found.x1.std() < 1.6


def test_what_cannot_be_is_refused() -> None:
    law = oracle("mixture")
    denoiser, x0 = law.denoiser(ef.schedules.Cosine()), law.sample(2)
    with pytest.raises(ValueError, match="unknown method 'bdai'; did you mean 'bdia'"):
        ef.invert(denoiser, x0, method="bdai")
    with pytest.raises(ValueError, match="times fall from 1 to 0"):
        ef.invert(denoiser, x0, times=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"steps or times, not both \(steps=3\)"):
        ef.invert(denoiser, x0, steps=3, times=[0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="needs two steps at least, got 1"):
        ef.invert(denoiser, x0, steps=1)
    with pytest.raises(ValueError, match="gamma must lie in"):
        schemes.BDIA("bdia", 1, "", 0.0)
    with pytest.raises(ValueError, match="mixing must lie in"):
        schemes.EDICT("edict", 1, "", -1.0)
