"""Solvers: each compiles a schedule and its times into a plan."""

from __future__ import annotations

import builtins
from dataclasses import fields, replace
from difflib import get_close_matches

from ebbflow.solvers import (
    ddim,
    dormand_prince,
    edm,
    evodiff,
    exponential_pair,
    genie,
    gotta_go_fast,
    langevin_corrector,
    multistep,
    runge_kutta,
    time_shift,
)
from ebbflow.solvers.base import Levels as Levels
from ebbflow.solvers.base import Solver as Solver

_SOLVERS = {
    solver.name: solver
    for solver in (
        ddim.ddpm,
        ddim.ddim,
        runge_kutta.euler,
        runge_kutta.heun,
        edm.edm,
        edm.edm_churn,
        multistep.two,
        multistep.three,
        multistep.sde,
        dormand_prince.dormand_prince,
        exponential_pair.dpm_solver_23,
        gotta_go_fast.gotta_go_fast,
        genie.genie,
        evodiff.evodiff,
        time_shift.time_shift,
        langevin_corrector.langevin_corrector,
    )
}

AUTO = "dpm-solver++2m"
"""What "auto" is: of the solvers here, the most accurate at few calls that needs no statistics."""


def list() -> builtins.list[str]:
    """Names of all solvers."""
    return builtins.list(_SOLVERS)


def get(name: str, **parameters: float | bool) -> Solver:
    """The solver of this name, with its own parameters changed: `get("ddim", eta=0.5)`.

    "auto" is the library's one default. Raises ValueError for an unknown name or parameter, naming
    the nearest ones.
    """
    name = AUTO if name == "auto" else name
    if name not in _SOLVERS:
        near = get_close_matches(str(name).lower(), _SOLVERS, 3, 0.3)
        raise ValueError(
            f"unknown solver {name!r}; nearest: {', '.join(near) or 'none'}; "
            f"all: {', '.join(_SOLVERS)}"
        )
    solver = _SOLVERS[name]
    own = [f.name for f in fields(solver) if f.name not in {g.name for g in fields(Solver)}]
    for key in parameters:
        if key not in own:
            raise ValueError(f"solver {name!r} has no parameter {key!r}; it has {own}")
    return replace(solver, **parameters)
