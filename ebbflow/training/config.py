"""What a training run is told, and the learning rate that follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

CHANGEABLE = ("images", "validate_every", "sample_every", "checkpoint_every", "log_every", "keep")
"""Options that another start of the same run may change, for no weight depends on them."""


@dataclass(frozen=True)
class Config:
    """Options of a training run. All counts named `*_every` are in optimiser steps, 0 for never."""

    images: int = 1_000_000
    """Images seen in total; each step sees one batch."""
    batch: int = 128
    """Images a step, over all processes and accumulated parts together."""
    learning_rate: float = 1e-3
    """Highest learning rate of Adam."""
    warmup: int = 200
    """Steps over which the learning rate rises linearly."""
    decay: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    """After the warm-up; only "cosine" depends on where the run ends."""
    decay_start: int = 2000
    """Step from which "inverse_sqrt" falls as sqrt(decay_start / step)."""
    beta1: float = 0.9
    """Adam's average of gradients."""
    beta2: float = 0.99
    """Adam's average of squared gradients."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    noise_mean: float = -0.5
    """Mean of log(sigma / alpha) in training."""
    noise_std: float = 1.4
    """Standard deviation of log(sigma / alpha) in training."""
    label_dropout: float = 0.1
    """Share of samples whose label is hidden, which classifier-free guidance needs."""
    flip: bool = False
    """Mirror every other image, at random."""
    accumulate: int = 1
    """Parts of a batch computed one after the other, to save memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's arithmetic; weights and averages stay float32."""
    channels_last: bool = False
    """Memory layout of images with the channel innermost, often faster."""
    seed: int = 0
    """Fixes everything random."""
    validate_every: int = 500
    """Loss on held-out images."""
    sample_every: int = 0
    """Grid of samples."""
    checkpoint_every: int = 500
    """Checkpoint and snapshot of the averages."""
    log_every: int = 20
    """Line of the log, and check for NaN."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "accumulate", "checkpoint_every", "log_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "validate_every", "sample_every", "seed"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "decay_start", "clip", "noise_std"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive")
        for name in ("beta1", "beta2", "label_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("decay", self.decay in ("inverse_sqrt", "cosine", "constant"), "known")
        self._require("precision", self.precision in ("float32", "bfloat16"), "known")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}; it must divide the batch, {self.batch}."
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {expected}.")

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.images / self.batch)

    def identity(self) -> dict[str, Any]:
        """Return the options on which the weights depend."""
        options = asdict(self)
        for name in CHANGEABLE:
            if not (name == "images" and self.decay == "cosine"):
                del options[name]
        return options


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimiser step 1, 2, ...: a linear rise, then the decay.

    Source of "inverse_sqrt": "Analyzing and Improving the Training Dynamics of Diffusion Models",
    equation 15.
    """
    rise = min(step / config.warmup, 1.0) if config.warmup else 1.0
    if config.decay == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0)))
    elif config.decay == "inverse_sqrt":
        fall = 1 / math.sqrt(max(step / config.decay_start, 1.0))
    else:
        fall = 1.0
    return config.learning_rate * rise * fall
