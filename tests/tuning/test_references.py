"""Converged samples, and errors to them."""

import pytest
import torch

import ebbflow as ef
from ebbflow.tuning import references


def gaussian():
    mean, variance = torch.tensor([[0.3, -0.2]]), torch.tensor([[[0.5, 0.1], [0.1, 0.05]]])
    return ef.oracles.GaussianMixture(mean, variance, [1.0])


@pytest.mark.parametrize("schedule", [ef.schedules.VP(), ef.schedules.Linear(), ef.schedules.VE()])
def test_references_are_the_exact_flow_of_a_gaussian(schedule, float64):
    law = gaussian()
    found = references(law.denoiser(schedule), count=70, tolerance=1e-7)
    statistics = ef.Statistics.exact(law.mean, law.covariance)
    alpha, sigma = schedule.alpha(1.0).item(), schedule.sigma(1.0).item()
    last = schedule.sigma(0.0).item()
    centred = statistics.scale(found.start - alpha * law.mean, alpha, sigma, -0.5)
    exact = law.mean + statistics.scale(centred, 1.0, last, 0.5)
    away = (found.end - exact).square().mean().sqrt() / found.deviation
    assert away < 1e-4
    assert found.uncertainty < 1e-5


def test_noise_is_not_the_noise_of_sample(float64):
    denoiser = gaussian().denoiser(ef.schedules.Linear())
    found = references(denoiser, count=4)
    with torch.no_grad():
        drawn = ef.trajectory(denoiser, (4, 2), times=[1.0, 0.999], solver="ddim")
    assert not torch.allclose(next(drawn).state, found.start, atol=0.1)


def test_errors_are_in_deviations_and_converge_with_the_steps(float64):
    denoiser = gaussian().denoiser(ef.schedules.VP())
    found = references(denoiser, count=80)
    errors = [
        found.errors(denoiser, ef.solvers.get("unipc-b2-2").plan(denoiser.schedule, n)).mean()
        for n in (24, 48)
    ]
    assert errors[1] < errors[0] / 3
    first, rest = found.split(30)
    assert len(first) == 30 and len(rest) == 50
    plan = ef.solvers.get("ddim").plan(denoiser.schedule, 4)
    together = torch.cat([first.errors(denoiser, plan), rest.errors(denoiser, plan)])
    assert torch.allclose(together, found.errors(denoiser, plan))


def test_conditions_are_given_in_turn(float64):
    seen = []

    def net(x, t, label, scale):
        seen.append(label)
        return x * scale * label[:, None]

    denoiser = ef.Denoiser(net, ef.schedules.Linear(), shape=(2,))
    label = torch.tensor([0.1, 0.2, 0.3])
    found = references(denoiser, count=5, condition={"label": label, "scale": 0.5}, most=16)
    assert torch.equal(seen[0], torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2]))
    assert found.rows(slice(3, 5)).condition["label"].tolist() == pytest.approx([0.1, 0.2])


def test_refusals():
    law = gaussian()
    bare = ef.Denoiser(lambda x, t: x, ef.schedules.Linear())
    with pytest.raises(ValueError, match="shape="):
        references(bare)
    with pytest.raises(ValueError, match="at least 2"):
        references(law.denoiser(ef.schedules.Linear()), count=1)
    point = ef.oracles.GaussianMixture([[0.5, 0.5]], [0.0], [1.0])
    with pytest.raises(ValueError, match="nothing to tune"):
        references(point.denoiser(ef.schedules.Linear()), count=4)
