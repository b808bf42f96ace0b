"""Tensors that a function uses without being given them: found, and made arguments.

A solve runs outside the transforms around it, so that whatever a condition captures from within
them, as `labels = targets[:n]` in a function under `vmap`, and whatever requires a derivative, as
a module's parameters, has to come in as an argument. `captured` finds such tensors in closures,
defaults, bound objects, containers and named globals; `substituted` runs with others in their
place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_DEEPEST = 12


def wrapped(t: Tensor) -> bool:
    """Whether `t` was made inside a torch.func transform."""
    inside = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return inside.is_functorch_wrapped_tensor(t)


def captured(function: Callable[..., Any]) -> list[Tensor]:
    """The tensors that `function` reaches by itself and that derivatives or solves must see."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if wrapped(value) or value.requires_grad or _dual(value):
                found[id(value)] = value
            return
        plain = value is None or isinstance(value, (str, bytes, int, float, complex, ModuleType))
        if plain or isinstance(value, type) or depth > _DEEPEST or id(value) in seen:
            return
        seen.add(id(value))
        for part in _parts(value):
            visit(part, depth + 1)

    visit(function, 0)
    return list(found.values())


def _dual(t: Tensor) -> bool:
    forward = torch.autograd.forward_ad
    return forward._current_level >= 0 and forward.unpack_dual(t, level=0).tangent is not None


def _parts(value: Any) -> Iterator[Any]:
    """What a value holds on to."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            # A cell is empty until the variable has been assigned.
            try:
                yield cell.cell_contents
            except ValueError:
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        for name in _names(value.__code__):
            yield value.__globals__.get(name)
        yield getattr(value, "__wrapped__", None)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif not type(value).__module__.startswith(("torch", "builtins", "numpy")):
        yield from getattr(value, "__dict__", {}).values()
        yield type(value).__dict__.get("__call__")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Substitute(TorchFunctionMode):
    def __init__(self, places: dict[int, Tensor]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(value: Any) -> Any:
            return self.places.get(id(value), value) if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)


def substituted(old: Sequence[Tensor], new: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Within, every operation on one of `old` is one on its partner in `new`."""
    if not old:
        return nullcontext()
    return _Substitute({id(a): b for a, b in zip(old, new, strict=True)})
