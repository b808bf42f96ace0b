"""Numbers that stopped being finite: found, located, reported."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFinite(FloatingPointError):
    """A prediction or a state stopped being finite."""


def readable(x: Tensor) -> bool:
    """Whether the numbers can be looked at: inside vmap they cannot; check them outside."""
    inside = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while inside.is_functorch_wrapped_tensor(x) and not inside.is_batchedtensor(x):
        x = inside.get_unwrapped(x)
    return not inside.is_batchedtensor(x)


def require_finite(x: Tensor | None, what: str) -> None:
    """Raise NonFinite, with the share of bad elements; inside vmap numbers cannot be read."""
    if x is None or not readable(x):
        return
    bad = 1 - torch.isfinite(x).double().mean().item()
    if bad > 0:
        raise NonFinite(
            f"{what} is not finite in {bad:.1%} of its elements (dtype {x.dtype}): check the "
            "network's weights and inputs; float16 networks overflow, try bfloat16 or float32"
        )
