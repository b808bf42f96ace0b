"""Training a denoiser: the loss, averages of the weights, checkpoints and the loop."""

from __future__ import annotations

from ebbflow.training.averages import PowerAverage, power_exponent, reconstruct
from ebbflow.training.config import Config, learning_rate
from ebbflow.training.export import export
from ebbflow.training.loop import train
from ebbflow.training.loss import denoising_loss, noise_times

__all__ = [
    "Config",
    "PowerAverage",
    "denoising_loss",
    "export",
    "learning_rate",
    "noise_times",
    "power_exponent",
    "reconstruct",
    "train",
]
