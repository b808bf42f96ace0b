"""Inner products of predictions, one each sample and channel."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each channel: the axis after the batch, if there are more behind it."""
    axes = tuple(range(2 if a.ndim > 2 else 1, a.ndim))
    return (a * b).sum(axes, keepdim=True)


def share(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / <b, b> between -2 and 2; 1 where b is zero."""
    below = dot(b, b)
    return torch.where(below > 0, dot(a, b) / torch.where(below > 0, below, 1), 1).clamp(-2, 2)
