"""Which tensors a function depends on, so that a solve's own backward pass can give them gradients.

Gradients that do not record the solve (checkpoint, adjoint, reversible) need every tensor that f
reads passed explicitly. `collect` finds them where a function can hold them; `checked` compares
with what one recorded evaluation really used and raises rather than return a silent zero.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# A node of autograd's graph and which of its outputs; a leaf stands for itself.
Place = tuple[Any, int]


def collect(*functions: Any) -> list[Tensor]:
    """Tensors with gradients in modules, closures, defaults, attributes and named globals."""
    found: dict[int, Tensor] = {}
    # Objects by id, kept alive so that no id is used twice.
    seen: dict[int, Any] = {}
    for function in functions:
        for tensor in _tensors(function, seen, 0):
            found[id(tensor)] = tensor
    return list(found.values())


def _tensors(thing: Any, seen: dict[int, Any], depth: int) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        if thing.requires_grad:
            yield thing
        return
    if thing is None or isinstance(thing, str | bytes | int | float | complex | type):
        return
    if inspect.ismodule(thing) or id(thing) in seen or depth > 6:
        return
    seen[id(thing)] = thing
    parts: Iterable[Any] = ()
    if isinstance(thing, nn.Module):
        # Plain attributes too: a module may keep a context tensor that is no parameter.
        parts = [*thing.parameters(), *vars(thing).values()]
        parts += [vars(m) for m in thing.modules() if m is not thing]
        parts += [type(m).forward for m in thing.modules()]
    elif isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, tuple | list | set | frozenset):
        parts = thing
    elif isinstance(thing, functools.partial):
        parts = [thing.func, thing.args, thing.keywords]
    elif inspect.ismethod(thing):
        parts = [thing.__func__, thing.__self__]
    elif inspect.isfunction(thing):
        if (thing.__module__ or "").partition(".")[0] == "torch":
            return
        used = inspect.getclosurevars(thing)
        parts = [used.nonlocals, used.globals, thing.__defaults__, thing.__kwdefaults__]
    elif hasattr(thing, "__dict__"):
        parts = [vars(thing), vars(type(thing)).get("__call__")]
    for part in parts:
        yield from _tensors(part, seen, depth + 1)


def checked(
    evaluate: Callable[..., list[Tensor]], inputs: list[Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    """The parameters that are not upstream of another, after one recorded evaluation.

    Raises ValueError where the evaluation depends on a tensor that is not among them, or on one of
    them both directly and through another (its gradient would be counted twice).
    """
    with torch.enable_grad():
        fresh = [x.detach().requires_grad_() for x in inputs]
        outputs = [y for y in evaluate(*fresh) if y.requires_grad]
    known = {_place(p) for p in [*fresh, *parameters]}
    reached, strangers = _walk([_place(y) for y in outputs], known)
    for leaf in strangers:
        raise ValueError(
            f"f depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and was "
            "not found in f's modules, closures or globals: name it with parameters=[…], or use "
            "gradient='direct'"
        )
    above: set[Place] = set()
    for p in parameters:
        if _place(p) in reached and p.grad_fn is not None:
            above |= _walk([(fn, nr) for fn, nr in p.grad_fn.next_functions if fn], known, True)[0]
    for p in parameters:
        if _place(p) in reached & above:
            raise ValueError(
                f"f uses a tensor of shape {tuple(p.shape)} both directly and through another that "
                "was computed from it outside f: compute that one inside f, or use "
                "gradient='direct'"
            )
    return [p for p in parameters if _place(p) not in above]


def _place(tensor: Tensor) -> Place:
    """Where a tensor sits in autograd's graph: the node that made it, or itself."""
    return (tensor, 0) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _walk(
    starts: list[Place], known: set[Place], through: bool = False
) -> tuple[set[Place], list[Tensor]]:
    """The known places upstream of `starts`, and the leaves that are not known."""
    reached: set[Place] = set()
    strangers: list[Tensor] = []
    seen: set[Place] = set()
    stack = list(starts)
    while stack:
        place = stack.pop()
        if hasattr(place[0], "variable"):
            place = (place[0].variable, 0)
        if place in seen:
            continue
        seen.add(place)
        if place in known:
            reached.add(place)
            if not through:
                continue
        if isinstance(place[0], Tensor):
            if place not in known and place[0].requires_grad:
                strangers.append(place[0])
            continue
        stack += [(fn, nr) for fn, nr in place[0].next_functions if fn is not None]
    return reached, strangers
