"""Derivatives of solutions: implicit functions, bilevel problems, functions of matrices.

Knows nothing of diffusion.
"""

from __future__ import annotations

from ebbflow.differentiation import bilevel as bilevel
from ebbflow.differentiation import conditions as conditions
from ebbflow.differentiation import linear as linear
from ebbflow.differentiation import projections as projections
from ebbflow.differentiation import proximal as proximal
from ebbflow.differentiation import solvers as solvers
from ebbflow.differentiation.convolution_inverse import causal_convolution as causal_convolution
from ebbflow.differentiation.convolution_inverse import inverse_convolution as inverse_convolution
from ebbflow.differentiation.implicit import fixed_point as fixed_point
from ebbflow.differentiation.implicit import minimize as minimize
from ebbflow.differentiation.implicit import root as root
from ebbflow.differentiation.matrix_functions import inverse_sqrtm as inverse_sqrtm
from ebbflow.differentiation.matrix_functions import sqrtm as sqrtm
from ebbflow.differentiation.matrix_functions import sylvester_symmetric as sylvester_symmetric
from ebbflow.differentiation.programs import quadratic_program as quadratic_program
from ebbflow.differentiation.status import NotSolved as NotSolved
from ebbflow.differentiation.status import Status as Status
