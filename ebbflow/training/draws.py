"""Everything random in training, as a pure function of (seed, step, position in the batch).

A run that stops therefore resumes without any state of a random generator, and any division of a
batch among processes and parts sees the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebbflow.data import Images, to_float
from ebbflow.noise import normal
from ebbflow.schedules import Schedule
from ebbflow.training.config import Config
from ebbflow.training.loss import noise_times

if TYPE_CHECKING:
    import numpy

# Streams of the counter, apart from those of sampling (0) and from each other.
NOISE, ORDER, SCALARS, VALIDATION = 1001, 1002, 1003, 1004


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) in [-1, 1], times float64 (B,), noise as the images, labels or None."""

    x0: Tensor
    t: Tensor
    noise: Tensor
    label: Tensor | None

    @property
    def condition(self) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser."""
        return {} if self.label is None else {"label": self.label}


def _generator(seed: int, stream: int, step: int) -> numpy.random.Generator:
    import numpy as np

    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(_generator(seed, ORDER, epoch).permutation(count))


def order(seed: int, count: int, first: int, positions: range) -> Tensor:
    """Indices of the images at places first + positions of an endless sequence of permutations."""
    places = [first + position for position in positions]
    return torch.stack([_permutation(seed, p // count, count)[p % count] for p in places])


def training_batch(
    images: Images, config: Config, schedule: Schedule, step: int, positions: range
) -> Batch:
    """The samples at these positions of the batch of step 1, 2, ...

    Times are stratified: one quantile in each of the batch's equal parts (Variational Diffusion
    Models, appendix I.1).
    """
    index = order(config.seed, len(images), (step - 1) * config.batch, positions)
    draws = _generator(config.seed, SCALARS, step)
    offset = draws.integers(1, 2**32) / 2**32
    hidden = torch.from_numpy(draws.random(config.batch) < config.label_dropout)
    mirrored = torch.from_numpy(draws.random(config.batch) < 0.5)
    place = torch.tensor(positions)
    pixels = images.pixels[index]
    if config.flip:
        pixels = torch.where(mirrored[place].view(-1, 1, 1, 1), pixels.flip(3), pixels)
    label = None
    if images.labels is not None:
        label = torch.where(hidden[place], images.classes, images.labels[index])
    quantiles = (place + offset) / config.batch
    return Batch(
        to_float(pixels),
        noise_times(schedule, quantiles, config.noise_mean, config.noise_std),
        normal(config.seed, positions, step, images.shape, stream=NOISE),
        label,
    )


def validation_batch(images: Images, config: Config, schedule: Schedule, positions: range) -> Batch:
    """Held-out samples at these positions, always with the same noise at the same times."""
    place = torch.tensor(positions)
    # Multiples of the golden ratio spread evenly in any order and number of images.
    quantiles = (0.5 + place.double() * 0.6180339887498949) % 1
    return Batch(
        images.floats(place),
        noise_times(schedule, quantiles, config.noise_mean, config.noise_std),
        normal(config.seed, positions, 0, images.shape, stream=VALIDATION),
        None if images.labels is None else images.labels[place],
    )
