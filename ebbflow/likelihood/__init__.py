"""How probable data are under a denoiser's law."""

from ebbflow.likelihood.flow import log_likelihood as log_likelihood
