"""Law 4: a plan is exact for a prediction that does not change.

With constant D and eps every node and every query is `alpha D + sigma eps`; with noise, a point
mass at D keeps its mean alpha D and its variance sigma². Methods in time t integrate that exactly
where it is straight in t. Both are read off the plan's dense form, and checked on a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.plan import Plan
from ebbflow.schedules import Betas, Schedule
from tests.laws import cases, mutants
from tests.laws.cases import GAUSSIAN, IN_TIME, INEXACT, SOLVERS, Maker
from tests.laws.test_betas import DDPM, zero_terminal

EVERYWHERE: dict[str, Schedule] = {
    **cases.SCHEDULES,
    "Betas": Betas(DDPM.tolist()),
    "Betas to no signal": Betas(zero_terminal(DDPM).tolist()),
}

# Families have members that are not in the list; they obey the same law.
VARIANTS = {
    "ddim eta 0.5": ef.solvers.get("ddim", eta=0.5),
    "2M half-way to the SDE": ef.solvers.get("dpm-solver++2m", tau=0.5),
    "3M as an SDE": ef.solvers.get("dpm-solver++3m", tau=1.0),
    "EDM, churn in a window": ef.solvers.get("edm-churn", churn=40.0, churn_min=0.1, churn_max=9.0),
}
EXACT = {name: s for name, s in SOLVERS.items() if name not in INEXACT | GAUSSIAN}
MEMBERS = {**EXACT, **VARIANTS}


def check_consistency(make: Maker, schedules: Sequence[str]) -> None:
    """Raise AssertionError unless the law holds inside and from end to end."""
    for name in schedules:
        for nodes in (cases.uneven(6), [1.0, 0.8, 0.35, 0.1, 0.0], [0.9, 0.0], [1.0, 0.4]):
            plan = make(EVERYWHERE[name], nodes)
            check_one(plan)


def check_one(plan: Plan) -> None:
    dense, schedule = plan.dense(), plan.schedule
    first = torch.tensor(plan.start, dtype=torch.float64)
    stages = torch.tensor([stage.time for stage in plan.stages], dtype=torch.float64)
    nodes = torch.tensor(plan.times[1:], dtype=torch.float64)
    rows = ((stages, dense.a, dense.B, dense.C), (nodes, dense.node_a, dense.node_B, dense.node_C))
    for times, a, b, c in rows:
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        scale = alpha + sigma
        # A sum rounds with its terms: those of an explicit Runge-Kutta step from sigma/alpha = r to
        # r' grow as r/r', which is 15,000 in the longest step here.
        room = 1e-12 * (1 + b.abs().sum(1) / scale)
        kept = a * schedule.sigma(first)
        signal = (a * schedule.alpha(first) + b.sum(1) - alpha) / scale
        assert bool((signal.abs() <= room).all())
        if plan.stochastic:
            variance = (kept**2 + c.square().sum(1) - sigma**2) / scale**2
            assert bool((variance.abs() <= room).all())
        else:
            assert bool(((kept - sigma).abs() <= room * scale).all())
    for constant in (dense.constant, dense.node_constant):
        assert not bool(constant.any())


def schedules_of(solver: str) -> Sequence[str]:
    return ("Linear",) if solver in IN_TIME else tuple(EVERYWHERE)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_constant_prediction_is_integrated_exactly(name: str) -> None:
    check_consistency(cases.maker(MEMBERS[name]), schedules_of(name))


@pytest.mark.parametrize("name", EXACT)
def test_default_grids_are_exact_too(name: str) -> None:
    for schedule in schedules_of(name):
        for steps in (1, 2, 3, 10):
            plan = SOLVERS[name].plan(EVERYWHERE[schedule], steps, statistics=cases.statistics())
            check_one(plan)
            assert plan.times[0] == 1 and plan.times[-1] == 0 and len(plan.times) == steps + 1


@pytest.mark.parametrize("name", EXACT)
def test_every_isolated_mutant_is_seen(name: str) -> None:
    """Each coefficient of each stage, each stage's time, in turn."""
    for mutant in mutants.isolated(name):
        check_one(mutants.example(name, "Linear"))
        with pytest.raises(AssertionError):
            check_one(mutant.rewrite(mutants.example(name, "Linear")))
            pytest.fail(f"{mutant} survives", pytrace=False)


@pytest.mark.parametrize("name", EXACT)
def test_every_systematic_mutant_is_seen(name: str) -> None:
    for mutant in mutants.systematic(name, 1):
        if "swapped" in mutant.name:
            continue  # a constant prediction is its own past: the laws of order see it
        with pytest.raises(AssertionError):
            check_consistency(mutant.make, schedules_of(name))
            pytest.fail(f"{mutant} survives", pytrace=False)


@pytest.mark.parametrize("schedule", ["VP", "Cosine", "Betas to no signal", "VE"])
@pytest.mark.parametrize("name", [n for n in EXACT if n not in IN_TIME])
def test_the_run_is_exact_as_the_table_is(name: str, schedule: str) -> None:
    """A point mass: every state lies on its line or, with noise, in its law."""
    process = EVERYWHERE[schedule]
    point = torch.tensor([0.8, -0.3, 0.1], dtype=torch.float64)
    eps = torch.randn(400, 3, dtype=torch.float64)
    denoiser = ef.Denoiser(lambda x, t: point.expand_as(x), process)
    plan = cases.maker(SOLVERS[name])(process, [1.0, 0.7, 0.5, 0.2])
    x = process.add_noise(point.expand(400, 3), 1.0, eps)
    for step in plan.execute(denoiser, x):
        node = plan.stages[step.stage].node
        if node is None:
            continue
        state = step.registers[0]
        assert isinstance(state, Tensor)
        noise = (state - process.alpha(node) * point) / process.sigma(node)
        if plan.stochastic:
            # 1,200 normal numbers: mean within 4.5 standard errors, variance too.
            assert noise.mean().abs() < 4.5 / 1200**0.5
            assert (noise.var() - 1).abs() < 4.5 * (2 / 1200) ** 0.5
        else:
            torch.testing.assert_close(noise, eps, rtol=1e-9, atol=1e-9)
