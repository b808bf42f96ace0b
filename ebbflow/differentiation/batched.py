"""Stepping a batch in which every sample has its own time, step size and end."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ebbflow.differentiation.batched_steps import (
    chosen,
    closed_of,
    march_grid_each,
    outputs_of,
    put,
    unreached,
)
from ebbflow.differentiation.fields import Field
from ebbflow.differentiation.march import (
    DONE,
    FORESIGHT,
    MAX_STEPS,
    SAFETY,
    SMOOTHING,
    STUCK,
    Control,
    March,
    OnStep,
    Passage,
)
from ebbflow.differentiation.methods import Method, State


@dataclass
class _Way:
    """The samples that are stepped together: with a compact field those still on their way.

    Each of `rows` is at `t`, tries `h` (signed) next, and has output `k`, at the time `due`, before
    it; `goal` is the time that no step passes. The last accepted step was `before`; `memory` is the
    logarithm of its error as the controller needs it. `on` are those that have not ended.
    """

    rows: Tensor
    on: Tensor
    t: Tensor
    h: Tensor
    sign: Tensor
    k: Tensor
    due: Tensor
    goal: Tensor
    memory: Tensor
    before: Tensor
    steps: Tensor
    since: Tensor

    def keep(self, places: Tensor) -> None:
        """Drop all samples but these."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name)[places])


def march_each(
    method: Method,
    f: Field,
    times: Tensor,
    y0: Tensor,
    control: Control,
    on_step: OnStep | None = None,
) -> March:
    """Solve each sample over its column of `times` (T, B), float64.

    A sample that has ended, or whose step was rejected, keeps its state; with a compact field only
    the samples that are still on their way are evaluated.
    """
    if control.grid is not None:
        return march_grid_each(method, f, times, y0, control, on_step)
    count, batch = times.shape
    every = torch.arange(batch, device=times.device)
    f.rows, calls = (every if f.compact else None), f.calls
    run = March([y0] * count, method.start(f, times[0], y0))
    run.status = torch.full_like(every, DONE)
    run.steps, run.rejected, run.evaluations = (torch.zeros_like(every) for _ in range(3))
    run.end = times[0].clone()
    span = times[-1] - times[0]
    sign = torch.sign(span)
    if control.first_step is None:
        h = sign * _first_steps(method, f, times[0], y0, run.state, span, control)
    else:
        h = sign * control.first_step
    memory = torch.full_like(h, math.log(SAFETY))
    first, last, on = torch.ones_like(every), times[-1].clone(), sign != 0
    due = times[1].clone()
    goal = last if method.has_dense else due
    now = times[0].clone()
    way = _Way(every, on, now, h, sign, first, due, goal, memory, h, run.steps, run.steps)
    # The state of the samples on the way, and their columns of the times.
    state, columns = run.state, times
    # Whether some samples of the way have ended and only keep their places.
    idle = False

    def end(which: Tensor, status: int, attempts: int) -> None:
        """Write down the samples of this mask, which end here: arrived, or with that status."""
        nonlocal state, columns, idle
        rows = way.rows[which]
        assert isinstance(run.end, Tensor) and run.evaluations is not None
        assert isinstance(run.status, Tensor) and isinstance(run.rejected, Tensor)
        run.status[rows] = torch.where(way.k[which] >= count, DONE, status)
        run.end[rows] = way.t[which]
        run.evaluations[rows] = f.calls - calls
        run.steps[rows] = way.steps[which]  # type: ignore[index]
        run.rejected[rows] = attempts - way.steps[which]
        if not f.compact:
            way.on, idle = way.on & ~which, True
            return
        ended = which.nonzero()[:, 0]
        pairs = zip(run.state, state, strict=True)
        run.state = tuple(whole.index_copy(0, rows, part[ended]) for whole, part in pairs)
        left = (~which).nonzero()[:, 0]
        way.keep(left)
        state, columns = tuple(part[left] for part in state), columns[:, left]

    if not bool(on.all()):
        end(~on, DONE, 0)
    for attempt in range(1, control.max_steps + 1):
        if not (way.rows.numel() if f.compact else not idle or bool(way.on.any())):
            break
        f.rows = way.rows if f.compact else None
        here, left = way.t, way.goal - way.t
        lands = left / way.h <= 1 + 1e-12
        tried = torch.where(lands, left, way.h)
        if idle:
            tried = torch.where(way.on, tried, 0.0)
        step = method.step(f, here, tried, state)
        assert step.error is not None
        error = _norms(step.error.detach(), state[0].detach(), step.state[0].detach(), control)
        good = error <= 1 if not idle else (error <= 1) & way.on
        after = torch.where(lands, way.goal, here + tried)
        # Every sample moves, in most steps: then nothing has to be masked.
        easy = bool(good.all())
        moves = tried
        if not easy:
            moves = torch.where(good, tried, 0.0)
            after = torch.where(good, after, here)
            if torch.is_grad_enabled() and bool((way.on & ~torch.isfinite(error)).any()):
                # A rejected sample that overflowed would turn the others' gradients into NaN.
                step = method.step(f, here, moves, state)
        _next_steps(way, method, tried, lands, error, None if easy else good)
        outputs = ()
        if easy or bool(good.any()):
            arrived = ((after - way.due) * way.sign >= 0) & good
            if bool(arrived.any()):
                outputs = _crossed(columns, way.sign, here, after, moves, good)
            new, gap, kept, part = step.state, method.gap(step.state), None, None
            if gap is not None:
                way.since = way.since + good
                apart = _norms(gap.detach(), state[0].detach(), new[0].detach(), control)
                part = good & (apart > way.since)
                new, kept = closed_of(method, part, new, state)
                way.since = torch.where(part, 0, way.since)
            rows = way.rows if f.compact else None
            passage = Passage(here, moves, outputs, rows, good, kept, part)
            if control.record:
                run.passages.append(passage)
            for (index, _, inside), value in zip(outputs, outputs_of(step, passage), strict=True):
                run.outputs[index] = put(run.outputs[index], passage.rows, inside, value)
            if on_step is not None:
                on_step(passage, step)
            state = new if easy else chosen(good, new, state)
            way.t, way.steps = after, way.steps + good
            for _, _, inside in outputs:
                way.k = way.k + inside
            if outputs:
                way.due = columns.gather(0, way.k.clamp(max=count - 1)[None])[0]
                way.goal = way.goal if method.has_dense else way.due
        if not easy or outputs:
            ended = way.on & ((way.k >= count) | ~good & (here + way.h == here))
            if bool(ended.any()):
                end(ended, STUCK, attempt)
    if bool(way.on.any()):
        end(way.on, MAX_STEPS, control.max_steps)
    if not f.compact:
        run.state = state
    run.outputs = [unreached(y, run, times[i], sign) for i, y in enumerate(run.outputs)]
    return run


def _crossed(
    times: Tensor, sign: Tensor, here: Tensor, after: Tensor, h: Tensor, good: Tensor
) -> tuple[tuple[int, Tensor, Tensor], ...]:
    """The outputs in a step as (index, θ, which samples)."""
    crossed = ((times - here) * sign > 0) & ((times - after) * sign <= 0) & good
    outputs = []
    for index in crossed.any(1).nonzero()[:, 0].tolist():
        inside, time = crossed[index], times[index]
        theta = torch.where(inside & (time != after), (time - here) / h, 1.0)
        outputs.append((index, theta, inside))
    return tuple(outputs)


def _norms(error: Tensor, y: Tensor, y1: Tensor, control: Control) -> Tensor:
    """Each sample's root mean square of error / (atol + rtol max(|y|, |y1|)), in float64."""
    scale = torch.maximum(y.abs(), y1.abs()).mul_(control.rtol).add_(control.atol)
    size = torch.linalg.vector_norm((error / scale).flatten(1), dim=1).double()
    return size if error[0].numel() <= 1 else size / math.sqrt(error[0].numel())


def _next_steps(
    way: _Way, method: Method, tried: Tensor, lands: Tensor, error: Tensor, good: Tensor | None
) -> None:
    """The controller of `march.growth` for each sample; `good` is None where all moved."""
    q = method.error_order + 1
    if good is not None:
        error = torch.nan_to_num(error, nan=math.inf, posinf=math.inf)
    size = error.clamp(min=1e-10).log_()
    factor = torch.add(way.memory, size, alpha=-1 / q).exp_()
    memory = size.clamp_(min=math.log(1e-4)).mul_(SMOOTHING / q).add_(math.log(SAFETY))
    grown = (tried / way.before).pow_(FORESIGHT).mul_(factor).clamp_(0.2, 10.0)
    if good is not None:
        grown = torch.where(good, grown, factor.clamp(0.2, 0.9))
    h, before = tried * grown, tried
    if not method.has_dense:
        # A step shortened to land says nothing about the step size that the error allows.
        short = lands & (tried.abs() < way.h.abs())
        if good is not None:
            short = short & good
        h = torch.where(short & (h.abs() < way.h.abs()), way.h, h)
        good = ~short if good is None else good & ~short
    if good is not None:
        memory = torch.where(good, memory, way.memory)
        before = torch.where(good, before, way.before)
    way.h, way.memory, way.before = h, memory, before


@torch.no_grad()
def _first_steps(
    method: Method,
    f: Field,
    t: Tensor,
    y: Tensor,
    state: State,
    span: Tensor,
    control: Control,
) -> Tensor:
    """Hairer's starting step of each sample (`march.first_step`)."""
    y = y.detach()
    f0 = state[-1].detach() if len(state) > 1 and method.carries_slope else f(t, y)
    zero = torch.zeros_like(y)
    size, slope = (_norms(v, y, zero, control) for v in (y, f0))
    h0 = torch.where(torch.minimum(size, slope) < 1e-5, 1e-6, 0.01 * size / slope)
    h0 = torch.minimum(h0, span.abs())
    sign = torch.sign(span)
    f1 = f(t + sign * h0, y + f.weight(sign * h0, y) * f0)
    worst = torch.maximum(slope, _norms(f1 - f0, y, zero, control) / h0)
    order = method.error_order + 1
    h1 = torch.where(worst > 1e-15, (0.01 / worst) ** (1 / order), (h0 * 1e-3).clamp(min=1e-6))
    h = torch.minimum(torch.minimum(100 * h0, h1), span.abs())
    return torch.where(torch.isfinite(h), h, 1e-6 * span.abs())
