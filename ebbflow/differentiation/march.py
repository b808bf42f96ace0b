"""Stepping through time: fixed or adaptive, one step size or one for each sample.

Every accepted step is written down as numbers (`Passage`), which is all that replaying or undoing
a solve needs; nothing of the state is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ebbflow.differentiation.fields import Field, Time
from ebbflow.differentiation.methods import Method, State, Step

DONE, MAX_STEPS, STUCK, EVENT = 0, 1, 2, 3
STATUS = ("done", "max_steps", "stuck", "event")
# Of the controller of steps (`growth`).
SAFETY, SMOOTHING, FORESIGHT = 0.97, 0.4, 0.3
# Of fixed steps: the relative gap between two copies of a solution that is closed.
CLOSE = 1e-3


@dataclass(frozen=True)
class Passage:
    """One accepted step: from t by h, and the outputs in it as (index, θ).

    With a batch axis t, h and θ hold one number for each of `rows`; `moved` are those that moved.
    Where the gap in the state (`Method.gap`) was closed after the step, which cannot be undone,
    `before` is the state before it, with a batch axis of the samples `closed` alone.
    """

    t: Time
    h: Time
    outputs: tuple[tuple[int, Time, Tensor | None], ...] = ()
    rows: Tensor | None = None
    moved: Tensor | None = None
    before: State | None = None
    closed: Tensor | None = None


@dataclass(frozen=True)
class Control:
    """How steps are chosen: `grid` (all of them, given) or a tolerance with a cap on attempts.

    `record`: whether accepted steps are written down.
    """

    rtol: float = 1e-6
    atol: float = 1e-9
    max_steps: int = 10_000
    first_step: float | None = None
    grid: tuple[float, ...] | None = None
    record: bool = True


@dataclass
class March:
    """What a solve leaves: outputs, the last carried state, its steps and how it ended."""

    outputs: list[Tensor]
    state: State
    passages: list[Passage] = field(default_factory=list)
    status: Tensor | int = DONE
    steps: Tensor | int = 0
    rejected: Tensor | int = 0
    end: Time = 0.0
    # Of each sample, where each has its own.
    evaluations: Tensor | None = None


OnStep = Callable[[Passage, Step], None]


def march(
    method: Method,
    f: Field,
    times: list[float] | Tensor,
    y0: Tensor,
    control: Control,
    on_step: OnStep | None = None,
) -> March:
    """Solve from the first of `times` to the last; a tensor of times (T, B) is per sample."""
    if isinstance(times, Tensor):
        from ebbflow.differentiation.batched import march_each

        return march_each(method, f, times, y0, control, on_step)
    if control.grid is not None:
        return _march_grid(method, f, times, y0, control, on_step)
    return _march_one(method, f, times, y0, control, on_step)


def advance(method: Method, f: Field, passage: Passage, state: State) -> tuple[State, list[Tensor]]:
    """Replay one accepted step: the state after it and the outputs in it, in their order."""
    if passage.moved is not None:
        from ebbflow.differentiation.batched_steps import advance_each

        return advance_each(method, f, passage, state)
    step = method.step(f, passage.t, passage.h, state)
    after = step.state if passage.before is None else method.closed(step.state)
    return after, [_output(step, theta) for _, theta, _ in passage.outputs]


def undo(method: Method, f: Field, passage: Passage, state: State) -> State:
    """The state before an accepted step."""
    if passage.moved is not None:
        from ebbflow.differentiation.batched_steps import undo_each

        return undo_each(method, f, passage, state)
    return passage.before or method.undo(f, passage.t, passage.h, state)


def detached(state: State) -> State:
    """The state without its graph."""
    return tuple(part.detach() for part in state)


def _output(step: Step, theta: Time) -> Tensor:
    if theta == 1.0:
        return step.state[0]
    assert step.dense is not None
    return step.dense(theta)


def _march_grid(
    method: Method,
    f: Field,
    times: list[float],
    y0: Tensor,
    control: Control,
    on_step: OnStep | None,
) -> March:
    """Steps between consecutive nodes of a grid that contains every output time."""
    run = March([y0], method.start(f, times[0], y0))
    grid, k = control.grid or (), 1
    for t, s in pairwise(grid):
        step = method.step(f, t, s - t, run.state)
        gap, before, state = method.gap(step.state), None, step.state
        if gap is not None and bool(gap.norm() > CLOSE * state[0].norm()):
            before, state = detached(run.state), method.closed(state)
        run.state = state
        hit = k < len(times) and s == times[k]
        passage = Passage(t, s - t, ((k, 1.0, None),) if hit else (), before=before)
        if hit:
            run.outputs.append(step.state[0])
            k += 1
        if control.record:
            run.passages.append(passage)
        if on_step is not None:
            on_step(passage, step)
    run.steps, run.end = len(grid) - 1, times[-1]
    return run


def _march_one(
    method: Method,
    f: Field,
    times: list[float],
    y0: Tensor,
    control: Control,
    on_step: OnStep | None,
) -> March:
    t, last = times[0], times[-1]
    run = March([y0], method.start(f, t, y0), end=t)
    sign = 1.0 if last > t else -1.0
    h = control.first_step or first_step(method, f, t, y0, run.state, last - t, control)
    # The error and the size of the last accepted step.
    previous, before = 1.0, h
    # Copies of the solution may part like the errors of steps add up: by the tolerance a step.
    k, since = 1, 0
    for _ in range(control.max_steps):
        target = last if method.has_dense else times[k]
        lands = h >= abs(target - t) * (1 - 1e-12)
        step_h = target - t if lands else sign * h
        step = method.step(f, t, step_h, run.state)
        y, y1 = run.state[0].detach(), step.state[0].detach()
        assert step.error is not None
        error = float(error_norm(step.error.detach(), y, y1, control))
        if error <= 1:
            s = target if lands else t + step_h
            outputs = []
            while k < len(times) and (times[k] - s) * sign <= 0:
                theta = 1.0 if times[k] == s else (times[k] - t) / step_h
                outputs.append((k, theta, None))
                run.outputs.append(_output(step, theta))
                k += 1
            gap, kept, state, since = method.gap(step.state), None, step.state, since + 1
            if gap is not None and float(error_norm(gap.detach(), y, y1, control)) > since:
                kept, state, since = detached(run.state), method.closed(state), 0
            passage = Passage(t, step_h, tuple(outputs), before=kept)
            if control.record:
                run.passages.append(passage)
            run.steps += 1
            run.state, t = state, s
            if on_step is not None:
                on_step(passage, step)
            if k == len(times):
                run.end = t
                return run
            # A step shortened to land says nothing about the step size that the error allows.
            grown = abs(step_h) * growth(error, previous, method.error_order, abs(step_h) / before)
            if lands and abs(step_h) < h:
                h = max(grown, h)
            else:
                h, previous, before = grown, max(error, 1e-4), abs(step_h)
        else:
            run.rejected += 1
            size = error if math.isfinite(error) else math.inf
            h = abs(step_h) * min(growth(size, previous, method.error_order), 0.9)
            if t + sign * h == t:
                run.status = STUCK
                break
    else:
        run.status = MAX_STEPS
    run.end = t
    run.outputs += [run.state[0]] * (len(times) - k)
    return run


def growth(error: float, previous: float, error_order: int, ratio: float = 1.0) -> float:
    """The factor to the next step: 0.97 e^(-1/q) e_prev^(0.4/q) (h/h_prev)^0.3, accepted steps'.

    q is the order of the estimate + 1, `ratio` is h/h_prev. The last two factors foresee that an
    error which has been growing goes on growing: few steps are rejected, though the error settles
    at 0.97^(q/0.6), near the tolerance. Predictive control as in Solving Ordinary Differential
    Equations II, section IV.8, with gains for explicit methods.
    """
    q = error_order + 1
    factor = SAFETY * max(error, 1e-10) ** (-1 / q) * previous ** (SMOOTHING / q)
    return min(10.0, max(0.2, factor * ratio**FORESIGHT))


def error_norm(error: Tensor, y: Tensor, y1: Tensor, control: Control) -> Tensor:
    """Root mean square of error / (atol + rtol max(|y|, |y1|)) over everything."""
    scale = torch.maximum(y.abs(), y1.abs()) * control.rtol + control.atol
    return torch.linalg.vector_norm(error / scale) / math.sqrt(max(error.numel(), 1))


@torch.no_grad()
def first_step(
    method: Method, f: Field, t: float, y: Tensor, state: State, span: float, control: Control
) -> float:
    """Hairer's starting step from the sizes of f and of its change over a small Euler step."""
    sign = 1.0 if span > 0 else -1.0
    y = y.detach()
    f0 = state[-1].detach() if len(state) > 1 and method.carries_slope else f(t, y)
    zero = torch.zeros_like(y)
    size, slope = (float(error_norm(v, y, zero, control)) for v in (y, f0))
    h0 = 1e-6 if min(size, slope) < 1e-5 else 0.01 * size / slope
    h0 = min(h0, abs(span))
    f1 = f(t + sign * h0, torch.add(y, f0, alpha=sign * h0))
    bend = float(error_norm(f1 - f0, y, zero, control)) / h0
    worst = max(slope, bend)
    order = method.error_order + 1
    h1 = max(1e-6, h0 * 1e-3) if not worst > 1e-15 else (0.01 / worst) ** (1 / order)
    h = min(100 * h0, h1, abs(span))
    return h if math.isfinite(h) else 1e-6 * abs(span)
