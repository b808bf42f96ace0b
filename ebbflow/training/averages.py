"""Averages of the weights whose length can be chosen after training.

The power function average at step t weighs the weights of step s by (gamma + 1) s^gamma /
t^(gamma + 1). Two of them, saved now and then, span the averages of every other length closely.

Source: "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and
appendix C.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def power_exponent(sigma_rel: float) -> float:
    """The exponent gamma of an average whose width is `sigma_rel` times the training time.

    It is the positive root of (gamma + 2)² (gamma + 3) = (gamma + 1) / sigma_rel², which exists
    for sigma_rel in (0, 0.28].

    Source: the same paper, equation 126 and algorithm 2.
    """
    import numpy as np

    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"sigma_rel is {sigma_rel}; it must be in (0, 0.28], such as 0.05.")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerAverage:
    """A power function average of tensors, kept up to date step by step."""

    def __init__(self, sigma_rel: float, tensors: Iterable[Tensor]) -> None:
        self.sigma_rel = sigma_rel
        self.exponent = power_exponent(sigma_rel)
        self.tensors = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def update(self, tensors: Iterable[Tensor], step: int) -> None:
        """Take in the weights after step 1, 2, ...; step 1 replaces what was there."""
        keep = (1 - 1 / step) ** (self.exponent + 1)
        for average, tensor in zip(self.tensors, tensors, strict=True):
            average.lerp_(tensor, 1 - keep)


def _inner(step_a: float, exponent_a: float, step_b: float, exponent_b: float) -> float:
    """Integral over s of the product of two weight profiles."""
    early, late = sorted(((step_a, exponent_a), (step_b, exponent_b)))
    ratio = (early[0] / late[0]) ** (late[1] + 1)
    scale = (exponent_a + 1) * (exponent_b + 1) / (exponent_a + exponent_b + 1)
    return scale * ratio / early[0]


def reconstruct(snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> Tensor:
    """Weights, float64 (K,), that combine K snapshots into the average of another length.

    A snapshot is (step, sigma_rel). The combination is the nearest one to the wanted average at
    `step` in the least-squares sense of the profiles, among those that sum to one.

    Source: the same paper, algorithm 3; the constraint on the sum is added here, so that weights
    which did not move stay exact.
    """
    if not snapshots:
        raise ValueError("There are no snapshots to combine.")
    if max(at for at, _ in snapshots) > step:
        raise ValueError(f"A snapshot is later than step {step}, the end of the average.")
    profiles = [(float(at), power_exponent(width)) for at, width in snapshots]
    target = (float(step), power_exponent(sigma_rel))
    count = len(profiles)
    system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    wanted = torch.ones(count + 1, dtype=torch.float64)
    for row, (at, exponent) in enumerate(profiles):
        wanted[row] = _inner(at, exponent, *target)
        for column, other in enumerate(profiles):
            system[row, column] = _inner(at, exponent, *other)
    # Unit rows before solving; the last row and column hold the sum and its multiplier.
    scale = system.diagonal()[:count].rsqrt()
    system[:count, :count] *= scale[:, None] * scale
    wanted[:count] *= scale
    system[count, :count] = system[:count, count] = scale
    return torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:count, 0] * scale
