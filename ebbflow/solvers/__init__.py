"""Solvers: each compiles a schedule and its times into a plan."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches

from ebbflow.solvers import (
    adams,
    ddim,
    dormand_prince,
    edm,
    evodiff,
    exponential_pair,
    flow_turbo,
    gaussian,
    genie,
    gotta_go_fast,
    langevin_corrector,
    momentum,
    multistep,
    pndm,
    reverse_sde,
    runge_kutta,
    singlestep,
    stochastic_adams,
    time_shift,
    unipc,
)
from ebbflow.solvers.base import Levels as Levels
from ebbflow.solvers.base import Solver as Solver
from ebbflow.solvers.dpm_solver_v3 import DPMSolverV3 as DPMSolverV3

_SOLVERS = {
    solver.name: solver
    for solver in (
        ddim.ddpm,
        ddim.ddim,
        runge_kutta.euler,
        runge_kutta.heun,
        flow_turbo.flow_turbo,
        edm.edm,
        edm.edm_churn,
        multistep.two,
        multistep.three,
        multistep.sde,
        singlestep.dpm_2,
        singlestep.dpm_3,
        singlestep.pp_2s,
        singlestep.pp_3s,
        singlestep.rho_midpoint,
        singlestep.rho_kutta,
        singlestep.rho_rk4,
        adams.dpm_2m,
        adams.dpm_3m,
        adams.deis_tab1,
        adams.deis_tab2,
        adams.deis_tab3,
        adams.deis_rhoab1,
        adams.deis_rhoab2,
        adams.deis_rhoab3,
        adams.deis_logrhoab1,
        adams.ipndm2,
        adams.ipndm3,
        adams.ipndm4,
        pndm.s_pndm,
        pndm.f_pndm,
        unipc.b1_2,
        unipc.b2_2,
        unipc.b1_3,
        unipc.b2_3,
        momentum.heavy_ball,
        momentum.ghvb2,
        momentum.ghvb3,
        momentum.ghvb4,
        reverse_sde.maruyama,
        reverse_sde.diffusion,
        reverse_sde.dpm,
        stochastic_adams.sa,
        gaussian.residual,
        gaussian.unit,
        dormand_prince.dormand_prince,
        exponential_pair.dpm_solver_23,
        gotta_go_fast.gotta_go_fast,
        genie.genie,
        evodiff.evodiff,
        time_shift.time_shift,
        langevin_corrector.langevin_corrector,
    )
}

AUTO = gaussian.Auto("auto", 2, 2, gaussian.OWN, gaussian.residual, gaussian.unit)
"""What "auto" is: `gaussian-residual` with the data's statistics, `unit-residual` without."""


def list() -> builtins.list[str]:
    """Names of all solvers."""
    return builtins.list(_SOLVERS)


def get(name: str, **parameters: float | bool) -> Solver:
    """The solver of this name, with its own parameters changed: `get("ddim", eta=0.5)`.

    "auto" is the library's one default. Raises ValueError for an unknown name or parameter, naming
    the nearest ones.
    """
    if name == "auto":
        return _changed(AUTO, parameters)
    if name not in _SOLVERS:
        near = get_close_matches(str(name).lower(), _SOLVERS, 3, 0.3)
        raise ValueError(
            f"unknown solver {name!r}; nearest: {', '.join(near) or 'none'}; "
            f"all: {', '.join(_SOLVERS)}"
        )
    return _changed(_SOLVERS[name], parameters)


def _changed(solver: Solver, parameters: Mapping[str, float | bool]) -> Solver:
    facts = {f.name for f in fields(Solver)}
    parts = {f.name for f in fields(solver) if isinstance(getattr(solver, f.name), Solver)}
    own = [f.name for f in fields(solver) if f.name not in facts | parts]
    for key in parameters:
        if key not in own:
            raise ValueError(f"solver {solver.name!r} has no parameter {key!r}; it has {own}")
    return replace(solver, **parameters)
