"""Triangular systems, solved many unknowns at a time.

    s_t = h_t(s_0, …, s_{t-1}),   t = 0 … n - 1

is what every loop computes: a recurrent network, autoregressive sampling, an ODE solver. Taken in
order it costs n calls of h. As a fixed point it takes as many rounds as its information needs to
travel, each round one call of h on all the unknowns together, and never more than n: after round k
the first k unknowns are exact.
Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, algorithms 1 to 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Carry = tuple[Tensor, ...]
"""What the past leaves behind, one or more tensors whose first axis is the batch."""


class UnknownNotFinite(FloatingPointError):
    """Unknown `t` of some system is NaN or infinite, and everything before it was right."""

    def __init__(self, t: int) -> None:
        super().__init__(f"unknown {t} is not finite")
        self.t = t


class System(Protocol):
    """A batch of triangular systems, each a cheap recursion around one expensive call:

        q_t = ask(t, c_t),   s_t = answer(t, q_t),   c_{t+1} = advance(t, c_t, q_t, s_t).

    `rows` (R,) are the places in the batch that a call is about; tensors have R in front. The carry
    bounds the memory; a system without a short one carries all its past (`Causal`).
    """

    @property
    def length(self) -> int:
        """n, the number of unknowns."""
        ...

    def ask(self, t: int, carry: Carry, rows: Tensor) -> Tensor:
        """q_t (R, *any)."""
        ...

    def answer(self, times: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        """s_t (R, *shape) for queries of different t (R,); the only expensive call."""
        ...

    def advance(
        self, t: int, carry: Carry, query: Tensor, answer: Tensor, rows: Tensor
    ) -> Sequence[Tensor | None]:
        """c_{t+1}; None for a part that nothing will read."""
        ...


@dataclass(frozen=True)
class Causal:
    """The system of any causal function `h(times (R,), past (R, n, *shape)) -> (R, *shape)`.

    Row i of `past` holds s_0 … s_{t-1} for its own t = times[i], and zeros from there on.
    """

    h: Callable[[Tensor, Tensor], Tensor]
    length: int

    def start(self, like: Tensor) -> Carry:
        """The empty past of a batch like (B, *shape)."""
        return (like.new_zeros(len(like), self.length, *like.shape[1:]),)

    def ask(self, t: int, carry: Carry, rows: Tensor) -> Tensor:
        return carry[0]

    def answer(self, times: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        return self.h(times, queries)

    def advance(
        self, t: int, carry: Carry, query: Tensor, answer: Tensor, rows: Tensor
    ) -> Sequence[Tensor | None]:
        past = carry[0].clone()
        past[:, t] = answer
        return (past,)


@dataclass(frozen=True)
class Solution:
    """The carry after the last unknown, and what it took, one number a system of the batch.

    rounds (B,): calls of `answer` that the system took part in; evaluations (B,): unknowns it had
    evaluated; calls: of `answer` in all; residual (B,): the largest change of an unknown after it
    had been used; converged (B,).
    """

    carry: Carry
    rounds: Tensor
    evaluations: Tensor
    calls: int
    residual: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Method:
    """How a round updates the unknowns of a window.

    Args:
        block: 1 is Jacobi's method, all unknowns in one call. Otherwise Jacobi over blocks with
            Gauss-Seidel in each: `block` calls, the r-th for the r-th unknown of every block, each
            with the newest values; fewer evaluations, more calls.
        memory: differences of earlier rounds that Anderson acceleration combines; 0 is none.
    """

    block: int = 1
    memory: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or self.memory < 0 or (self.block > 1 and self.memory):
            raise ValueError(
                f"block {self.block} must be at least 1, memory {self.memory} at least 0, and one "
                "of them neutral: Anderson acceleration is of Jacobi's method, block=1"
            )


def solve(
    system: System,
    carry: Carry,
    guess: Tensor,
    *,
    window: int | None = None,
    method: Method | None = None,
    tolerance: float = 1e-6,
    max_rounds: int | None = None,
) -> Solution:
    """Solve every system of a batch as if it were alone.

    Each keeps `window` unknowns in flight from its own front on. An unknown is accepted once
    everything it was computed from moved by no more than `tolerance` (greatest absolute value); the
    front's is computed from accepted ones alone, so each call accepts at least one, and with
    tolerance 0 the answer is that of the loop. Systems that are done are not evaluated again.

    Args:
        carry: c_0, tensors (B, …).
        guess: for the unknowns, (B, *shape); one that enters the window later starts from its
            neighbour's value.
        window: unknowns in flight, all n unless given; the memory is that of `window` + a few.
        max_rounds: stop after so many calls; the rest of the loop then takes its guesses.

    Raises ValueError for a window or rounds below 1 or a negative tolerance, FloatingPointError
    naming t when an accepted unknown is not finite.
    """
    n = system.length
    width = n if window is None else min(window, n)
    if width < 1 or not tolerance >= 0 or (max_rounds is not None and max_rounds < 1):
        raise ValueError(
            f"window {window} and max_rounds {max_rounds} must be at least 1 and tolerance "
            f"{tolerance} at least 0"
        )
    method = method or Method()
    state = _State.of(system, carry, guess, width)
    accelerate = _Anderson(method.memory) if method.memory else None
    while bool((state.front < n).any()) and (max_rounds is None or state.calls < max_rounds):
        state.round(method.block, tolerance, accelerate)
    return state.finish()


@dataclass
class _State:
    """Unknown t of system i lies at values[t % width, i], for t from front[i] on."""

    system: System
    carry: Carry
    values: Tensor
    front: Tensor
    rounds: Tensor
    evaluations: Tensor
    residual: Tensor
    calls: int = 0

    @staticmethod
    def of(system: System, carry: Carry, guess: Tensor, width: int) -> _State:
        zeros = torch.zeros(len(guess), dtype=torch.long)
        values = guess.expand(width, *guess.shape).clone()
        residual = torch.zeros(len(guess), dtype=torch.float64)
        return _State(system, tuple(carry), values, zeros, zeros.clone(), zeros.clone(), residual)

    @property
    def width(self) -> int:
        return len(self.values)

    def round(self, block: int, tolerance: float, accelerate: _Anderson | None) -> None:
        """`block` calls, and the fronts moved on."""
        front, width, n = self.front, self.width, self.system.length
        active = front < n
        change = torch.full((len(front), width), torch.inf, dtype=torch.float64)
        before = self.values.clone() if accelerate else None
        for phase in range(min(block, width)):
            times, queries, rows = self._queries(block, phase)
            if not len(rows):
                continue
            answers = self.system.answer(times, queries, rows)
            slots = times % width
            moved = (answers - self.values[slots, rows]).reshape(len(rows), -1).abs().amax(1)
            change[rows, times - front[rows]] = moved.double().cpu()
            self.values[slots, rows] = answers
            self.calls += 1
            self.rounds += active
            self.evaluations.index_add_(0, rows, torch.ones_like(rows))
        settled = (change <= tolerance).long().cumprod(1).sum(1)
        accepted = torch.minimum((settled // block + 1) * block, (n - front).clamp(max=width))
        used = torch.arange(width) < (accepted - block).clamp(min=0)[:, None]
        largest = torch.where(used, change, 0.0).amax(1)
        self.residual = torch.maximum(self.residual, largest)
        if accelerate is not None and before is not None:
            accelerate(self, before, accepted)
        self._accept(accepted)

    def _queries(self, block: int, phase: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the recursion through the window with the present values: (times, queries, rows) of
        the unknowns at this place of their block."""
        asked: list[tuple[int, Tensor, Tensor]] = []
        last = (self.front + self.width).clamp(max=self.system.length)

        def keep(t: int, rows: Tensor, query: Tensor) -> None:
            here = (t - self.front[rows]) % block == phase
            if bool(here.all()):
                asked.append((t, rows, query))
            elif bool(here.any()):
                asked.append((t, rows[here], query[here.to(query.device)]))

        self._sweep(last, keep)
        if not asked:
            return torch.empty(0), torch.empty(0), torch.empty(0)
        times = torch.cat([torch.full_like(rows, t) for t, rows, _ in asked])
        return times, torch.cat([q for *_, q in asked]), torch.cat([rows for _, rows, _ in asked])

    def _sweep(self, last: Tensor, visit: Callable[[int, Tensor, Tensor], None]) -> Carry:
        """The carry of each system moved from its front to `last` (B,)."""
        carry = list(self.carry)
        everything = len(self.front)
        for t in range(int(self.front.min()), int(last.max())):
            rows = ((self.front <= t) & (t < last)).nonzero()[:, 0]
            if not len(rows):
                continue
            whole = len(rows) == everything
            part = tuple(carry) if whole else tuple(c[rows.to(c.device)] for c in carry)
            query = self.system.ask(t, part, rows)
            visit(t, rows, query)
            # A copy: the carry may keep it, and the slot will be written again.
            value = self.values[t % self.width, rows.to(self.values.device)]
            for i, new in enumerate(self.system.advance(t, part, query, value, rows)):
                if new is not None:
                    carry[i] = new if whole else carry[i].index_copy(0, rows.to(new.device), new)
        return tuple(carry)

    def _accept(self, count: Tensor) -> None:
        """Move each front by count (B,), and give the unknowns that enter a first value."""
        n, width = self.system.length, self.width
        for offset in range(int(count.max())):
            rows = (offset < count).nonzero()[:, 0]
            times = self.front[rows] + offset
            found = self.values[times % width, rows]
            if found.is_floating_point() and not bool(torch.isfinite(found).all()):
                finite = torch.isfinite(found).flatten(1).all(1).cpu()
                raise UnknownNotFinite(int(times[~finite].min()))
        self.carry = self._sweep(self.front + count, lambda t, rows, query: None)
        newest = self.values[(self.front + width - 1) % width, torch.arange(len(count))]
        for offset in range(int(count.max())):
            rows = (offset < count).nonzero()[:, 0]
            self.values[(self.front[rows] + offset) % width, rows] = newest[rows]
        self.front = (self.front + count).clamp(max=n)

    def finish(self) -> Solution:
        """What has been found; systems cut short take their guesses for the rest."""
        n = self.system.length
        converged = self.front >= n
        while bool((self.front < n).any()):
            self._accept((n - self.front).clamp(max=self.width))
        residual = torch.where(converged, self.residual, torch.inf)
        return Solution(self.carry, self.rounds, self.evaluations, self.calls, residual, converged)


class _Anderson:
    """Anderson acceleration that keeps the triangle: the weights of unknown t minimise the residual
    of the unknowns up to t, since later ones cannot help it."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.steps: list[Tensor] = []  # differences of values, newest first, (width, B, d)
        self.falls: list[Tensor] = []  # differences of residuals
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, state: _State, before: Tensor, count: Tensor) -> None:
        """Mix the unknowns that stay; `before` holds the values that this round started from."""
        width, batch = before.shape[:2]
        slots = torch.arange(width)[:, None]
        offset = (slots - state.front) % width
        stays = (offset >= count) & (state.front + offset < state.system.length)
        mask = stays[:, :, None].to(before.device)
        old = before.reshape(width, batch, -1)
        new = state.values.reshape(width, batch, -1)
        residual = new - old
        if self.last is not None:
            values, residuals, known = self.last
            self.steps = [torch.where(known, old - values, 0.0), *self.steps][: self.memory]
            self.falls = [torch.where(known, residual - residuals, 0.0), *self.falls]
            self.falls = self.falls[: self.memory]
        self.last = (old, residual, mask)
        # A slot that passes on to another unknown has no past.
        self.steps = [torch.where(mask, step, 0.0) for step in self.steps]
        self.falls = [torch.where(mask, fall, 0.0) for fall in self.falls]
        if not self.falls:
            return
        falls, steps = torch.stack(self.falls).double(), torch.stack(self.steps).double()
        gram = torch.einsum("iwbd,jwbd->wbij", falls, falls)
        right = torch.einsum("iwbd,wbd->wbi", falls, residual.double())
        order = ((state.front + slots) % width).to(before.device)  # slots by rising t
        gram = gram.gather(0, order[:, :, None, None].expand_as(gram)).cumsum(0)
        right = right.gather(0, order[:, :, None].expand_as(right)).cumsum(0)
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, :, None, None]
        ridge = (1e-10 * trace + torch.finfo(torch.float64).tiny) * torch.eye(
            len(falls), dtype=torch.float64, device=gram.device
        )
        weights = torch.linalg.solve(gram + ridge, right)
        weights = torch.empty_like(weights).scatter(
            0, order[:, :, None].expand_as(weights), weights
        )
        change = torch.einsum("wbi,iwbd->wbd", weights, steps + falls)
        mixed = new - change.to(old.dtype)
        good = mask & torch.isfinite(mixed).all(-1, keepdim=True)
        state.values = torch.where(good, mixed, new).reshape(before.shape)
