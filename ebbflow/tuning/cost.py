"""What a call costs, in operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operations(call: Callable[[], Any]) -> int:
    """Multiplications and additions of matrix products, convolutions and attention in a call, as
    torch counts them; 0 for functions that have none of them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
