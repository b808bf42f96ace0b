"""Differential equations and solutions of equations that can be differentiated."""

from ebbflow.differentiation.brownian import Brownian as Brownian
from ebbflow.differentiation.cde import HermitePath as HermitePath
from ebbflow.differentiation.cde import LinearPath as LinearPath
from ebbflow.differentiation.cde import cdeint as cdeint
from ebbflow.differentiation.equilibrium import Equilibrium as Equilibrium
from ebbflow.differentiation.equilibrium import HomotopyODE as HomotopyODE
from ebbflow.differentiation.equilibrium import equilibrium as equilibrium
from ebbflow.differentiation.events import Event as Event
from ebbflow.differentiation.events import odeint_event as odeint_event
from ebbflow.differentiation.heuristics import Heuristics as Heuristics
from ebbflow.differentiation.heuristics import local_heuristics as local_heuristics
from ebbflow.differentiation.heuristics import regularized_odeint as regularized_odeint
from ebbflow.differentiation.ode import Solution as Solution
from ebbflow.differentiation.ode import odeint as odeint
from ebbflow.differentiation.sde import SdeSolution as SdeSolution
from ebbflow.differentiation.sde import sdeint as sdeint
