"""Choices compile to the solvers that they are, and mixtures of them are solvers too."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.tuning import unified
from ebbflow.tuning.unified import ESTIMATORS, Choice, Choices
from tests.laws.cases import SCHEDULES, denoiser, exact_end, start, tensor

GRIDS = {
    "the solver's own": None,
    "inside": (0.95, 0.8, 0.55, 0.5, 0.3, 0.12, 0.05),
    "to both ends": (1.0, 0.9, 0.5, 0.2, 0.0),
    "two steps": (1.0, 0.4, 0.0),
    "one step": (1.0, 0.0),
}
LIMIT = 1e-12


def noise(plan: ef.Plan) -> Tensor:
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z * plan.schedule.sigma(plan.start)


def apart(one: ef.Plan, two: ef.Plan, schedule: str) -> float:
    model = denoiser("mixture", schedule)
    return (one.run(model, noise(one)) - two.run(model, noise(two))).abs().max().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", unified.NAMES)
def test_hand_made_solvers_are_points_of_the_framework(name: str, schedule: str) -> None:
    for times in GRIDS.values():
        known = SCHEDULES[schedule]
        solver = ef.solvers.get(name)
        theirs = solver.plan(known, 7) if times is None else solver.plan(known, times=times)
        ours = unified.choices(name, known, theirs.times).plan(known)
        assert ours.nfe == theirs.nfe
        assert ours.times == theirs.times
        assert ours.registers <= theirs.registers  # nothing is kept that is not needed
        assert apart(ours, theirs, schedule) < LIMIT


@pytest.mark.parametrize("name", unified.NAMES)
def test_another_choice_at_one_step_is_another_solver(name: str) -> None:
    known = SCHEDULES["VP"]
    times = GRIDS["inside"]
    assert times is not None
    theirs = ef.solvers.get(name).plan(known, times=times)
    right = unified.choices(name, known, times)
    old = right.choices[3]
    mutants = [
        replace(old, prediction="noise" if old.prediction == "x0" else "x0"),
        replace(old, order=old.order % 3 + 1),
        replace(old, corrector=not old.corrector),
        replace(old, calls=old.calls % 3 + 1),
    ]
    if old.order == 2:
        mutants += [replace(old, estimator=e) for e in ESTIMATORS[2:] if e != old.estimator]
    if old.order == 3:
        mutants.append(replace(old, estimator="difference"))
    for mutant in mutants:
        if replace(mutant, prediction=old.prediction) == old and old.order == 1:
            continue
        if replace(mutant, calls=old.calls) == old and old.order == 1:
            continue  # nor do inner calls that nothing uses
        steps = (*right.choices[:3], mutant, *right.choices[4:])
        assert apart(Choices(times, steps).plan(known), theirs, "VP") > 1e-7, mutant


def some(chance: random.Random, steps: int, least: int = 1) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            chance.choice(("x0", "noise")),
            chance.randint(least, 3),
            chance.choice(ESTIMATORS),
            chance.random() < 0.5,
            chance.choice((1, 1, 2, 3)),
        )
        for _ in range(steps)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_choices_keep_a_point_mass_exact(schedule: str) -> None:
    known = SCHEDULES[schedule]
    point = torch.tensor([0.7, -0.4], dtype=torch.float64)
    model = ef.Denoiser(lambda x, t: point.expand_as(x), known)
    chance = random.Random(1)
    for times in (GRIDS["inside"], GRIDS["to both ends"]):
        assert times is not None
        plan = Choices(times, some(chance, len(times) - 1)).plan(known)
        eps = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        first, last = times[0], times[-1]
        x = known.alpha(first) * point + known.sigma(first) * eps
        exact = known.alpha(last) * point + known.sigma(last) * eps
        limit = 1e-12 * max(1.0, known.sigma(first).item())
        assert (plan.run(model, x) - exact).abs().max() < limit
        stages = list(plan.stages)
        row = {**stages[-1].update[0], "D": stages[-1].update[0]["D"] * (1 + 1e-3)}
        stages[-1] = replace(stages[-1], update=(row, *stages[-1].update[1:]))
        wrong = replace(plan, stages=tuple(stages))
        assert (wrong.run(model, x) - exact).abs().max() > limit


def slope(schedule: str, choose, counts: tuple[int, ...] = (24, 48, 96)) -> float:
    """The observed order of samplers on uniform nodes from 0.95 to 0.05."""
    known, model = SCHEDULES[schedule], denoiser("mixture", schedule)
    x, exact = tensor(start("mixture", schedule)), tensor(exact_end("mixture", schedule))
    errors = []
    for steps in counts:
        times = np.linspace(0.95, 0.05, steps + 1).tolist()
        end = Choices(times, choose(steps)).plan(known).run(model, x)
        errors.append((end - exact).square().mean().sqrt().item())
    return math.log2(errors[0] / errors[-1]) / (len(counts) - 1)


@pytest.mark.parametrize("schedule", ("VP", "Linear"))
def test_mixed_choices_of_order_two_and_more_are_of_second_order(schedule: str) -> None:
    for seed in range(3):
        assert slope(schedule, lambda n, s=seed: some(random.Random(s), n, least=2)) > 1.75


def test_order_one_among_them_costs_an_order() -> None:
    assert slope("VP", lambda n: (Choice(), Choice("x0", 2)) * (n // 2)) < 1.5


def test_low_order_differences_cost_third_order() -> None:
    def third(estimator):
        return lambda n: (Choice("x0", 3, "full", True), *[Choice("x0", 3, estimator)] * (n - 1))

    assert slope("VP", third("full"), (48, 96, 192)) > 2.75
    assert slope("VP", third("difference"), (48, 96, 192)) < 2.5


def test_choices_are_checked_and_recorded(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"order is 4, expected one of \(1, 2, 3\)"):
        Choice(order=4)
    with pytest.raises(ValueError, match="1 choices for 3 nodes"):
        Choices((1.0, 0.5, 0.0), (Choice(),))
    with pytest.raises(ValueError, match="'heun' is no point"):
        unified.choices("heun", SCHEDULES["VP"], (1.0, 0.0))
    plan = unified.choices("unipc-b2-3", SCHEDULES["VP"], (1.0, 0.6, 0.3, 0.0)).plan(
        SCHEDULES["VP"]
    )
    plan.save(tmp_path / "plan.json")
    again = ef.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.origin["choices"][1] == ["x0", 3, "exponential", True, 1]
