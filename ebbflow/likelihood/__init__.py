"""How probable data are under a denoiser's law."""

from ebbflow.likelihood.bound import elbo as elbo
from ebbflow.likelihood.dequantisation import VariationalDequantiser as VariationalDequantiser
from ebbflow.likelihood.dequantisation import bits_per_dimension as bits_per_dimension
from ebbflow.likelihood.dequantisation import dequantise as dequantise
from ebbflow.likelihood.flow import log_likelihood as log_likelihood
