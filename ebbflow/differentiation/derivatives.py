"""Products with Jacobians, reverse and forward, to any order and at the least cost.

Outside every torch.func transform autograd's own graph serves: built once, used for all products,
at a fifth of the cost. Inside one, `torch.func` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Pull = Callable[[Tensor], tuple[Tensor, ...]]
Push = Callable[..., Tensor]


def _inside_transform() -> bool:
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def _fresh(t: Tensor) -> Tensor:
    """`t` as a point of a graph of its own, which still leads to what `t` depends on."""
    if torch.is_grad_enabled():
        view = t.view_as(t)
        # Not so for what a transform left behind: it says that it does, and its view does not.
        if view.requires_grad:
            return view
    return t.detach().requires_grad_()


def _products(outputs: Any, inputs: Any, cotangents: Any, create_graph: bool) -> Any:
    """autograd.grad, with zeros where nothing depends on anything."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(t) for t in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )


def pullback(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Pull]:
    """f(*primals) and u -> the products of u with the transposed Jacobians."""
    if _inside_transform():
        return torch.func.vjp(f, *primals)[:2]
    keep, inputs = torch.is_grad_enabled(), tuple(map(_fresh, primals))
    with torch.enable_grad():
        value = f(*inputs)
    return value if keep else value.detach(), lambda u: _products([value], inputs, [u], keep)


def pushforward(f: Callable[..., Tensor], x: Tensor, *primals: Tensor) -> Push:
    """Tangents -> the forward derivative of `f`, whose value is like `x`.

    It is the transpose of the reverse one, so that all of torch's functions have it.
    """
    if _inside_transform():
        pull = torch.func.vjp(lambda u: torch.func.vjp(f, *primals)[1](u), torch.zeros_like(x))[1]
        return lambda *tangents: pull(tangents)[0]
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        u = torch.zeros_like(x).requires_grad_()
        back = pullback(f, *primals)[1](u)
    return lambda *tangents: _products(back, [u], tangents, keep)[0]


def lazily(make: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
    """`make()`, made once; anew inside a transform, whose tensors must not outlive it."""
    made: list[Callable[..., Any]] = []

    def get() -> Callable[..., Any]:
        if _inside_transform():
            return make()
        if not made:
            made.append(make())
        return made[0]

    return get


def gradient(objective: Callable[..., Tensor]) -> Callable[..., Any]:
    """∇₁f of (x, *θ) -> scalar, of the structure of x."""

    def derivative(x: Any, *theta: Any) -> Any:
        # With a graph of our own, what requires a derivative could not be told from what does not.
        if _inside_transform() or torch.is_grad_enabled():
            return torch.func.grad(objective)(x, *theta)
        leaves, spec = pytree.tree_flatten(x)

        def value(*leaves: Tensor) -> Tensor:
            return objective(pytree.tree_unflatten(list(leaves), spec), *theta)

        there, pull = pullback(value, *leaves)
        return pytree.tree_unflatten(list(pull(torch.ones_like(there))), spec)

    return derivative


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
