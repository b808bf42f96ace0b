"""Solvers on reversed times, fixed points and ReNoise: each at its order or rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import ebbflow as ef
from ebbflow.inversion.fixed_point import FixedPoint
from tests.laws.cases import SCHEDULES, interior, oracle


@pytest.mark.parametrize("schedule", ["VP", "Cosine", "Linear"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++2m"])
def test_a_solver_returns_at_its_order(solver: str, schedule: str) -> None:
    law = oracle("gaussian")
    denoiser, x0 = law.denoiser(SCHEDULES[schedule]), law.sample(8, seed=1)
    errors = [
        ef.invert(
            denoiser, x0, method="reversed", solver=solver, times=interior(n)[::-1]
        ).round_trip_error.item()
        for n in (384, 768)
    ]
    assert math.log2(errors[0] / errors[1]) > ef.solvers.get(solver).order - 0.25, errors


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_fixed_point_inverts_ddim_to_round_off(schedule: str) -> None:
    law = oracle("gaussian")
    denoiser, x0 = law.denoiser(SCHEDULES[schedule]), law.sample(8, seed=1)
    errors = [
        ef.invert(denoiser, x0, method=FixedPoint("few", calls), steps=50).round_trip_error.item()
        for calls in (1, 2, 4, 20)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-10
    averaged = FixedPoint("renoise", 30, (20, 30))
    assert ef.invert(denoiser, x0, method=averaged, steps=50).round_trip_error < 1e-10


def test_noise_predictions_end_before_there_is_no_signal() -> None:
    law, process = oracle("mixture"), ef.schedules.Cosine()
    own = law.denoiser(process)
    noise = ef.Denoiser(own.noise, process, "noise")
    for method in ("reversed", "fixed-point", "renoise"):
        assert ef.invert(own, law.sample(4), method=method, steps=10).times[-1] == 1
        found = ef.invert(noise, law.sample(4), method=method, steps=10)
        assert found.times[-1] == pytest.approx(0.9) and found.x1.isfinite().all()
        assert found.start == pytest.approx(0.05)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="need 1 <= first <= last <= calls"):
        replace(FixedPoint("x", 3), average=(2, 5))
    law = oracle("mixture")
    denoiser = law.denoiser(ef.schedules.Cosine())
    with pytest.raises(ValueError, match="stochastic: it cannot run towards noise"):
        ef.invert(denoiser, law.sample(2), method="reversed", solver="ddpm")
