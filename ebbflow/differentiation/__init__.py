"""Differential equations and solutions of equations that can be differentiated."""

from ebbflow.differentiation.brownian import Brownian as Brownian
from ebbflow.differentiation.cde import HermitePath as HermitePath
from ebbflow.differentiation.cde import LinearPath as LinearPath
from ebbflow.differentiation.cde import cdeint as cdeint
from ebbflow.differentiation.ode import Solution as Solution
from ebbflow.differentiation.ode import odeint as odeint
from ebbflow.differentiation.sde import SdeSolution as SdeSolution
from ebbflow.differentiation.sde import sdeint as sdeint
