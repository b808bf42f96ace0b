"""Noise from a counter of (seed, sample index, step), so that a sample never knows its neighbours.

Philox is a counter-based generator (Parallel Random Numbers: As Easy as 1, 2, 3): its key is
(seed, sample index) and its counter starts at (stream, step), so any draw can be had on its own, in
any order, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(
    seed: int,
    indices: Sequence[int],
    step: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> Tensor:
    """Standard normal noise of shape (len(indices), *shape), one independent draw per index.

    Drawn in float64 on the CPU, then rounded, so that every dtype and device sees the same noise.
    `step` 0 is a sample's start, k + 1 the noise of stage k; `stream` separates other uses.
    Raises ValueError unless seed, indices, step and stream are integers in [0, 2^64).
    """
    import numpy

    for name, value in (("seed", seed), ("step", step), ("stream", stream)):
        _check(name, value)
    out = numpy.empty((len(indices), *shape), dtype=numpy.float64)
    # One generator, re-keyed for each sample: many times faster than building one a sample.
    bits = numpy.random.Philox(key=numpy.array([seed, 0], dtype=numpy.uint64))
    draw = numpy.random.Generator(bits).standard_normal
    state = bits.state
    start = numpy.array([0, 0, stream, step], dtype=numpy.uint64)
    for row, index in enumerate(indices):
        _check("sample index", index)
        state["state"]["key"][1] = index
        state["state"]["counter"][:] = start
        bits.state = state
        draw(out=out[row])
    return torch.from_numpy(out).to(dtype).to(device)


def _check(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise ValueError(f"{name} must be an integer in [0, 2^64), got {value!r}")
