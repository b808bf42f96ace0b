"""Law 1: the observed order of every deterministic solver, on four schedules, Gaussian and mixture,
against an independent solution of the probability-flow ODE."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from ebbflow.plan import Plan
from tests.laws import cases, mutants, reference
from tests.laws.cases import DETERMINISTIC, LAWS, SCHEDULES, SOLVERS, Maker

STEPS = (48, 96, 192, 384)
CASES = tuple(itertools.product(LAWS, SCHEDULES))
# Mutants are looked at on fewer and coarser grids; what is right passes there as well.
QUICK_STEPS, QUICK_SCHEDULE = (32, 64, 128), "Linear"


def errors(
    make: Maker, schedule: str, steps: Sequence[int] = STEPS
) -> dict[str, list[np.ndarray]]:
    """Of each law, the error of the end state, (samples, d), at each number of steps."""
    plans = [make(SCHEDULES[schedule], cases.interior(n)) for n in steps]
    return errors_of(plans, schedule)


def errors_of(plans: Sequence[Plan], schedule: str) -> dict[str, list[np.ndarray]]:
    """One run a plan: the laws share its batch."""
    denoiser = cases.denoisers(schedule)
    x = cases.tensor(np.concatenate([cases.start(law, schedule) for law in LAWS]))
    ends = [np.split(plan.run(denoiser, x).numpy(), len(LAWS)) for plan in plans]
    return {
        law: [end[i] - cases.exact_end(law, schedule) for end in ends]
        for i, law in enumerate(LAWS)
    }


def slope(values: Sequence[np.ndarray]) -> float:
    """Mean exponent of decay a halving."""
    first, last = (float(np.linalg.norm(v)) for v in (values[0], values[-1]))
    assert math.isfinite(first) and math.isfinite(last), "the run diverged"
    return math.log2(first / last) / (len(values) - 1)


def check_decay(found: Sequence[np.ndarray], order: int, where: str) -> float:
    """The slope; raises AssertionError unless the errors are of this order and nothing stays.

    Once the leading term `c N^-order` is eliminated, what is left must decay no slower: a small
    inconsistency, far below the error of a first-order method at these steps, stays and shows.
    """
    observed = slope(found)
    assert observed > order - 0.25, f"{where}: order {observed:.2f}, stated {order}"
    gain = 2**order
    rest = [(gain * fine - coarse) / (gain - 1) for coarse, fine in itertools.pairwise(found)]
    decay = slope(rest)
    assert decay > order - 0.25, f"{where}: the extrapolated error decays as {decay:.2f}"
    return observed


def check_order(make: Maker, order: int, over: Iterable[str] = SCHEDULES) -> float:
    """The least slope over schedules and laws; raises AssertionError as `check_decay`."""
    return min(
        check_decay(found, order, f"{law}, {schedule}")
        for schedule in over
        for law, found in errors(make, schedule).items()
    )


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_stated_order_is_the_observed_one(name: str) -> None:
    order = SOLVERS[name].order
    least = check_order(cases.maker(SOLVERS[name]), order)
    # A half more than stated is what a grid gives, not the method; a whole order is a wrong fact.
    assert least < order + 0.75, f"order {least:.2f} everywhere, stated {order}"


@functools.cache
def quick_plans(name: str) -> list[Plan]:
    make = cases.maker(SOLVERS[name])
    return [make(SCHEDULES[QUICK_SCHEDULE], cases.interior(n)) for n in QUICK_STEPS]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_mutants_lose_their_order(name: str) -> None:
    order, plans = SOLVERS[name].order, quick_plans(name)

    def check(plans: Sequence[Plan]) -> None:
        for law, found in errors_of(plans, QUICK_SCHEDULE).items():
            check_decay(found, order, law)

    check(plans)
    for mutant in mutants.systematic(name, order):
        with pytest.raises(AssertionError):
            check([mutant.rewrite(plan) for plan in plans])
            pytest.fail(f"{mutant} survives", pytrace=False)


@pytest.mark.parametrize(("law", "schedule"), CASES)
def test_the_reference_agrees_with_itself_in_another_variable(law: str, schedule: str) -> None:
    start = cases.start(law, schedule)
    found = reference.flow_in_ratio(LAWS[law], schedule, start, 0.95, 0.05)
    assert np.abs(found - cases.exact_end(law, schedule)).max() < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_reference_agrees_with_the_closed_form_of_a_gaussian(schedule: str) -> None:
    x = cases.start("gaussian", schedule)
    exact = reference.gaussian_flow(LAWS["gaussian"], schedule, x, 0.95, 0.05)
    assert np.abs(exact - cases.exact_end("gaussian", schedule)).max() < 1e-10
