"""The solvers of roots, fixed points and minima, by name."""

from __future__ import annotations

from ebbflow.differentiation.iterations import Anderson as Anderson
from ebbflow.differentiation.iterations import AndersonNewton as AndersonNewton
from ebbflow.differentiation.iterations import Bisection as Bisection
from ebbflow.differentiation.iterations import Broyden as Broyden
from ebbflow.differentiation.iterations import FixedPointSolver as FixedPointSolver
from ebbflow.differentiation.iterations import NewtonKrylov as NewtonKrylov
from ebbflow.differentiation.iterations import Picard as Picard
from ebbflow.differentiation.iterations import RootSolver as RootSolver
from ebbflow.differentiation.iterations import Solver as Solver
from ebbflow.differentiation.iterations import relative as relative
from ebbflow.differentiation.minimizers import LBFGS as LBFGS
from ebbflow.differentiation.minimizers import GradientDescent as GradientDescent
from ebbflow.differentiation.minimizers import Minimizer as Minimizer
from ebbflow.differentiation.minimizers import Newton as Newton

_NAMED: dict[str, Solver] = {
    "picard": Picard(),
    "anderson": Anderson(),
    "anderson-newton": AndersonNewton(),
    "broyden": Broyden(),
    "newton-krylov": NewtonKrylov(),
    "bisection": Bisection(),
    "gradient-descent": GradientDescent(),
    "lbfgs": LBFGS(),
    "newton": Newton(),
}


def get(solver: str) -> Solver:
    """A solver with its own settings, by name."""
    if solver not in _NAMED:
        raise ValueError(f"solver {solver!r} is not one of {sorted(_NAMED)}")
    return _NAMED[solver]
