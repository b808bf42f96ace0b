"""What a search may spend: wall time, or evaluations of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from ebbflow.denoiser import Denoiser
from ebbflow.tuning.references import conditions_in_turn

PROBE = 32


class Budget:
    """Counts evaluations of the model on one sample each, and the seconds since it was made.

    Args:
        seconds: positive; what is allowed, unless `evaluations` is.
        evaluations: in its place; what is decided from it does not depend on the clock.
    """

    def __init__(self, seconds: float, evaluations: float | None = None) -> None:
        for name, value in (("seconds", seconds), ("evaluations", evaluations)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"the budget of {name} is {value}: give a positive number")
        self.seconds = float(seconds)
        self.evaluations = evaluations
        self.spent = 0.0
        self._began = time.monotonic()

    @property
    def passed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    @property
    def share(self) -> float:
        """Of the budget that is used; 1 or more when it is used up."""
        if self.evaluations is not None:
            return self.spent / self.evaluations
        return self.passed / self.seconds

    def spend(self, evaluations: float, seconds: float = 0.0) -> None:
        """Count evaluations, and seconds that passed in an earlier process."""
        self.spent += evaluations
        self._began -= seconds

    @torch.no_grad()
    def total(
        self, denoiser: Denoiser, shape: tuple[int, ...], condition: Mapping[str, Any]
    ) -> float:
        """How many evaluations the whole budget is, by the time of one call where it is seconds."""
        if self.evaluations is not None:
            return float(self.evaluations)
        like = next(denoiser.parameters(), torch.zeros((), dtype=torch.get_default_dtype()))
        dtype = torch.promote_types(like.dtype, torch.float32)
        x = torch.zeros(PROBE, *shape, dtype=dtype, device=like.device)
        turned = conditions_in_turn(condition, PROBE)
        took = []
        for _ in range(4):  # the first call may be slow, and others may use the machine
            began = time.monotonic()
            denoiser(x, 0.5, **turned).sum().item()
            took.append(time.monotonic() - began)
        return self.seconds / min(took) * PROBE
