"""Problems with closed forms, on which a wrong abscissa, a wrong sign or a lost coupling shows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

START = torch.tensor([0.7, -0.4, 1.0], dtype=torch.float64)


def coupled(t: Any, y: Tensor) -> Tensor:
    """Non-autonomous, nonlinear and coupled; `exact` is its solution from START at t = 0."""
    a, b, c = y.unbind(-1)
    if isinstance(t, Tensor) and t.ndim:
        t = t[..., 0]
    t = torch.as_tensor(t, dtype=y.dtype)
    # The last bracket vanishes on the solution alone, and so couples without changing it.
    radius = a * a + b * b - 0.65 * torch.exp(2 * torch.sin(t))
    return torch.stack(
        [
            torch.cos(t) * a - 2 * t * b,
            torch.cos(t) * b + 2 * t * a,
            -2 * t * c * c + 0.5 * radius,
        ],
        -1,
    )


def exact(t: float) -> Tensor:
    """(a, b) turned by t² and scaled by e^sin t; c = 1 / (1 + t²)."""
    c, s, e = math.cos(t * t), math.sin(t * t), math.exp(math.sin(t))
    a, b = 0.7, -0.4
    return torch.tensor(
        [e * (c * a - s * b), e * (s * a + c * b), 1 / (1 + t * t)], dtype=torch.float64
    )


def slope(errors: list[float]) -> float:
    """The observed order over the last halving of the step."""
    return math.log2(errors[-2] / errors[-1])
