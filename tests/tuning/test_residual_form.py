"""Plans in residual form: the same plan, differentiable, free of units."""

import pytest
import torch

import ebbflow as ef
from ebbflow.bases import Basis
from ebbflow.tuning.fit import Directions
from ebbflow.tuning.learned import axes
from ebbflow.tuning.passage import Frame
from ebbflow.tuning.references import references
from ebbflow.tuning.residual_form import Axes, Parameters, ResidualForm

PLANS = ("dpm-solver++2m", "unipc-b2-3", "deis-tab3", "heun", "f-pndm", "dpm-solver++3s", "ghvb3")
SCHEDULES = (ef.schedules.VP(), ef.schedules.Cosine(), ef.schedules.VE(), ef.schedules.Linear())


def law(scale=1.0):
    means = scale * torch.tensor([[-0.8, 0.1], [0.7, -0.4]])
    covariances = scale**2 * torch.tensor([[[0.2, 0.05], [0.05, 0.04]], [[0.03, 0.0], [0.0, 0.3]]])
    return ef.oracles.GaussianMixture(means, covariances, [0.4, 0.6])


def isotropic(variance=0.6):
    value = torch.tensor(variance, dtype=torch.float64)
    return Axes(Basis("identity", ()), 0 * value, value)


def principal():
    statistics = ef.Statistics.from_data(law().sample(500))
    return Axes(statistics.axes, statistics.mean @ statistics.basis, statistics.variance)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("coordinates", [isotropic, principal], ids=["one variance", "two"])
def test_the_form_of_a_plan_is_the_plan(schedule, name, coordinates, float64):
    denoiser = law().denoiser(schedule)
    nodes = torch.linspace(0.97, 0.05, 8).tolist()
    plan = ef.solvers.get(name).plan(schedule, times=nodes)
    form = ResidualForm.of(plan, coordinates())
    x = torch.randn(6, 2)
    written = form.plan(form.first)
    assert written.nfe == plan.nfe
    scale = form.offset.abs().max().item() + 1
    torch.testing.assert_close(
        written.run(denoiser, x), plan.run(denoiser, x), rtol=0, atol=1e-11 * scale
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_default_is_its_form_and_the_analytic_start_is_kept(schedule, float64):
    denoiser = law().denoiser(schedule, statistics=True)
    plan = ef.solvers.get("auto").plan(schedule, 6, statistics=denoiser.statistics)
    found = references(denoiser, count=8, most=16)
    form = ResidualForm.of(plan, axes(plan, found, denoiser.statistics))
    assert torch.allclose(form.gain, torch.ones_like(form.gain))
    assert form.shift.abs().max() < 1e-9
    ends = [p.run(denoiser, found.start) for p in (plan, form.plan(form.first))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


@pytest.mark.parametrize("coordinates", [isotropic, principal], ids=["one variance", "two"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_frame_runs_the_plan_and_again_from_where_it_differs(schedule, coordinates, float64):
    denoiser = law().denoiser(schedule)
    plan = ef.solvers.get("dpm-solver++2m").plan(schedule, times=[0.9, 0.6, 0.4, 0.2, 0.1])
    form = ResidualForm.of(plan, coordinates())
    frame = Frame(form, denoiser, references(denoiser, count=5, most=16))
    base = frame.run(form.first)
    both = plan.run(denoiser, frame.part.start), base.sample
    torch.testing.assert_close(*both, rtol=0, atol=1e-10)
    free = Directions(form)
    assert len(free) == 1 + 3 + 5 + 10 * (1 + (coordinates is principal))
    for move, first in zip(torch.eye(len(free)), free.first, strict=True):
        moved = free.moved(form.first, 0.1 * move)
        found = frame.run(moved, base, first).sample
        whole = form.plan(moved).run(denoiser, frame.part.start)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)
        assert first == form.nfe or not torch.equal(frame.run(moved, base, first + 1).sample, whole)


def test_times_fall_whatever_the_parameters(float64):
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        schedule = SCHEDULES[seed % 4]
        plan = ef.solvers.get("ddim").plan(schedule, times=[0.95, 0.7, 0.4, 0.2, 0.05])
        form = ResidualForm.of(plan, isotropic())
        noisy = {
            name: leaf + 3 * torch.randn(leaf.shape, generator=generator)
            for name, leaf in form.first.copy().tensors().items()
        }
        times = form.times(Parameters(**noisy))
        assert bool((times.diff() <= 0).all()) and 0 <= float(times[-1]) <= float(times[0]) <= 1
        form.plan(Parameters(**noisy))  # whose nodes are checked


def test_nothing_depends_on_the_unit_of_the_data(float64):
    """Data and noise ten times as large: the same parameters mean the same plan."""
    ends = []
    for scale in (1.0, 10.0):
        schedule = ef.schedules.VE(0.002 * scale, 80 * scale)
        denoiser = law(scale).denoiser(schedule)
        plan = ef.solvers.get("unipc-b2-2").plan(schedule, times=[1.0, 0.7, 0.5, 0.3, 0.1])
        form = ResidualForm.of(plan, isotropic(0.6 * scale**2))
        moved = form.first.copy().tensors()
        moved["gaps"] = moved["gaps"] + torch.linspace(0.3, -0.3, 3)
        moved["matrix"] = moved["matrix"] + 0.05
        moved["gain"] = moved["gain"] + 0.02
        moved["top"] = moved["top"] - 1
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)) * 80
        ends.append(form.plan(Parameters(**moved)).run(denoiser, scale * x) / scale)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


def test_refusals(float64):
    schedule = ef.schedules.VP()
    with pytest.raises(ValueError, match="ddpm draws noise"):
        ResidualForm.of(ef.solvers.get("ddpm").plan(schedule, 4), isotropic())
    inverse = ef.solvers.get("ddim").plan(schedule, times=[0.1, 0.5, 0.9])
    with pytest.raises(ValueError, match="towards noise"):
        ResidualForm.of(inverse, isotropic())
