"""The vector field as the solvers see it: one tensor in, one tensor out, every call counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One time, or one for each sample in float64; a step is written likewise.
Time = float | Tensor


class Structure:
    """How a nested state (tuples, lists, dicts of tensors) packs into one tensor.

    A single tensor is left as it is. Leaves of one state are flattened side by side: (N,), or
    (B, N) with one batch axis, in the widest of their types.
    Raises TypeError for leaves that are no floating tensors of at least 32 bits, ValueError where
    batch axes disagree.
    """

    def __init__(self, y0: Any, batch_dims: int) -> None:
        self.batch_dims = batch_dims
        self.single = isinstance(y0, Tensor)
        self.leaves = leaves(y0)
        if not self.leaves:
            raise ValueError(f"y0 must hold at least one tensor, got {y0!r}")
        for leaf in self.leaves:
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(f"y0 must be floating or complex, got {leaf.dtype}: use y0.float()")
            if leaf.dtype in (torch.float16, torch.bfloat16, torch.complex32):
                raise TypeError(
                    f"y0 is {leaf.dtype}, in which steps round away; pass y0.float() (the state is "
                    "at least float32) and let f cast to the network's own type inside"
                )
            if (
                leaf.ndim < batch_dims
                or leaf.shape[:batch_dims] != self.leaves[0].shape[:batch_dims]
            ):
                raise ValueError(
                    f"with batch_dims={batch_dims} every tensor of y0 must begin with the same "
                    f"batch axis, got shapes {[tuple(leaf.shape) for leaf in self.leaves]}"
                )
        self.template = y0
        self.shapes = [leaf.shape[batch_dims:] for leaf in self.leaves]
        self.dtypes = [leaf.dtype for leaf in self.leaves]
        self.dtype = self.dtypes[0]
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def pack(self, y: Any) -> Tensor:
        """The tensor of a structure like y0."""
        if self.single:
            return y
        parts = leaves(y)
        if len(parts) != len(self.shapes):
            raise ValueError(
                f"f must return y0's structure of {len(self.shapes)} tensors, got {len(parts)}"
            )
        flat = []
        for part, shape in zip(parts, self.shapes, strict=True):
            lead = part.shape[: part.ndim - len(shape)]
            flat.append(part.expand(*lead, *shape).to(self.dtype).reshape(*lead, -1))
        return torch.cat(flat, dim=-1)

    def unpack(self, flat: Tensor) -> Any:
        """The structure of a tensor; axes before the batch (the times) are kept in front."""
        if self.single:
            return flat
        parts, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = shape.numel()
            part = flat[..., start : start + size].reshape(*flat.shape[:-1], *shape)
            parts.append(part if part.dtype == dtype else _cast(part, dtype))
            start += size
        return _rebuild(self.template, iter(parts))


def _cast(part: Tensor, dtype: torch.dtype) -> Tensor:
    return (part.real if part.is_complex() and not dtype.is_complex else part).to(dtype)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key])]
    if isinstance(tree, tuple | list):
        return [leaf for branch in tree for leaf in leaves(branch)]
    raise TypeError(
        f"a state is a tensor or tuples, lists and dicts of tensors, got {type(tree).__name__}"
    )


def _rebuild(tree: Any, parts: Any) -> Any:
    if isinstance(tree, Tensor):
        return next(parts)
    if isinstance(tree, dict):
        return {key: _rebuild(branch, parts) for key, branch in tree.items()}
    branches = [_rebuild(branch, parts) for branch in tree]
    if hasattr(tree, "_fields"):
        return type(tree)(*branches)
    return type(tree)(branches)


class Field:
    """`f` on packed states, with the time in the state's type and device and a count of calls.

    With a batch axis, `rows` are the indices of the samples that are passed (None: all of them).
    """

    def __init__(self, f: Callable[..., Any], structure: Structure, compact: bool = False) -> None:
        self.f, self.structure, self.compact = f, structure, compact
        self.real = structure.dtype.to_real() if structure.dtype.is_complex else structure.dtype
        self.rank = structure.leaves[0].ndim
        self.device = structure.leaves[0].device
        self.rows: Tensor | None = None
        self.calls = 0

    def __call__(self, t: Time, y: Tensor) -> Tensor:
        self.calls += 1
        return self.value(t, y)

    def value(self, t: Time, y: Tensor) -> Tensor:
        """f, not counted."""
        time, state = self.time(t), self.structure.unpack(y)
        value = self.f(time, state, self.rows) if self.compact else self.f(time, state)
        out = self.structure.pack(value)
        if not isinstance(out, Tensor) or out.shape != y.shape:
            raise ValueError(
                f"f(t, y) must return y's shape {tuple(y.shape)}, got "
                f"{tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}"
            )
        return out if out.dtype == y.dtype else out.to(y.dtype)

    def time(self, t: Time) -> Tensor:
        """The time as f sees it: a scalar, or (B, 1, …), of the state's type."""
        if isinstance(t, Tensor):
            return t.to(self.real).reshape(-1, *(1,) * (self.rank - 1)) if t.ndim else t
        return torch.tensor(t, dtype=self.real, device=self.device)

    def weight(self, h: Time, y: Tensor) -> float | Tensor:
        """The step as something that multiplies y: a float, or a tensor (B, 1, …) of its type."""
        if isinstance(h, Tensor):
            return h.to(self.real).reshape(-1, *(1,) * (y.ndim - 1))
        return h


def later(t: Time, c: float, h: Time) -> Time:
    """`t + c h`."""
    if isinstance(t, Tensor) and isinstance(h, Tensor):
        return torch.add(t, h, alpha=c)
    return t + c * h


def scaled(y: Tensor, w: float | Tensor, v: Tensor) -> Tensor:
    """`y + w v`."""
    return torch.addcmul(y, w, v) if isinstance(w, Tensor) else torch.add(y, v, alpha=w)


def combination(coefficients: Any, ks: list[Tensor]) -> Tensor:
    """`Σ c_j k_j` over the coefficients that are not zero."""
    out: Tensor | None = None
    for c, k in zip(coefficients, ks, strict=False):
        if c:
            out = k * c if out is None else torch.add(out, k, alpha=c)
    return torch.zeros_like(ks[0]) if out is None else out
