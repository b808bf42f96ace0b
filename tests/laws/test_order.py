"""Law 1: the observed order of every deterministic solver, on four schedules, Gaussian and mixture,
against an independent solution of the probability-flow ODE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest

from tests.laws import cases, mutants, reference
from tests.laws.cases import DETERMINISTIC, LAWS, SCHEDULES, SOLVERS, Maker
from tests.laws.mutants import Mutant

STEPS = (48, 96, 192, 384)
CASES = tuple(itertools.product(("mixture", "gaussian"), SCHEDULES))
Case = tuple[str, str]


def errors(make: Maker, case: Case) -> list[np.ndarray]:
    """The error of the end state, (samples, d), at each number of steps."""
    law, schedule = case
    denoiser = cases.denoiser(law, schedule)
    x = cases.tensor(cases.start(law, schedule))
    exact = cases.exact_end(law, schedule)
    plans = (make(SCHEDULES[schedule], cases.interior(n)) for n in STEPS)
    return [plan.run(denoiser, x).numpy() - exact for plan in plans]


def slope(values: list[np.ndarray]) -> float:
    """Mean exponent of decay a halving."""
    first, last = (float(np.linalg.norm(v)) for v in (values[0], values[-1]))
    assert math.isfinite(first) and math.isfinite(last), "the run diverged"
    return math.log2(first / last) / (len(values) - 1)


def check_order(make: Maker, order: int, over: Iterable[Case] = CASES) -> float:
    """The least slope; raises AssertionError unless every case is of this order and none wrong.

    Once the leading term `c N^-order` is eliminated, what is left must decay no slower: a small
    inconsistency, far below the error of a first-order method at these steps, stays and shows.
    """
    least = math.inf
    for case in over:
        found = errors(make, case)
        observed = slope(found)
        assert observed > order - 0.25, f"{case}: order {observed:.2f}, stated {order}"
        gain = 2**order
        rest = [(gain * fine - coarse) / (gain - 1) for coarse, fine in itertools.pairwise(found)]
        decay = slope(rest)
        assert decay > order - 0.25, f"{case}: the extrapolated error decays as {decay:.2f}"
        least = min(least, observed)
    return least


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_stated_order_is_the_observed_one(name: str) -> None:
    order = SOLVERS[name].order
    least = check_order(cases.maker(SOLVERS[name]), order)
    assert least < order + 0.25, f"order {least:.2f} everywhere, stated {order}"


@pytest.mark.parametrize(
    "mutant", [m for n in DETERMINISTIC for m in mutants.systematic(n, SOLVERS[n].order)], ids=str
)
def test_mutants_lose_their_order(mutant: Mutant) -> None:
    with pytest.raises(AssertionError):
        check_order(mutant.make, SOLVERS[mutant.solver].order)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_agrees_with_itself_in_another_variable(case: Case) -> None:
    law, schedule = case
    found = reference.flow_in_ratio(LAWS[law], schedule, cases.start(*case), 0.95, 0.05)
    assert np.abs(found - cases.exact_end(*case)).max() < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_reference_agrees_with_the_closed_form_of_a_gaussian(schedule: str) -> None:
    x = cases.start("gaussian", schedule)
    exact = reference.gaussian_flow(LAWS["gaussian"], schedule, x, 0.95, 0.05)
    assert np.abs(exact - cases.exact_end("gaussian", schedule)).max() < 1e-10
