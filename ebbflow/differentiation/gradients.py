"""The backward passes of a solve that was not recorded: recursive checkpoints, undoing, adjoint.

All three are one autograd.Function over a `Problem`: its forward marches without a graph and keeps
the accepted steps as numbers; its backward is one of the functions below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Cotangents = list[Tensor]


class Problem(Protocol):
    """A solve as its gradients see it: n accepted steps between carried states."""

    def forward(self, y0: Tensor) -> tuple[Tensor, State, int]:
        """Outputs (T, …), the last carried state and the number of accepted steps."""
        ...

    def start(self, y0: Tensor) -> State:
        """The first carried state."""
        ...

    def replay(self, index: int, state: State) -> tuple[State, list[Tensor]]:
        """The state after an accepted step, and the outputs in it."""
        ...

    def undo(self, index: int, state: State) -> State:
        """The state before an accepted step."""
        ...

    def output_indices(self, index: int) -> list[int]:
        """Which outputs an accepted step holds."""
        ...


@dataclass
class Backward:
    """Cotangents of the carried state and of the parameters, step by step towards the start."""

    problem: Problem
    parameters: Sequence[Tensor]
    outputs: Tensor
    state: list[Tensor | None]
    gradients: list[Tensor | None] = field(default_factory=list)

    def pull(self, function: Callable[..., Any], inputs: State, cotangents: Any) -> None:
        """One local vector–Jacobian product: inputs' cotangents replace the state's."""
        with torch.enable_grad():
            inputs = tuple(x.detach().requires_grad_() for x in inputs)
            values = function(*inputs)
            pairs = [
                (v, c)
                for v, c in zip(values, cotangents, strict=True)
                if c is not None and v.requires_grad
            ]
            wanted = [*inputs, *self.parameters]
            if pairs:
                found = torch.autograd.grad(
                    [v for v, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True
                )
            else:
                found = [None] * len(wanted)
        self.state = list(found[: len(inputs)])
        new = found[len(inputs) :]
        if not self.gradients:
            self.gradients = [None] * len(new)
        for i, g in enumerate(new):
            if g is not None:
                old = self.gradients[i]
                self.gradients[i] = g if old is None else old + g

    def step(self, index: int, state: State) -> None:
        """Back through accepted step `index`, given the carried state before it."""
        places = self.problem.output_indices(index)

        def local(*inputs: Tensor) -> list[Tensor]:
            after, outputs = self.problem.replay(index, inputs)
            return [*after, *outputs]

        self.pull(local, state, [*self.state, *(self.outputs[k] for k in places)])

    def finish(self, y0: Tensor) -> list[Tensor | None]:
        """Through the start: the gradients of y0 and of the parameters."""
        self.pull(lambda y: self.problem.start(y), (y0,), self.state)
        first = self.state[0]
        return [self.outputs[0] if first is None else self.outputs[0] + first, *self.gradients]


def undoing(
    problem: Problem,
    parameters: Sequence[Tensor],
    outputs: Tensor,
    last: Tensor | None,
    y0: Tensor,
    end: State,
    n: int,
) -> list[Tensor | None]:
    """Reconstruct each state from the one after it: one state's memory for any number of steps."""
    backward = Backward(problem, parameters, outputs, [last, *[None] * (len(end) - 1)])
    state = end
    for index in reversed(range(n)):
        with torch.no_grad():
            state = problem.undo(index, state)
        backward.step(index, state)
    return backward.finish(y0)


def checkpointing(
    problem: Problem,
    parameters: Sequence[Tensor],
    outputs: Tensor,
    last: Tensor | None,
    y0: Tensor,
    n: int,
    checkpoints: int,
) -> list[Tensor | None]:
    """Binomial checkpointing: at most `checkpoints` states besides the first are held at once.

    With c checkpoints and every step recomputed at most r times, C(c + r, r) steps can be reversed;
    the least such r is used. Algorithm 799: Revolve (Griewank, Walther 2000).
    """
    with torch.no_grad():
        first = problem.start(y0)
    backward = Backward(problem, parameters, outputs, [last, *[None] * (len(first) - 1)])

    def run(lo: int, hi: int, state: State) -> State:
        with torch.no_grad():
            for index in range(lo, hi):
                state = problem.replay(index, state)[0]
        return state

    def sweep(lo: int, hi: int, state: State, slots: int) -> None:
        # The later part recurses (its depth is at most `slots`); the earlier part loops.
        while hi - lo > 1:
            if slots == 0:
                for index in reversed(range(lo, hi)):
                    backward.step(index, run(lo, index, state))
                return
            middle = lo + split(hi - lo, slots)
            sweep(middle, hi, run(lo, middle, state), slots - 1)
            hi = middle
        if hi > lo:
            backward.step(lo, state)

    sweep(0, n, first, checkpoints)
    return backward.finish(y0)


def split(steps: int, slots: int) -> int:
    """How far to advance before the next checkpoint: the later part then needs no more sweeps."""
    r = 1
    while math.comb(slots + r, r) < steps:
        r += 1
    # The later part has one slot fewer and the same r, the earlier part the same slots and r - 1.
    later = math.comb(slots - 1 + r, r)
    return min(max(steps - later, 1), steps - 1)


class Replayed(torch.autograd.Function):
    """A solve whose backward pass is `back(outputs' cotangents, y0, parameters)`."""

    @staticmethod
    def forward(ctx: Any, problem: Any, y0: Tensor, *parameters: Tensor) -> Tensor:
        outputs, end, n = problem.forward(y0.detach())
        ctx.problem, ctx.n, ctx.kept, ctx.count = problem, n, len(end), len(parameters)
        ctx.save_for_backward(y0, outputs, *end, *parameters)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        y0, outputs, *rest = ctx.saved_tensors
        end, parameters = tuple(rest[: ctx.kept]), rest[ctx.kept :]
        found = ctx.problem.backward(cotangents[0], y0.detach(), outputs, end, ctx.n, parameters)
        return (None, *found)
