"""Differential equations and solutions of equations that can be differentiated.

Knows nothing of diffusion.
"""

from ebbflow.differentiation import bilevel as bilevel
from ebbflow.differentiation import conditions as conditions
from ebbflow.differentiation import linear as linear
from ebbflow.differentiation import projections as projections
from ebbflow.differentiation import proximal as proximal
from ebbflow.differentiation import solvers as solvers
from ebbflow.differentiation.brownian import Brownian as Brownian
from ebbflow.differentiation.cde import HermitePath as HermitePath
from ebbflow.differentiation.cde import LinearPath as LinearPath
from ebbflow.differentiation.cde import cdeint as cdeint
from ebbflow.differentiation.convolution_inverse import causal_convolution as causal_convolution
from ebbflow.differentiation.convolution_inverse import inverse_convolution as inverse_convolution
from ebbflow.differentiation.equilibrium import Equilibrium as Equilibrium
from ebbflow.differentiation.equilibrium import HomotopyODE as HomotopyODE
from ebbflow.differentiation.equilibrium import equilibrium as equilibrium
from ebbflow.differentiation.events import Event as Event
from ebbflow.differentiation.events import odeint_event as odeint_event
from ebbflow.differentiation.heuristics import Heuristics as Heuristics
from ebbflow.differentiation.heuristics import local_heuristics as local_heuristics
from ebbflow.differentiation.heuristics import (
    locally_regularized_odeint as locally_regularized_odeint,
)
from ebbflow.differentiation.heuristics import regularized_odeint as regularized_odeint
from ebbflow.differentiation.implicit import fixed_point as fixed_point
from ebbflow.differentiation.implicit import minimize as minimize
from ebbflow.differentiation.implicit import root as root
from ebbflow.differentiation.matrix_functions import inverse_sqrtm as inverse_sqrtm
from ebbflow.differentiation.matrix_functions import sqrtm as sqrtm
from ebbflow.differentiation.matrix_functions import sylvester_symmetric as sylvester_symmetric
from ebbflow.differentiation.ode import Solution as Solution
from ebbflow.differentiation.ode import odeint as odeint
from ebbflow.differentiation.programs import quadratic_program as quadratic_program
from ebbflow.differentiation.sde import SdeSolution as SdeSolution
from ebbflow.differentiation.sde import sdeint as sdeint
from ebbflow.differentiation.status import NotSolved as NotSolved
from ebbflow.differentiation.status import Status as Status
