"""Differential equations and solutions of equations that can be differentiated."""

from ebbflow.differentiation.ode import Solution as Solution
from ebbflow.differentiation.ode import odeint as odeint
