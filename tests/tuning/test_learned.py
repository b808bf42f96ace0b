"""Tuned plans: better than every start, reproducible, resumable, and only for their own model."""

import copy

import pytest
import torch

import ebbflow as ef
from ebbflow.tuning import References

NFE = 5
BUDGET = 90_000


def mixture():
    """Three unequal Gaussians in the plane."""
    means = torch.tensor([[-0.9, 0.2], [0.6, -0.7], [0.7, 0.8]])
    covariances = torch.tensor([[[0.05, 0.02], [0.02, 0.03]]] * 2 + [[[0.02, 0.0], [0.0, 0.1]]])
    return ef.oracles.GaussianMixture(means, covariances, [0.5, 0.2, 0.3])


@pytest.fixture(scope="module")
def denoiser():
    made = mixture().denoiser(ef.schedules.Linear())
    made.statistics = ef.Statistics.from_data(mixture().sample(1000))
    return made


@pytest.fixture(scope="module")
def tuned(denoiser):
    return ef.tune(denoiser, NFE, budget_evaluations=BUDGET)


def errors(denoiser, plans):
    """Mean errors on the noise that `sample` draws."""
    shape = (400, *denoiser.shape)
    exact = ef.sample(denoiser, shape, solver="unipc-b2-3", steps=256)
    return [
        (ef.sample(denoiser, shape, plan=plan) - exact).square().mean(1).sqrt().mean().item()
        for plan in plans
    ]


def test_a_tuned_plan_beats_the_default_and_every_grid_of_2m(denoiser, tuned):
    """The issue asks for a fourth of the error of DPM-Solver++ 2M at its best grid."""
    grids = (ef.grids.log_snr, ef.grids.angle, ef.grids.karras, ef.grids.uniform, ef.grids.shifted)
    schedule = denoiser.schedule
    peers = [
        ef.solvers.get("dpm-solver++2m").plan(schedule, times=grid(schedule, NFE)) for grid in grids
    ]
    default = ef.solvers.get("auto").plan(schedule, NFE, statistics=denoiser.statistics)
    mine, plain, *others = errors(denoiser, [tuned, default, *peers])
    assert tuned.nfe == NFE
    assert mine < 0.25 * min(others)
    assert mine < 0.7 * plain


def test_its_record_says_what_it_is(tuned):
    origin = tuned.origin
    assert origin["solver"] == "tuned" and origin["start"]["solver"] == "gaussian-residual"
    assert origin["model"]["prediction"] == "x0" and origin["model"]["shape"] == [2]
    assert origin["held out"]["tuned"]["mean"] < origin["held out"]["gaussian-residual"]["mean"]
    assert 0.9 * BUDGET < origin["evaluations"] < 1.1 * BUDGET


def test_its_file_is_small_and_gives_it_back(tuned, tmp_path):
    tuned.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size < 8000
    assert ef.Plan.load(tmp_path / "plan.json") == tuned


def test_a_budget_of_evaluations_makes_it_reproducible(denoiser):
    one, other = (ef.tune(denoiser, 3, budget_evaluations=8000, seed=4) for _ in range(2))
    assert one == other
    assert ef.tune(denoiser, 3, budget_evaluations=8000, seed=5) != one


class Interrupted(Exception):
    pass


def test_it_goes_on_where_it_was_stopped(denoiser, tmp_path, monkeypatch):
    monkeypatch.setattr("ebbflow.tuning.learned.SAVE_EVERY", 0.0)
    file = tmp_path / "state.safetensors"
    calls, stop = 0, 0

    def stops(x, t):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted
        return denoiser.net(x, t)

    fragile = copy.copy(denoiser)
    fragile.net = stops
    whole = ef.tune(fragile, 3, budget_evaluations=20_000)
    calls, stop = 0, 3 * calls // 4
    with pytest.raises(Interrupted):
        ef.tune(fragile, 3, budget_evaluations=20_000, resume=file)
    assert file.exists()
    with pytest.raises(ValueError, match="another call"):
        ef.tune(denoiser, 4, budget_evaluations=20_000, resume=file)
    assert ef.tune(fragile, 3, budget_evaluations=20_000, resume=file) == whole
    assert not file.exists()


def test_what_is_exact_already_is_kept(float64):
    """A Gaussian with its own statistics: the start has no error, and nothing replaces it."""
    law = ef.oracles.GaussianMixture([[0.3, -0.2]], [[[0.5, 0.1], [0.1, 0.05]]], [1.0])
    gaussian = law.denoiser(ef.schedules.VP(), statistics=True)
    plan = ef.tune(gaussian, 3, budget_evaluations=5000)
    found = plan.origin["held out"]
    assert found["tuned"]["mean"] <= found["gaussian-residual"]["mean"] < 1e-4


@pytest.mark.parametrize("name", ["dpm-solver++2m", "heun", "deis-tab2"])
def test_any_deterministic_plan_can_be_the_start(denoiser, name):
    plan = ef.tune(denoiser, 4, start=name, budget_evaluations=40_000)
    found = plan.origin["held out"]
    assert found["tuned"]["mean"] < 0.9 * found[name]["mean"]


def test_the_start_may_be_a_plan_in_numbers_or_by_coordinate(denoiser):
    for name, statistics in (("ddim", None), ("gaussian-residual", denoiser.statistics)):
        start = ef.solvers.get(name).plan(denoiser.schedule, 3, statistics=statistics)
        plan = ef.tune(denoiser, start=start, budget_evaluations=15_000)
        assert plan.nfe == 3
        assert plan.origin["held out"]["tuned"]["mean"] <= plan.origin["held out"][name]["mean"]


def test_a_tuned_plan_can_be_gone_on_with(denoiser):
    first = ef.tune(denoiser, 4, budget_evaluations=10_000)
    second = ef.tune(denoiser, start=first, budget_evaluations=40_000, seed=1)
    found = second.origin["held out"]
    assert found["tuned"]["mean"] < 0.95 * found["start"]["mean"]
    assert second != first and second.origin["start"]["solver"] == "tuned"


def test_conditions_and_guidance():
    """Two classes under guidance, without statistics: one variance for all coordinates."""
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 0.0]])

    def net(x, t, label):
        alpha, sigma = 1 - t[:, None], t[:, None]
        variance = torch.where(label == 2, 1.0, 0.2)[:, None]
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return centres[label] + gain * (x - alpha * centres[label])

    inner = ef.Denoiser(net, ef.schedules.Linear(), shape=(2,))
    guided = ef.guidance.ClassifierFree(inner, 2.0, null={"label": 2})
    plan = ef.tune(guided, 4, budget_evaluations=30_000, label=torch.tensor([0, 1]))
    found = plan.origin["held out"]
    assert found["tuned"]["mean"] < 0.5 * found["dpm-solver++2m"]["mean"]
    assert plan.origin["model"]["wrappers"] == [{"wrapper": "ClassifierFree", "scale": 2.0}]
    assert plan.origin["condition"] == {"label": [0, 1]}


def test_features_decide_what_counts(denoiser):
    """Errors of the first coordinate alone."""

    def first(samples):
        return samples[:, :1]

    plan = ef.tune(denoiser, 3, budget_evaluations=60_000, features=first)
    found = ef.tuning.references(denoiser, count=50, most=64, features=first)
    start = ef.solvers.get("auto").plan(denoiser.schedule, 3, statistics=denoiser.statistics)
    samples = start.run(denoiser, found.start)
    apart = (samples - found.samples)[:, 0].abs() / found.samples[:, 0].std(correction=0)
    torch.testing.assert_close(found.errors(denoiser, start), apart, rtol=1e-4, atol=1e-6)
    assert found.errors(denoiser, plan).mean() < found.errors(denoiser, start).mean()


def test_another_prediction_schedule_or_shape_is_refused(denoiser, tuned):
    for other, field in (
        (ef.Denoiser(denoiser.net, ef.schedules.Linear(), "velocity", shape=(2,)), "prediction"),
        (ef.Denoiser(denoiser.net, ef.schedules.Linear(), shape=None), None),
        (ef.Denoiser(denoiser.net, ef.schedules.VP(), shape=(2,)), "made for Linear"),
        (ef.Denoiser(denoiser.net, ef.schedules.Linear(), shape=(3,)), "shape"),
    ):
        size = 3 if field == "shape" else 2
        if field is None:
            ef.sample(other, (2, size), plan=tuned)
            continue
        with pytest.raises(ValueError, match=field):
            ef.sample(other, (2, size), plan=tuned)


def test_refusals(denoiser):
    small = {"budget_evaluations": 3000}
    with pytest.raises(ValueError, match="nfe is 1"):
        ef.tune(denoiser, 1, **small)
    with pytest.raises(ValueError, match="draws noise"):
        ef.tune(denoiser, 4, start="ddpm", **small)
    with pytest.raises(ValueError, match="genie is no plan"):
        ef.tune(denoiser, 4, start="genie", **small)
    with pytest.raises(ValueError, match="unknown solver 'autoo'"):
        ef.tune(denoiser, 4, start="autoo", **small)
    with pytest.raises(ValueError, match="budget of evaluations is -1"):
        ef.tune(denoiser, 4, budget_evaluations=-1)
    other = ef.solvers.get("ddim").plan(ef.schedules.VP(), 4)
    with pytest.raises(ValueError, match="start lives on VP"):
        ef.tune(denoiser, start=other, **small)


def test_references_can_be_shared(denoiser):
    """The same converged samples serve the searches and the fit."""
    assert isinstance(ef.tuning.references(denoiser, count=8, most=16), References)


def test_a_model_without_statistics_learns_them_from_its_samples(denoiser):
    """Only where all samples follow one law: a mixture of conditions would mislead."""
    bare = copy.copy(denoiser)
    bare.statistics = None
    plan = ef.tune(bare, 4, budget_evaluations=40_000)
    assert plan.origin["start"]["solver"] == "gaussian-residual" and plan.basis is not None

    def net(x, t, label):
        return denoiser.net(x, t) + 0 * label[:, None]

    mixed = ef.Denoiser(net, denoiser.schedule, shape=(2,))
    labels = torch.tensor([0.0, 1.0])
    plan = ef.tune(mixed, 4, budget_evaluations=10_000, label=labels)
    assert plan.basis is None
    plan = ef.tune(mixed, 4, budget_evaluations=10_000, label=labels[:1])
    assert plan.basis is not None
