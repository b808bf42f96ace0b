"""The discretised reverse SDE, against the published updates written out; which of them DDPM is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

import ebbflow as ef
from ebbflow.plan import Plan
from ebbflow.schedules import Schedule
from tests.laws import mutants, reference
from tests.laws.cases import INEXACT, SCHEDULES, SOLVERS, uneven
from tests.laws.test_betas import DDPM

Update = tuple[float, float, float]
"""(on x, on the score, on the noise)."""

# f and g² of `dx = f x dt + g dW`, by hand.
RATES: dict[str, Callable[[float], tuple[float, float]]] = {
    "VP": lambda t: (-(0.1 + 19.9 * t) / 2, 0.1 + 19.9 * t),
    "VE": lambda t: (0.0, 2 * math.log(80 / 0.002) * (0.002 * (80 / 0.002) ** t) ** 2),
    "Linear": lambda t: (-1 / (1 - t), 2 * t / (1 - t)),
    "Cosine": lambda t: (
        -math.pi / 2 * math.tan(math.pi * t / 2),
        math.pi * math.tan(math.pi * t / 2),
    ),
}


def euler_maruyama(name: str, t: float, s: float) -> Update:
    f, g_squared = RATES[name](t)
    return 1 - (t - s) * f, (t - s) * g_squared, math.sqrt((t - s) * g_squared)


def reverse_diffusion(name: str, t: float, s: float) -> Update:
    """Equation 46: the kernel p(x_t | x_s) = N(r x_s, b) turned round."""
    now, then = reference.LEVELS[name](t), reference.LEVELS[name](s)
    r = now.alpha / then.alpha
    b = now.sigma**2 - r**2 * then.sigma**2
    return 2 - r, b, math.sqrt(b)


def sde_dpm_solver_1(name: str, t: float, s: float) -> Update:
    now, then = reference.LEVELS[name](t), reference.LEVELS[name](s)
    e = (then.alpha / then.sigma) / (now.alpha / now.sigma)
    on_noise = -2 * then.sigma * (e - 1)
    return then.alpha / now.alpha, -on_noise * now.sigma, then.sigma * math.sqrt(e**2 - 1)


UPDATES = {
    "euler-maruyama": euler_maruyama,
    "reverse-diffusion": reverse_diffusion,
    "sde-dpm-solver-1": sde_dpm_solver_1,
}


def rows(plan: Plan) -> np.ndarray:
    """Each step's update over (x, D, Z); score = (alpha D - x) / sigma²."""
    for stage in plan.stages:
        assert dict(stage.query) == {"x0": 1.0} and len(stage.update) == 1
    return np.array([[s.update[0].get(n, 0.0) for n in ("x0", "D", "Z")] for s in plan.stages])


def check(plan: Plan, schedule: str, nodes: Sequence[float], update: Callable) -> None:
    expected = []
    for t, s in itertools.pairwise(nodes):
        now = reference.LEVELS[schedule](t)
        x, score, z = update(schedule, t, s)
        expected.append([x - score / now.sigma**2, score * now.alpha / now.sigma**2, z])
    np.testing.assert_allclose([s.time for s in plan.stages], nodes[:-1], rtol=1e-14)
    np.testing.assert_allclose(rows(plan), expected, rtol=1e-7, atol=1e-12)


def test_no_inexact_method_is_without_its_law() -> None:
    assert set(UPDATES) == INEXACT


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", UPDATES)
def test_the_rows_are_the_published_update(name: str, schedule: str) -> None:
    nodes = uneven(6)
    check(SOLVERS[name].plan(SCHEDULES[schedule], times=nodes), schedule, nodes, UPDATES[name])


@pytest.mark.parametrize("name", UPDATES)
def test_every_mutant_is_seen(name: str) -> None:
    for mutant in [*mutants.systematic(name, 2), *mutants.isolated(name)]:
        with pytest.raises(AssertionError):
            check(mutant.rewrite(mutants.example(name)), "VP", uneven(6), UPDATES[name])
            pytest.fail(f"{mutant} survives", pytrace=False)


@pytest.mark.parametrize("name", UPDATES)
def test_ends_without_signal_or_noise_take_the_posterior(name: str) -> None:
    plan = SOLVERS[name].plan(SCHEDULES["Linear"], times=[1.0, 0.6, 0.0])
    assert dict(plan.stages[0].update[0]) == {"D": 0.4, "Z": 0.6}
    assert dict(plan.stages[1].update[0]) == {"D": 1.0}


def test_reverse_diffusion_of_a_chain_is_its_own_recursion() -> None:
    """`(2 - sqrt(1 - b)) x + b score + sqrt(b) z` with the chain's own betas."""
    schedule = ef.schedules.Betas(DDPM.tolist())
    indices = [999, 700, 400, 3]
    for i in indices:
        t, b = (i + 1) / 1000, DDPM[i].item()
        plan = SOLVERS["reverse-diffusion"].plan(schedule, times=[t, i / 1000])
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        expected = [2 - math.sqrt(1 - b) - b / sigma**2, b * alpha / sigma**2, math.sqrt(b)]
        np.testing.assert_allclose(rows(plan)[0], expected, rtol=1e-8)


def ancestral(schedule: Schedule, t: float, s: float) -> tuple[float, float, float]:
    """Ancestral sampling of Score-SDE over (x, D, Z): VE (appendix F), and VP by its posterior."""
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    alpha_s, sigma_s = schedule.alpha(s).item(), schedule.sigma(s).item()
    r = alpha / alpha_s
    b = sigma**2 - r**2 * sigma_s**2
    deviation = math.sqrt(sigma_s**2 / sigma**2 * b)
    # (x + b score) / r, the mean of both; r = 1 for VE, sqrt(1 - beta) for VP.
    return (1 - b / sigma**2) / r, b * alpha / sigma**2 / r, deviation


@pytest.mark.parametrize("schedule", ["VE", "VP", "Linear"])
def test_ddpm_is_ancestral_sampling(schedule: str) -> None:
    process, nodes = SCHEDULES[schedule], uneven(6)
    expected = [ancestral(process, t, s) for t, s in itertools.pairwise(nodes)]
    plan = SOLVERS["ddpm"].plan(process, times=nodes)
    np.testing.assert_allclose(rows(plan), expected, rtol=1e-9)
    slightly = mutants.scaled(plan, ("0", "Z"), mutants.SLIGHTLY)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(rows(slightly), expected, rtol=1e-9)


def test_the_first_stochastic_data_solver_is_ddpm() -> None:
    """SDE-DPM-Solver++(1), `(s'/s) e^-h x + a' (1 - e^-2h) D + s' sqrt(1 - e^-2h) z`, is no name
    of its own: it is DDPM, to the last coefficient."""
    twin = ef.solvers.get("sde-dpm-solver++2m", history=1)
    for process in SCHEDULES.values():
        nodes = uneven(6)
        known, other = SOLVERS["ddpm"].plan(process, times=nodes), twin.plan(process, times=nodes)
        for one, two in zip(known.stages, other.stages, strict=True):
            for key in ("x0", "D", "Z"):
                assert one.update[0][key] == pytest.approx(two.update[0][key], rel=1e-9)


def test_no_two_stochastic_solvers_are_one() -> None:
    """By their dense form on one grid."""
    nodes, process = uneven(6), SCHEDULES["VP"]
    names = [n for n, s in SOLVERS.items() if s.stochastic and not s.adaptive]
    forms = {}
    for name in names:
        dense = SOLVERS[name].plan(process, times=nodes).dense()
        covariance = dense.node_C @ dense.node_C.T
        forms[name] = torch.cat([dense.node_a, dense.node_B.flatten(), covariance.flatten()])
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            if len(forms[one]) == len(forms[two]):
                assert (forms[one] - forms[two]).abs().max() > 1e-3, f"{one} is {two}"


@pytest.mark.parametrize("name", UPDATES)
def test_a_step_is_a_gaussian_of_known_deviation(name: str) -> None:
    nodes = uneven(6)
    plan = SOLVERS[name].plan(SCHEDULES["VP"], times=nodes)
    for k, (t, s) in enumerate(itertools.pairwise(nodes)):
        deviation = UPDATES[name]("VP", t, s)[2]
        assert plan.transition(k).deviation == pytest.approx(deviation, rel=1e-9)


def test_the_noise_form_widens_a_point_mass_by_its_published_variance() -> None:
    """Of a point mass it makes `sigma'² (1 + 2 (e^h - 1)²)`: why the data form is preferred."""
    process, nodes = SCHEDULES["VP"], [0.6, 0.4]
    plan = SOLVERS["sde-dpm-solver-1"].plan(process, times=nodes)
    found = plan.moments(torch.tensor([0.8]), torch.tensor([0.0])).covariance.item()
    h = (process.log_snr(0.4) - process.log_snr(0.6)).item() / 2
    expected = process.sigma(0.4).item() ** 2 * (1 + 2 * math.expm1(h) ** 2)
    assert found == pytest.approx(expected, rel=1e-9)
