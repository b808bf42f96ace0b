"""A polished plan: nearer to the data, no further from itself than it may, and no dearer."""

import pytest
import torch

import ebbflow as ef

TARGET = 0.55


@pytest.fixture(scope="module")
def model():
    """Its samples have deviation 0.5 along both axes; the data are a little wider."""
    mean, covariance = torch.tensor([[0.2, -0.1]]), 0.25 * torch.eye(2)[None]
    law = ef.oracles.GaussianMixture(mean, covariance, torch.ones(1))
    return law.denoiser(ef.schedules.VP())


@pytest.fixture(scope="module")
def plan(model):
    return ef.solvers.get("dpm-solver++2m").plan(model.schedule, 6)


def wider(samples):
    return abs(samples.std(0).mean().item() - TARGET)


def both(model, *plans):
    return [ef.sample(model, (400, 2), plan=plan) for plan in plans]


def test_it_is_nearer_by_what_it_may_be(model, plan):
    """Deviations go up by 0.02 of themselves, of the tenth that they lack."""
    found = ef.tuning.polish(model, plan, wider, departure=0.02)
    before, after = both(model, plan, found)
    moved = (after - before).square().mean().sqrt() / before.std(0).mean()
    assert 0.017 < moved < 0.022
    assert wider(before) - wider(after) > 0.9 * 0.02 * before.std(0).mean()
    assert found.nfe == plan.nfe
    record = found.origin["polished"]
    assert record["distance"] < record["distance before"] and record["departure"] == pytest.approx(
        moved.item(), rel=0.1
    )


def test_it_stops_at_the_data(model, plan):
    """More than enough leave does not carry it far beyond."""
    found = ef.tuning.polish(model, plan, wider, departure=0.2)
    assert wider(both(model, found)[0]) < 0.6 * wider(both(model, plan)[0])


def test_it_is_kept_where_nothing_is_gained(model, plan):
    assert ef.tuning.polish(model, plan, lambda samples: 1.0) is plan


def test_plans_by_coordinate_and_conditions(model):
    known = ef.Statistics.exact(torch.tensor([0.2, -0.1]), 0.25 * torch.eye(2))
    denoiser = ef.Denoiser(
        lambda x, t, label: model.net(x, t) + 0 * label[:, None],
        model.schedule,
        model.prediction,
        shape=(2,),
        statistics=known,
    )
    plan = ef.solvers.get("gaussian-residual").plan(model.schedule, 4, statistics=known)
    labels = torch.tensor([0.0, 1.0])
    found = ef.tuning.polish(denoiser, plan, wider, departure=0.02, label=labels)
    assert found.origin["polished"]["distance"] < found.origin["polished"]["distance before"]


def test_refusals(model, plan):
    with pytest.raises(ValueError, match="departure is 0"):
        ef.tuning.polish(model, plan, wider, departure=0.0)
    with pytest.raises(ValueError, match="samples is 2"):
        ef.tuning.polish(model, plan, wider, samples=2)
