"""Particles: chains and populations of states."""

from ebbflow.particles.denoising_mcmc import denoising_mcmc as denoising_mcmc
from ebbflow.particles.denoising_mcmc import exact_levels as exact_levels
