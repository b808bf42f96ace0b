"""Plans that hold about the mean of each sample's condition."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.centred import Centred
from ebbflow.schedules import Schedule

SCHEDULES = (ef.schedules.VP(), ef.schedules.Cosine(), ef.schedules.Linear(), ef.schedules.VE())
SOLVERS = ("unit-residual", "dpm-solver++2m", "unipc-b2-3", "heun", "ddpm")
MEANS = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 4.0, 1.0], [0.0, 0.5, -6.0]], dtype=torch.float64)
SPREAD = torch.tensor([0.6, 1.0, 0.3], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1, 0])


def classes(schedule: Schedule, means: Tensor = MEANS, variance: Tensor = SPREAD) -> ef.Denoiser:
    """A Gaussian a class, `N(means[label], variance)`, whose statistics know the means."""

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (f(t.double())[:, None] for f in (schedule.alpha, schedule.sigma))
        m = torch.cat([means, means.mean(0, keepdim=True)])[label]
        return m + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * m)

    parts = [ef.Statistics(m, variance, torch.eye(3, dtype=torch.float64)) for m in means]
    whole = ef.Statistics(means.mean(0), variance, torch.eye(3, dtype=torch.float64))
    known = replace(whole, classes=dict(enumerate(parts)))
    return ef.Denoiser(net, schedule, shape=(3,), statistics=known)


def noise(schedule: Schedule) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(len(LABELS), 3, generator=generator, dtype=torch.float64)
    return z * schedule.sigma(1.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_centred_plan_samples_the_law_less_its_mean(name: str, schedule: Schedule) -> None:
    plan = replace(ef.solvers.get(name).plan(schedule, 7), centred=True)
    assert replace(plan, centred=False) != plan
    denoiser, x1 = classes(schedule), noise(schedule)
    m = MEANS[LABELS]
    about_zero = classes(schedule, torch.zeros_like(MEANS))
    begin = schedule.alpha(plan.start) * m
    expected = replace(plan, centred=False).run(about_zero, x1 - begin, label=LABELS)
    found = plan.run(denoiser, x1, label=LABELS)
    torch.testing.assert_close(found, m + expected, rtol=1e-11, atol=1e-11)
    if plan.stochastic:
        return
    steps = list(plan.execute(denoiser, x1, label=LABELS))
    others = replace(plan, centred=False).execute(about_zero, x1 - begin, label=LABELS)
    for step, other in zip(steps, others, strict=True):
        node = plan.stages[step.stage].node
        torch.testing.assert_close(step.prediction, m + other.prediction, rtol=1e-10, atol=1e-10)
        if node is not None:
            assert step.state is not None and other.state is not None
            there = schedule.alpha(node) * m + other.state
            torch.testing.assert_close(step.state, there, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda s: type(s).__name__)
def test_auto_is_exact_for_classes_of_unit_variance_in_one_step(schedule: Schedule) -> None:
    denoiser = classes(schedule, variance=torch.ones(3, dtype=torch.float64))
    x1, m = noise(schedule), MEANS[LABELS]
    alpha, sigma = (f(1.0).item() for f in (schedule.alpha, schedule.sigma))
    exact = m + (x1 - alpha * m) / math.hypot(alpha, sigma)
    found = ef.sample(denoiser, (5, 3), steps=1, x_init=x1, label=LABELS)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_moments_of_a_centred_plan_are_those_of_what_it_samples(schedule: Schedule) -> None:
    plan = replace(ef.solvers.get("unit-residual").plan(schedule, 5), centred=True)
    denoiser = classes(schedule)
    where = torch.tensor([0])
    zero = torch.zeros(1, 3, dtype=torch.float64)
    rest = plan.run(denoiser, zero, label=where)
    unit = torch.eye(3, dtype=torch.float64)
    slope = plan.run(denoiser, unit, label=where.expand(3)) - rest
    alpha, sigma = schedule.alpha(1.0), schedule.sigma(1.0)
    begin = torch.diag(alpha**2 * SPREAD + sigma**2)
    found = plan.moments(MEANS[0], SPREAD)
    torch.testing.assert_close(found.mean, (rest + alpha * MEANS[:1] @ slope)[0])
    torch.testing.assert_close(found.covariance, slope.T @ begin @ slope)


def test_every_prediction_of_a_centred_denoiser_is_that_of_the_shifted_law() -> None:
    for schedule in SCHEDULES:
        about_zero = classes(schedule, torch.zeros_like(MEANS))
        x = noise(schedule)
        for t in (0.2, torch.tensor([0.9, 0.1, 0.5, 0.3, 0.6], dtype=torch.float64)):
            for target in ("x0", "noise", "v", "score", "velocity"):
                found = Centred(classes(schedule)).at(t, x, target)(x, label=LABELS)
                exact = about_zero.at(t, x, target)(x, label=LABELS)
                torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_guidance_knows_what_it_predicts_of_pure_noise() -> None:
    schedule = ef.schedules.Cosine()
    guided = ef.guidance.ClassifierFree(classes(schedule), 2.5, null={"label": 3})
    x = noise(schedule)
    mean = guided.mean(x, label=LABELS)
    torch.testing.assert_close(mean, guided(x, 1.0, label=LABELS))
    torch.testing.assert_close(mean, MEANS.mean(0) + 2.5 * (MEANS[LABELS] - MEANS.mean(0)))


def test_weights_of_classes_have_the_mean_of_their_mixture() -> None:
    denoiser, x = classes(ef.schedules.VP()), torch.zeros(5, 3)
    weights = torch.eye(4)[LABELS]
    torch.testing.assert_close(denoiser.mean(x, label=weights), MEANS[LABELS].float())
    found = denoiser.mean(x[:1], label=torch.tensor([[0.5, 0.25, 0.0, 0.25]]))
    exact = 0.5 * MEANS[0] + 0.25 * MEANS[1] + 0.25 * MEANS.mean(0)
    torch.testing.assert_close(found, exact[None].float())


def test_parallel_sampling_and_all_gradients_agree_with_the_plain_run() -> None:
    schedule = ef.schedules.VP()
    denoiser, x1 = classes(schedule), noise(schedule)
    plain = ef.sample(denoiser, (5, 3), steps=6, x_init=x1, label=LABELS)
    together = ef.parallel(denoiser, (5, 3), steps=6, x_init=x1, label=LABELS, tolerance=1e-12)
    torch.testing.assert_close(together.samples, plain, rtol=1e-8, atol=1e-8)
    found = []
    for mode in ("direct", "checkpoint", "reversible"):
        x = x1.clone().requires_grad_()
        out = ef.sample(denoiser, (5, 3), steps=6, x_init=x, label=LABELS, gradient=mode)
        torch.testing.assert_close(out.detach(), plain)
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_it_is_saved_and_refused_where_no_mean_is_known(tmp_path: Path) -> None:
    schedule = ef.schedules.Cosine()
    plan = replace(ef.solvers.get("ddim").plan(schedule, 3), centred=True)
    plan.save(tmp_path / "plan.json")
    assert ef.Plan.load(tmp_path / "plan.json") == plan
    broken = {**plan.to_config(), "centred": "yes"}
    with pytest.raises(ValueError, match="centred is 'yes'"):
        ef.Plan.from_config(broken)
    unknown = ef.Denoiser(lambda x, t: x, schedule, shape=(3,))
    with pytest.raises(ValueError, match="give it statistics="):
        plan.run(unknown, torch.zeros(2, 3))


def test_tuning_on_several_classes_centres_the_plan() -> None:
    schedule = ef.schedules.Linear()
    denoiser = classes(schedule, variance=torch.full((3,), 0.4, dtype=torch.float64))
    plan = ef.tune(
        denoiser, 2, budget_evaluations=4e4, label=torch.arange(3), samples=48, start="ddim"
    )
    assert plan.centred
    found = plan.origin["held out"]
    assert found["tuned"]["mean"] < 0.05 * found["ddim"]["mean"]
    x1 = noise(schedule)
    exact = MEANS[LABELS] + 0.4**0.5 * x1
    error = ef.sample(denoiser, (5, 3), plan=plan, x_init=x1, label=LABELS) - exact
    assert error.abs().max() < 0.05
