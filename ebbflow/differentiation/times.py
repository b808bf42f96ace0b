"""Output times and fixed steps between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def output_times(t: Tensor | Sequence[float], y0: Tensor, batch_dims: int) -> list[float] | Tensor:
    """Times as numbers, or as float64 (T, B) with a batch axis; strictly monotonic."""
    # A list is read in float64, in which 0.8 is not 0.80000001.
    t = t.detach().double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    length = t.shape[0] if t.ndim else 0
    shapes = [(length,), (length, y0.shape[0])] if batch_dims else [(length,)]
    if t.ndim == 0 or tuple(t.shape) not in shapes:
        also = f" or (T, {y0.shape[0]})" if batch_dims else ""
        raise ValueError(f"t must have shape (T,){also}, got {tuple(t.shape)}")
    if t.shape[0] < 2 or not bool(torch.isfinite(t).all()):
        raise ValueError(f"t must be at least two finite times, got {t.tolist()}")
    change = t.diff(dim=0)
    if not bool(((change > 0).all(0) | (change < 0).all(0)).all()):
        raise ValueError(f"t must be strictly increasing or strictly decreasing, got {t.tolist()}")
    if not batch_dims:
        return t.tolist()
    t = t.to(y0.device)
    return t if t.ndim == 2 else t[:, None].expand(-1, y0.shape[0])


def step_ends(
    times: list[float] | Tensor, steps: int | None, step_size: float | None
) -> tuple[float, ...]:
    """The nodes of fixed steps: n an interval of the times, or of step_size at most, else one.

    With a batch axis a node is an output's index plus a fraction of the interval after it.
    """
    if steps is not None and step_size is not None:
        raise ValueError("give steps or step_size, not both")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    nodes: list[float] = []
    for k in range(len(times) - 1):
        t, s = times[k], times[k + 1]
        n = steps or 1
        if step_size is not None:
            widest = float((s - t).abs().max()) if isinstance(t, Tensor) else abs(s - t)
            n = max(1, math.ceil(widest / step_size * (1 - 1e-12)))
        for j in range(n):
            place = k + j / n if isinstance(t, Tensor) else t + float(s - t) * (j / n)
            nodes.append(place)
    nodes.append(float(len(times) - 1) if isinstance(times, Tensor) else times[-1])
    return tuple(nodes)
