"""Processes: what of one is known in closed form, and one that is another in disguise."""

from ebbflow.processes.gaussian import gaussian_flow as gaussian_flow
from ebbflow.processes.gaussian import gaussian_prior as gaussian_prior
from ebbflow.processes.mean_reverting import cosine_betas as cosine_betas
from ebbflow.processes.mean_reverting import mean_reverting as mean_reverting
