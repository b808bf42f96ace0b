"""Fits: columns are derivatives, steps are least squares, rows are regressions."""

from dataclasses import replace

import pytest
import torch

import ebbflow as ef
from ebbflow.bases import Basis
from ebbflow.tuning.budget import Budget
from ebbflow.tuning.fit import Directions, Fit, score, weights
from ebbflow.tuning.passage import Frame
from ebbflow.tuning.references import references
from ebbflow.tuning.regression import Paths, regress
from ebbflow.tuning.residual_form import Axes, ResidualForm

N = 4


@pytest.fixture
def case(float64):
    means = torch.tensor([[-0.8, 0.1], [0.7, -0.4]])
    covariances = torch.tensor([[[0.2, 0.05], [0.05, 0.04]], [[0.03, 0.0], [0.0, 0.3]]])
    denoiser = ef.oracles.GaussianMixture(means, covariances, torch.tensor([0.4, 0.6])).denoiser(
        ef.schedules.Linear()
    )
    variance = torch.tensor(0.5, dtype=torch.float64)
    axes = Axes(Basis("identity", ()), 0 * variance, variance)
    plan = ef.solvers.get("dpm-solver++2m").plan(denoiser.schedule, N)
    form = ResidualForm.of(plan, axes)
    return form, denoiser, references(denoiser, count=48, most=64)


def fit_of(form, denoiser, found):
    held_out, train = found.split(16)
    return Fit(form, denoiser, train, held_out, 1e9, 0, form.first)


def test_columns_are_derivatives(case):
    """Against central differences of the plan itself."""
    form, denoiser, found = case
    fit = fit_of(form, denoiser, found)
    frame = Frame(form, denoiser, found.rows(slice(5)))
    columns, lack = fit._columns(frame, frame.run(form.first))
    unit = found.deviation * 2**0.5
    ends = frame.part.end - form.plan(form.first).run(denoiser, frame.part.start)
    torch.testing.assert_close(lack, ends / unit, rtol=0, atol=1e-10)
    h = 1e-5
    for p, move in enumerate(torch.eye(len(fit.directions))):
        moved = [fit.directions.moved(form.first, s * h * move) for s in (1, -1)]
        ends = [form.plan(m).run(denoiser, frame.part.start) for m in moved]
        slope = (ends[0] - ends[1]) / (2 * h * unit)
        assert (columns[..., p] - slope).norm() < 0.1 * slope.norm(), fit.directions.places[p]


def test_weights_point_where_the_score_falls(float64):
    """With them, half the gradient of the sum of squares is the gradient of the score, but for the
    floor under small errors."""
    errors = (1 + torch.rand(50)).requires_grad_()
    (slope,) = torch.autograd.grad(
        0.6 * errors.mean().log() + 0.2 * errors.square().mean().log(), errors
    )
    h = 1e-6 * slope
    fall = score((errors + h).detach()) - score((errors - h).detach())
    assert fall == pytest.approx(2 * float(slope @ h), rel=1e-5)
    found = 2 * weights(errors.detach()) * errors.detach() / len(errors)
    assert float((found / slope).min()) > 0.9 and float((found / slope).max()) < 1.0 + 1e-9
    wild = torch.cat([torch.ones(49), torch.tensor([1000.0])])
    influence = weights(wild) * wild
    assert influence[-1] < 12 * influence[0]


def test_steps_go_down_and_beat_the_start(case):
    form, denoiser, found = case
    fit = fit_of(form, denoiser, found)
    for _ in fit.run(Budget(1e9, 40_000)):
        pass
    errors = [
        fit.held_out.errors(denoiser, form.plan(p)).mean().item() for p in (form.first, fit.best)
    ]
    assert errors[1] < 0.25 * errors[0]


def test_rows_are_regressions(case):
    """Each row is a least squares: what it leaves of the path is orthogonal to what it may use."""
    form, denoiser, found = case
    frame = Frame(form, denoiser, found)
    paths = Paths(frame, denoiser)
    parameters, sample = regress(frame, paths, form.levels(form.first))
    again = frame.run(parameters)
    torch.testing.assert_close(again.sample, sample, rtol=0, atol=1e-9)
    left = (found.samples - sample).flatten()
    scale = frame.scale(form.end)[1]
    for column in (frame.start, *again.residuals):
        column = (scale * column).flatten()
        assert abs(float(left @ column / (left.norm() * column.norm()))) < 1e-5
    directions = Directions(form)
    last = [p for p, first in enumerate(directions.first) if first == form.nfe]
    assert len(last) == 1 + N
    for move in 0.01 * torch.eye(len(directions))[last]:
        other = frame.run(directions.moved(parameters, move), again, form.nfe).sample
        assert found.distance(other).square().mean() > found.distance(sample).square().mean()


def test_paths_are_those_of_the_model(case):
    """Against a finer solver stopped at the level."""
    form, denoiser, found = case
    frame = Frame(form, denoiser, found)
    paths = Paths(frame, denoiser)
    schedule = form.schedule
    for t in (0.8, 0.45, 0.2):
        nodes = torch.linspace(1.0, t, 300).tolist()
        exact = ef.solvers.get("unipc-b2-3").plan(schedule, times=nodes).run(denoiser, found.start)
        level = -schedule.log_snr(t).item() / 2
        assert (paths.at(level) - frame.inside(exact, t)).square().mean().sqrt() < 0.004


def test_a_centred_form_runs_about_the_means(float64):
    """Two classes far apart: the frame is the plan, whose samples are those of the classes."""
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.5]], dtype=torch.float64)

    def net(x, t, label):
        alpha, sigma = 1 - t[:, None], t[:, None]
        gain = alpha * 0.2 / (alpha**2 * 0.2 + sigma**2)
        return centres[label] + gain * (x - alpha * centres[label])

    classes = {
        k: ef.Statistics(c, torch.full((2,), 0.2), torch.eye(2).double())
        for k, c in enumerate(centres)
    }
    statistics = ef.Statistics(centres.mean(0), torch.ones(2), torch.eye(2).double(), 0.0, classes)
    denoiser = ef.Denoiser(net, ef.schedules.Linear(), shape=(2,), statistics=statistics)
    plan = replace(ef.solvers.get("unit-residual").plan(denoiser.schedule, 4), centred=True)
    found = references(denoiser, count=6, most=32, condition={"label": torch.tensor([0, 1])})
    variance = torch.tensor(0.2, dtype=torch.float64)
    form = ResidualForm.of(plan, Axes(Basis("identity", ()), 0 * variance, variance))
    frame = Frame(form, denoiser, found)
    run = frame.run(form.first)
    exact = plan.run(denoiser, found.start, **found.condition)
    torch.testing.assert_close(run.sample, exact, rtol=0, atol=1e-10)
    # Gaussian about their means, of the very variance: nothing is left to say, and rows are exact.
    assert max(r.abs().max() for r in run.residuals) < 1e-9
    _, sample = regress(frame, Paths(frame, denoiser), form.levels(form.first))
    torch.testing.assert_close(sample, found.samples, rtol=0, atol=1e-4)
