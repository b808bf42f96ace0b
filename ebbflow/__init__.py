"""Three nouns and one verb: Schedule, Denoiser, Solver; sample.

Every public name is imported when it is first used, so that `import ebbflow` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebbflow import diagnostics as diagnostics
    from ebbflow import differentiation as differentiation
    from ebbflow import editing as editing
    from ebbflow import grids as grids
    from ebbflow import guidance as guidance
    from ebbflow import interop as interop
    from ebbflow import inversion as inversion
    from ebbflow import likelihood as likelihood
    from ebbflow import metrics as metrics
    from ebbflow import networks as networks
    from ebbflow import noise as noise
    from ebbflow import oracles as oracles
    from ebbflow import particles as particles
    from ebbflow import processes as processes
    from ebbflow import schedules as schedules
    from ebbflow import solvers as solvers
    from ebbflow import training as training
    from ebbflow import tuning as tuning
    from ebbflow.denoiser import Denoiser as Denoiser
    from ebbflow.diagnostics import diagnose as diagnose
    from ebbflow.finite import NonFinite as NonFinite
    from ebbflow.inversion import Inversion as Inversion
    from ebbflow.inversion import invert as invert
    from ebbflow.likelihood import log_likelihood as log_likelihood
    from ebbflow.parallel_in_time import ParallelResult as ParallelResult
    from ebbflow.parallel_in_time import parallel as parallel
    from ebbflow.particles import denoising_mcmc as denoising_mcmc
    from ebbflow.plan import Plan as Plan
    from ebbflow.plan import Stage as Stage
    from ebbflow.processes import gaussian_flow as gaussian_flow
    from ebbflow.processes import gaussian_prior as gaussian_prior
    from ebbflow.sampling import Result as Result
    from ebbflow.sampling import sample as sample
    from ebbflow.sampling import trajectory as trajectory
    from ebbflow.solvers.model_statistics import ModelStatistics as ModelStatistics
    from ebbflow.statistics import Statistics as Statistics
    from ebbflow.storage import load as load
    from ebbflow.tuning import tune as tune

__version__ = "0.1.0"

# Public name -> the module that defines it; a module is its own home.
_HOMES = {
    "Denoiser": "denoiser",
    "Inversion": "inversion",
    "ModelStatistics": "solvers.model_statistics",
    "NonFinite": "finite",
    "ParallelResult": "parallel_in_time",
    "Plan": "plan",
    "Result": "sampling",
    "Stage": "plan",
    "Statistics": "statistics",
    "denoising_mcmc": "particles",
    "diagnose": "diagnostics",
    "diagnostics": "diagnostics",
    "differentiation": "differentiation",
    "editing": "editing",
    "gaussian_flow": "processes",
    "gaussian_prior": "processes",
    "grids": "grids",
    "guidance": "guidance",
    "interop": "interop",
    "likelihood": "likelihood",
    "inversion": "inversion",
    "invert": "inversion",
    "load": "storage",
    "log_likelihood": "likelihood",
    "metrics": "metrics",
    "networks": "networks",
    "noise": "noise",
    "oracles": "oracles",
    "parallel": "parallel_in_time",
    "particles": "particles",
    "processes": "processes",
    "sample": "sampling",
    "schedules": "schedules",
    "solvers": "solvers",
    "training": "training",
    "trajectory": "sampling",
    "tune": "tuning",
    "tuning": "tuning",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ebbflow' has no attribute {name!r}; it has {sorted(_HOMES)}")
    module = import_module(f"ebbflow.{home}")
    value = module if name == home else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
