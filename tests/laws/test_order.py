"""Law 1: the observed order of every deterministic solver, on four schedules, Gaussian and mixture,
against an independent solution of the probability-flow ODE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from ebbflow.plan import Plan
from tests.laws import cases, mutants, reference
from tests.laws.cases import DETERMINISTIC, LAWS, SCHEDULES, SOLVERS, Maker
from tests.laws.mutants import Bare, Mutant

STEPS = (48, 96, 192, 384)
CASES = tuple(itertools.product(LAWS, SCHEDULES))
# Mutants are looked at on one schedule and fewer grids; what is right passes there as well. Methods
# of order 1 take more steps: their own errors are large, and hide what is wrong by a thousandth.
QUICK_STEPS, QUICK_SCHEDULE = (48, 96, 192), "VP"
QUICK_STEPS_OF_ORDER_1 = (192, 384, 768)


def by_law(errors: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Of each law, its share (samples, d) of each error."""
    shares = [np.split(error, len(LAWS)) for error in errors]
    return {law: [share[i] for share in shares] for i, law in enumerate(LAWS)}


def errors(make: Maker, schedule: str) -> dict[str, list[np.ndarray]]:
    """Of each law, the error of the end state, (samples, d), at each number of steps."""
    denoiser, x = cases.denoisers(schedule), cases.tensor(cases.starts(schedule))
    plans = (make(SCHEDULES[schedule], cases.interior(n)) for n in STEPS)
    exact = cases.exact_ends(schedule)
    return by_law([plan.run(denoiser, x).numpy() - exact for plan in plans])


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
    # A method may be better than stated on this grid: eliminate either term.
    decay = -math.inf
    for gain in {2**order, 2 ** max(order, round(observed))}:
        rest = [(gain * fine - coarse) / (gain - 1) for coarse, fine in itertools.pairwise(found)]
        decay = max(decay, slope(rest))
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


def quick_plans(name: str, steps: Sequence[int] = QUICK_STEPS) -> list[Plan]:
    make = cases.maker(SOLVERS[name])
    return [make(SCHEDULES[QUICK_SCHEDULE], cases.interior(n)) for n in steps]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_mutants_lose_their_order(name: str) -> None:
    """All run at once, as bare machines beside the right one.

    A slip in the few steps of a start is no error of every step: at 1e-3 it may cost less than the
    method does. The laws of a single step see it.
    """
    order = SOLVERS[name].order
    plans = quick_plans(name, QUICK_STEPS if order > 1 else QUICK_STEPS_OF_ORDER_1)
    coarse = Bare.of(plans[0])

    def changed(mutant: Mutant) -> int:
        wrong = mutant.rewrite(coarse).stages
        return sum(a != b for a, b in zip(wrong, coarse.stages, strict=True))

    found = [m for m in mutants.systematic(name, order) if 2 * changed(m) > len(coarse.times)]
    assert len(found) >= 4
    timed = [mutant for mutant in found if mutant.name == "times late"]
    x, exact = cases.starts(QUICK_SCHEDULE), cases.exact_ends(QUICK_SCHEDULE)
    f = cases.posterior_means(QUICK_SCHEDULE)

    def ends(group: Sequence[Mutant]) -> np.ndarray:
        """(steps, group, samples, d)"""
        machines = ([mutant.rewrite(Bare.of(plan)) for mutant in group] for plan in plans)
        return np.stack([mutants.run(machine, x, f) for machine in machines])

    right = Mutant(name, "right", lambda plan: plan)
    group = [right, *(mutant for mutant in found if mutant not in timed)]
    every = dict(zip(group, np.swapaxes(ends(group), 0, 1), strict=True))
    every |= {mutant: ends([mutant])[:, 0] for mutant in timed}

    def check(mutant: Mutant) -> None:
        for law, errors in by_law(list(every[mutant] - exact)).items():
            check_decay(errors, order, law)

    check(right)
    for mutant in found:
        with pytest.raises(AssertionError):
            check(mutant)
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
