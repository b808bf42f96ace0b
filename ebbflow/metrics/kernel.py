"""Kernel distance: an unbiased squared maximum mean discrepancy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebbflow.metrics._vectors import pair


class Estimate(NamedTuple):
    value: float
    standard_error: float


def kernel_distance(x: Tensor, y: Tensor, *, blocks: int = 10, seed: int = 0) -> Estimate:
    """Squared MMD of sets (n, d), (m, d) under k(x, y) = (x·y/d + 1)³, without bias.

    Bińkowski et al., "Demystifying MMD GANs" (KID). Both sets are shuffled by `seed` and cut into
    `blocks` disjoint blocks; the value is the mean of the blocks' estimates, which are independent,
    so that the standard error is honest. `blocks=1` uses every pair, and its error is NaN.
    """
    x, y = pair(x, y)
    if not 1 <= blocks <= min(len(x), len(y)) // 2:
        raise ValueError(
            f"{blocks} blocks of sets of {len(x)} and {len(y)} vectors: give between 1 and "
            f"{min(len(x), len(y)) // 2}, a block needs two vectors of each"
        )
    generator = torch.Generator().manual_seed(seed)
    parts = [s[torch.randperm(len(s), generator=generator)].tensor_split(blocks) for s in (x, y)]
    values = torch.stack([_squared_mmd(a, b) for a, b in zip(*parts, strict=True)])
    return Estimate(
        float(values.mean()), float(values.std()) / blocks**0.5 if blocks > 1 else float("nan")
    )


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Gretton et al., "A kernel two-sample test", lemma 6, the pairs i = j left out."""
    n, m = len(x), len(y)
    k_xx, k_yy, k_xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return within_x + within_y - 2.0 * k_xy.mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
