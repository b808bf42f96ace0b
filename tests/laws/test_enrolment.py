"""Every solver is enrolled: it states its facts and comes with mutants, or this file is red."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import ebbflow as ef
from ebbflow import solvers
from ebbflow.solvers import Solver
from tests.laws import cases, mutants
from tests.laws.cases import (
    ADAPTIVE,
    DETERMINISTIC,
    EVERY,
    IN_TIME,
    INEXACT,
    SCHEDULES,
    SOLVERS,
    STOCHASTIC,
    WALKS,
)
from tests.laws.test_consistency import check_one

NEEDS = {"statistics", "jvp", "training"}


def test_nothing_is_left_out() -> None:
    listed = ef.solvers.list()
    assert len(listed) == len(set(listed)) and listed
    assert sorted(DETERMINISTIC + STOCHASTIC) == sorted(SOLVERS)
    assert sorted([*SOLVERS, *WALKS, *ADAPTIVE]) == sorted(listed), "a solver without a law"
    assert set(listed) >= IN_TIME | INEXACT


def test_every_published_solver_is_listed() -> None:
    """A solver in a module of the package is in the list, under its own name."""
    published: dict[str, Solver] = {}
    for module in pkgutil.iter_modules(solvers.__path__):
        members = vars(importlib.import_module(f"ebbflow.solvers.{module.name}"))
        published |= {s.name: s for s in members.values() if isinstance(s, Solver)}
    assert published == dict(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_facts_are_stated(name: str) -> None:
    solver = EVERY[name]
    assert solver.name == name == name.lower()
    for order in (solver.order, solver.nominal_order):
        assert isinstance(order, int) and not isinstance(order, bool) and order >= 1
    assert len(solver.reference) > 20 and solver.reference[0].isupper()
    assert type(solver.stochastic) is bool and type(solver.adaptive) is bool
    assert isinstance(solver.needs, frozenset) and solver.needs <= NEEDS
    assert type(solver).__doc__, "the update equation belongs to the docstring"
    ends = cases.maker(solver)(SCHEDULES["VP"], [0.95, 0.05])
    assert ends.stochastic == solver.stochastic
    assert ends.origin["solver"] == name


@pytest.mark.parametrize("name", SOLVERS)
def test_every_coefficient_has_its_mutants(name: str) -> None:
    plan = mutants.example(name)
    names = [mutant.name for mutant in mutants.systematic(name, SOLVERS[name].order)]
    assert len(names) == len(set(names)) >= len(mutants.sites(plan))
    for key, coefficient in mutants.sites(plan):
        assert any(name.startswith(f"{key}.{coefficient} ") for name in names)
    assert len(mutants.isolated(name)) >= 2 * plan.nfe
    for mutant in [*mutants.systematic(name, 2), *mutants.isolated(name)]:
        assert mutant.rewrite(plan).stages != plan.stages, f"{mutant} changes nothing"
    if plan.registers > 1 and any("x1" in stage.update[0] for stage in plan.stages):
        assert any("swapped" in mutant for mutant in names)


@pytest.mark.parametrize("name", sorted(IN_TIME | INEXACT))
def test_exemptions_are_needed(name: str) -> None:
    """Methods in t are excused from exactness on curved schedules because they do not have it."""
    with pytest.raises(AssertionError):
        check_one(cases.maker(SOLVERS[name])(SCHEDULES["VP"], cases.uneven(6)))


def test_a_copied_name_is_no_second_solver() -> None:
    assert ef.solvers.get("ddim") == SOLVERS["ddim"]
    assert ef.solvers.get("ddim", eta=1.0) != SOLVERS["ddim"]
