"""Calibration: the mean score of a model is measured and taken away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.guidance import ClassifierFree
from ebbflow.tuning import Calibrated, calibrate
from tests.laws.cases import SCHEDULES, exact_statistics, oracle

LAW = oracle("mixture")
DATA = LAW.sample(2000, seed=3)
BIAS = torch.tensor([0.6, -0.3], dtype=torch.float64)
TIMES = [0.1, 0.3, 0.5, 0.7, 0.9]
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def biased(schedule: ef.schedules.Schedule, kind: str = "x0", size: float = 1.0) -> ef.Denoiser:
    """The exact denoiser with a score that is off by `size BIAS / sigma`, its noise by -BIAS."""
    exact = LAW.denoiser(schedule)

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = exact(x, t) + sigma / alpha * size * BIAS
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "noise": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[kind]

    known = exact_statistics("mixture")
    return ef.Denoiser(net, schedule, kind, shape=(2,), statistics=known)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_injected_bias_is_recovered(schedule: str) -> None:
    """To the Monte Carlo error, which is stated and small beside the bias."""
    exact, model = LAW.denoiser(SCHEDULES[schedule]), biased(SCHEDULES[schedule])
    mended = calibrate(model, DATA, TIMES, seed=5)
    for i, t in enumerate(TIMES):
        ratio = (SCHEDULES[schedule].sigma(t) / SCHEDULES[schedule].alpha(t)).item()
        sine = torch.sin(mended.angles[i])
        error = (mended(X, t) - exact(X, t)).abs()
        allowed = mended.standard_error[0, i] * sine
        assert bool((error < 5 * allowed).all())
        assert bool((5 * allowed < 0.5 * ratio * BIAS.abs()).all())
        torch.testing.assert_close((model(X, t) - exact(X, t))[0], ratio * BIAS)


def test_the_stated_error_is_the_observed_one() -> None:
    """Over 40 data sets, the deviation of the correction is its standard error to 20%."""
    exact = LAW.denoiser(SCHEDULES["VP"])
    found = [calibrate(exact, LAW.sample(200, seed=50 + i), [0.4], seed=i) for i in range(40)]
    spread = torch.stack([one.shift for one in found]).square().mean(0).sqrt()
    stated = torch.stack([one.standard_error for one in found]).mean(0)
    torch.testing.assert_close(stated, spread, rtol=0.2, atol=0.0)


def loss(denoiser: ef.Denoiser, t: float, data: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching, `|s(x_t, t) + eps / sigma|² / 2`, over both signs of the noise."""
    schedule = denoiser.schedule
    total = torch.zeros((), dtype=torch.float64)
    for z in (eps, -eps):
        score = denoiser.score(schedule.add_noise(data, t, z), t)
        total += 0.5 * (score + z / schedule.sigma(t)).square().sum(1).mean() / 2
    return total


def check_loss(make: Callable[[ef.Denoiser], ef.Denoiser]) -> None:
    """The loss falls by half the square of the mean score, exactly, on the batch it came from."""
    model = biased(SCHEDULES["VP"])
    mended = make(model)
    eps = ef.noise.normal(5, range(len(DATA)), 0, (2,), torch.float64, stream=4)
    for t in TIMES:
        states = [model.schedule.add_noise(DATA, t, z) for z in (eps, -eps)]
        mean = torch.stack([model.score(x, t).mean(0) for x in states]).mean(0)
        fall = loss(model, t, DATA, eps) - loss(mended, t, DATA, eps)
        torch.testing.assert_close(fall, 0.5 * mean.square().sum(), rtol=1e-11, atol=1e-12)


def test_the_loss_falls_by_half_the_square_of_the_mean_score() -> None:
    check_loss(lambda model: calibrate(model, DATA, TIMES, seed=5))


def scaled(factor: float) -> Callable[[ef.Denoiser], ef.Denoiser]:
    def make(model: ef.Denoiser) -> ef.Denoiser:
        found = calibrate(model, DATA, TIMES, seed=5)
        return Calibrated(model, found.angles, factor * found.shift, found.labels)

    return make


MUTANTS: dict[str, Callable[[ef.Denoiser], ef.Denoiser]] = {
    "a thousandth too much": scaled(1.001),
    "the wrong sign": scaled(-1.0),
    "no correction": scaled(0.0),
    "other noise": lambda model: calibrate(model, DATA, TIMES, seed=6),
    "other times": lambda model: calibrate(model, DATA, [0.2, 0.4, 0.6, 0.8], seed=5),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(mutant: str) -> None:
    with pytest.raises(AssertionError):
        check_loss(MUTANTS[mutant])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_prediction_gives_the_same_corrected_model(schedule: str) -> None:
    """Between the measured times too, and for one time a sample."""
    times = torch.tensor([0.05, 0.2, 0.41, 0.63, 0.8, 0.97], dtype=torch.float64)
    first = calibrate(biased(SCHEDULES[schedule]), DATA[:200], TIMES)
    for kind in ("noise", "v", "score"):
        mended = calibrate(biased(SCHEDULES[schedule], kind), DATA[:200], TIMES)
        for call in ("forward", "noise", "score", "v", "velocity"):
            found, expected = (getattr(d, call)(X, times) for d in (mended, first))
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
            rows = [getattr(mended, call)(X[i : i + 1], t.item()) for i, t in enumerate(times)]
            torch.testing.assert_close(torch.cat(rows), found, rtol=1e-10, atol=1e-10)
        alpha, sigma = (f(times)[:, None] for f in (first.schedule.alpha, first.schedule.sigma))
        both = alpha * mended(X, times) + sigma * mended.noise(X, times)
        torch.testing.assert_close(both, X)


def test_alpha_times_the_score_is_a_martingale_of_the_reverse_process() -> None:
    """From one state, the mean of `alpha s` stays where it was; that of s alone does not."""
    schedule, n = SCHEDULES["VP"], 2000
    exact = LAW.denoiser(schedule)
    start = torch.tensor([0.8, -0.2], dtype=torch.float64).repeat(n, 1)
    nodes = torch.linspace(0.6, 0.1, 201, dtype=torch.float64).tolist()
    first = exact.score(start[:1], nodes[0])[0]
    levels = {t: schedule.alpha(t).item() for t in nodes}
    points = ef.trajectory(
        exact, (n, 2), solver="euler-maruyama", times=nodes, x_init=start, seed=2
    )
    for k, point in enumerate(points):
        if (k + 1) % 50:
            continue
        score = exact.score(point.state, point.time)
        martingale = levels[point.time] * score
        deviation = 4 * martingale.std(0) / n**0.5
        assert bool(((martingale.mean(0) - levels[0.6] * first).abs() < deviation).all())
    assert bool(((score.mean(0) - first).abs() > 2 * 4 * score.std(0) / n**0.5).any())


def test_samples_of_a_biased_model_are_mended() -> None:
    """The distance of its samples to those of the exact model falls at least tenfold."""
    schedule = SCHEDULES["Cosine"]
    start = ef.noise.normal(7, range(400), 0, (2,), torch.float64)
    model = biased(schedule, "v", 0.3)
    # At t = 1 the bias of x_0 would be infinite: start a little below.
    nodes = [t for t in ef.grids.angle(schedule, 21) if t < 0.97]
    asked = {"solver": "dpm-solver++2m", "times": nodes, "x_init": start}
    exact, before = (ef.sample(d, (400, 2), **asked) for d in (LAW.denoiser(schedule), model))
    mended = calibrate(model, LAW.sample(4000, seed=9), nodes[:-1])
    after = ef.sample(mended, (400, 2), **asked)
    distances = [(found - exact).norm(dim=1).mean().item() for found in (before, after)]
    assert distances[0] > 0.2
    assert distances[1] < 0.1 * distances[0]


def test_confidence_leaves_alone_what_cannot_be_told_from_zero() -> None:
    """The exact model, with few data: most of the noise in the correction is gone, and none of it
    is larger; of a large bias nearly all is still corrected."""
    few, exact = DATA[:100], LAW.denoiser(SCHEDULES["VP"])
    raw, shrunk = (calibrate(exact, few, TIMES, confidence=c).shift for c in (0.0, 2.0))
    assert shrunk.norm() < 0.5 * raw.norm()
    assert bool((shrunk.abs() <= raw.abs()).all())
    assert bool((shrunk * raw >= 0).all())
    model = biased(SCHEDULES["VP"])
    raw, shrunk = (calibrate(model, few, TIMES[1:], confidence=c) for c in (0.0, 2.0))
    ratio = (2 * raw.standard_error / raw.shift) ** 2
    torch.testing.assert_close(shrunk.shift, raw.shift * (1 - ratio).clamp(min=0))
    assert bool((ratio < 0.2).any())


def classes(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Wrong by another amount in every class; 2 is no class."""
    return 0.3 * x + torch.tensor([0.5, -1.0, 2.0])[label][:, None].to(x)


def test_each_class_has_its_own_correction() -> None:
    """After calibration the mean prediction of a class is the mean of its data."""
    schedule = SCHEDULES["VP"]
    model = ef.Denoiser(classes, schedule, shape=(2,))
    labels = torch.arange(len(DATA)) % 2
    data = DATA + 3.0 * labels[:, None]
    eps = ef.noise.normal(0, range(len(data)), 0, (2,), torch.float64, stream=4)
    mended = calibrate(model, data, TIMES, labels=labels, null=2)

    def mean(rows: Tensor, label: Tensor) -> Tensor:
        signs = [schedule.add_noise(data[rows], 0.5, z * eps[rows]) for z in (1, -1)]
        return torch.stack([mended(x, 0.5, label=label).mean(0) for x in signs]).mean(0)

    for c in (0, 1):
        rows = labels == c
        torch.testing.assert_close(mean(rows, labels[rows]), data[rows].mean(0))
    everything = torch.ones_like(labels, dtype=torch.bool)
    torch.testing.assert_close(mean(everything, torch.full_like(labels, 2)), data.mean(0))
    mixed = torch.tensor([0, 1, 2, 1, 0, 2])
    alone = [mended(X[i : i + 1], 0.5, label=mixed[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(mended(X, 0.5, label=mixed), torch.cat(alone))
    with pytest.raises(ValueError, match="label 7 was not calibrated"):
        mended(X, 0.5, label=torch.full((6,), 7))
    guided = ClassifierFree(mended, 2.0, {"label": 2})
    with_, without = (mended(X, 0.5, label=torch.full((6,), c)) for c in (1, 2))
    found = guided(X, 0.5, label=torch.ones(6, dtype=torch.long))
    torch.testing.assert_close(found, 2 * with_ - without)
    strict = calibrate(model, data, TIMES, labels=labels)
    with pytest.raises(ValueError, match="no label"):
        strict(X, 0.5)


def test_it_keeps_the_law_and_costs_nothing() -> None:
    model = biased(SCHEDULES["VP"])
    mended = calibrate(model, DATA[:50], 8)
    assert mended.statistics is model.statistics
    assert mended.passes(0.5) == 1
    assert ef.sample(mended, (3, 2), steps=4).shape == (3, 2)
    pushed = torch.func.jvp(lambda x: mended(x, 0.4), (X,), (torch.ones_like(X),))[1]
    expected = torch.func.jvp(lambda x: model(x, 0.4), (X,), (torch.ones_like(X),))[1]
    torch.testing.assert_close(pushed, expected)


def test_derivatives_in_time_and_vmap_pass_through() -> None:
    model = calibrate(biased(SCHEDULES["VP"]), DATA[:50], TIMES)
    times = torch.tensor([0.2, 0.85, 0.45, 0.55, 0.33, 0.72], dtype=torch.float64)
    for call in (model.forward, model.noise):
        slope = torch.func.jvp(lambda t, f=call: f(X, t), (times,), (torch.ones_like(times),))[1]
        around = (call(X, times + 1e-6) - call(X, times - 1e-6)) / 2e-6
        torch.testing.assert_close(slope, around, rtol=1e-5, atol=1e-6)
    mapped = torch.func.vmap(lambda x, t: model(x[None], t)[0])(X, times)
    torch.testing.assert_close(mapped, model(X, times))


def test_one_time_is_a_constant_and_the_ends_are_finite() -> None:
    for schedule in SCHEDULES.values():
        mended = calibrate(LAW.denoiser(schedule), DATA[:50], [0.5])
        for t in (0.0, 0.5, 1.0):
            assert bool(torch.isfinite(mended(X, t)).all())
        spread = calibrate(LAW.denoiser(schedule), DATA[:50], 6)
        assert len(spread.angles) in (6, 7)
        assert bool(torch.isfinite(spread(X, 1.0)).all())


def test_files_and_state(tmp_path: Path) -> None:
    model = biased(SCHEDULES["VP"])
    mended = calibrate(model, DATA[:50], TIMES, labels=None)
    mended.save(tmp_path)
    loaded = Calibrated.load(tmp_path, model)
    assert torch.equal(loaded(X, 0.37), mended(X, 0.37))
    blank = Calibrated(model, mended.angles, 0 * mended.shift, mended.labels)
    blank.load_state_dict(mended.state_dict())
    assert torch.equal(blank(X, 0.37), mended(X, 0.37))
    other = ef.Denoiser(lambda x, t: x, SCHEDULES["VP"], shape=(3,))
    with pytest.raises(ValueError, match="does not fit a denoiser of"):
        Calibrated.load(tmp_path, other)
    (tmp_path / "calibration.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="safetensors"):
        Calibrated.load(tmp_path, model)


def test_what_does_not_fit_is_refused() -> None:
    model = biased(SCHEDULES["VP"])
    with pytest.raises(ValueError, match="at least 2"):
        calibrate(model, DATA[:1])
    with pytest.raises(ValueError, match="without noise"):
        calibrate(model, DATA, [0.0, 0.5])
    with pytest.raises(ValueError, match="confidence"):
        calibrate(model, DATA, confidence=-1.0)
    with pytest.raises(ValueError, match="labels have shape"):
        calibrate(model, DATA, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="takes"):
        calibrate(model, DATA[:, :1])
    with pytest.raises(ValueError, match="rising"):
        Calibrated(model, torch.tensor([0.5, 0.5]), torch.zeros(1, 2, 2), torch.zeros(0))
