"""Forward derivatives, from reverse ones and to any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def push(f: Callable[..., Any], x: Tensor, primals: tuple[Tensor, ...], tangents: Any) -> Tensor:
    """The forward derivative of `f`, whose value is like `x`: the transpose of the reverse one."""

    def pull(u: Tensor) -> Any:
        return torch.func.vjp(f, *primals)[1](u)

    return torch.func.vjp(pull, torch.zeros_like(x))[1](tuple(tangents))[0]


@contextmanager
def tangent_rule(*saved: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The saved tensors of an autograd.Function, inside its `jvp`, for derivatives of any order.

    torch runs `jvp` with forward-mode differentiation off, so that jacfwd(jacfwd(…)) of any
    Function is silently zero or too small. Here it is on again, for the outer levels alone.
    """
    forward = torch.autograd.forward_ad
    primals = tuple(forward.unpack_dual(x, level=0).primal for x in saved)
    with forward._set_fwd_grad_enabled(True):
        yield primals
