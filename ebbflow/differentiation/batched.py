"""Stepping a batch in which every sample has its own time, step size and end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebbflow.differentiation.fields import Field
from ebbflow.differentiation.march import (
    DONE,
    MAX_STEPS,
    STUCK,
    Control,
    March,
    OnStep,
    Passage,
)
from ebbflow.differentiation.methods import Method, State, Step


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
    count, batch = times.shape
    device = times.device
    every = torch.arange(batch, device=device)
    sign = torch.sign(times[-1] - times[0])
    t = times[0].clone()
    f.rows, calls = (every if f.compact else None), f.calls
    run = March([y0] * count, method.start(f, t, y0))
    run.status = torch.full((batch,), MAX_STEPS, device=device)
    run.steps, run.rejected = torch.zeros_like(every), torch.zeros_like(every)
    if control.grid is None:
        h = _first_steps(method, f, t, y0, run.state, times[-1] - t, control)
    else:
        h = torch.zeros_like(t)
    previous = torch.ones_like(t)
    k = torch.ones_like(every)
    alive = sign != 0
    run.status = torch.where(alive, run.status, DONE)
    grid = None if control.grid is None else torch.tensor(control.grid, device=device)
    limit = control.max_steps if grid is None else grid.shape[0] - 1
    evaluations = torch.full_like(every, f.calls - calls)
    for number in range(limit):
        rows = alive.nonzero()[:, 0] if f.compact else every
        if rows.numel() == 0 or not (f.compact or bool(alive.any())):
            break
        on = alive[rows]
        f.rows = rows if f.compact else None
        calls = f.calls
        here = t[rows]
        if grid is not None:
            # Fractions of each sample's interval between consecutive outputs.
            target = _grid_point(times, grid[number + 1])[rows]
            full = torch.ones_like(on)
        else:
            target = times[-1][rows] if method.has_dense else times.gather(0, k[None])[0][rows]
            full = h[rows] >= (target - here).abs() * (1 - 1e-12)
            target = torch.where(full, target, here + sign[rows] * h[rows])
        step_h = torch.where(on, target - here, 0.0)
        state = _take(run.state, rows if f.compact else None)
        step = method.step(f, here, step_h, state)
        if grid is None:
            assert step.error is not None
            error = _norms(step.error.detach(), state[0].detach(), step.state[0].detach(), control)
            good = on & (error <= 1)
            if torch.is_grad_enabled() and bool((on & ~torch.isfinite(error)).any()):
                # A rejected sample that overflowed would turn the others' gradients into NaN.
                step = method.step(f, here, torch.where(good, step_h, 0.0), state)
        else:
            error, good = torch.ones_like(step_h), on
        evaluations += (f.calls - calls) * alive
        if bool(good.any()):
            after = torch.where(good, target, here)
            outputs = []
            crossed = (times[:, rows] - here) * sign[rows] > 0
            crossed &= (times[:, rows] - after) * sign[rows] <= 0
            crossed &= good
            for index in crossed.any(1).nonzero()[:, 0].tolist():
                inside = crossed[index]
                theta = torch.where(
                    times[index, rows] == after, 1.0, (times[index, rows] - here) / step_h
                )
                outputs.append((index, torch.where(inside, theta, 1.0), inside))
            passage = Passage(
                here,
                torch.where(good, step_h, 0.0),
                tuple(outputs),
                rows if f.compact else None,
                good,
            )
            run.passages.append(passage)
            for (index, _, inside), value in zip(outputs, _outputs(step, passage), strict=True):
                run.outputs[index] = _put(run.outputs[index], passage.rows, inside, value)
            run.state = _moved(run.state, step.state, passage)
            if on_step is not None:
                on_step(passage, step)
            t = t.index_copy(0, rows, after)
            k = k.index_add(0, rows, crossed.sum(0))
            run.steps = run.steps.index_add(0, rows, good.long())
        run.rejected = run.rejected.index_add(0, rows, (on & ~good).long())
        done = k >= count
        run.status = torch.where(done, DONE, run.status)
        k = k.clamp(max=count - 1)
        alive = alive & ~done
        if grid is None:
            h, previous, stuck = _next_steps(
                method, rows, h, previous, step_h, error, good, full, here
            )
            run.status = torch.where(stuck & alive, STUCK, run.status)
            alive = alive & ~stuck
    run.end, run.evaluations = t, evaluations
    run.outputs = [_unreached(y, run, times[i], sign) for i, y in enumerate(run.outputs)]
    return run


def _grid_point(times: Tensor, place: Tensor) -> Tensor:
    """The time of each sample at a place of the grid: output k plus a fraction of its interval."""
    k = int(min(math.floor(float(place)), times.shape[0] - 1))
    fraction = float(place) - k
    if fraction == 0:
        return times[k]
    return times[k] + fraction * (times[k + 1] - times[k])


def advance_each(
    method: Method, f: Field, passage: Passage, state: State
) -> tuple[State, list[Tensor]]:
    """Replay an accepted step of a batch; outputs are zero where they are not a sample's."""
    assert isinstance(passage.h, Tensor) and passage.moved is not None
    f.rows = passage.rows
    step = method.step(f, passage.t, passage.h, _take(state, passage.rows))
    outputs = []
    for (_, _, inside), value in zip(passage.outputs, _outputs(step, passage), strict=True):
        assert inside is not None
        outputs.append(_put(torch.zeros_like(state[0]), passage.rows, inside, value))
    return _moved(state, step.state, passage), outputs


def undo_each(method: Method, f: Field, passage: Passage, state: State) -> State:
    """The state before an accepted step of a batch."""
    f.rows = passage.rows
    before = method.undo(f, passage.t, passage.h, _take(state, passage.rows))
    return _moved(state, before, passage)


def _take(state: State, rows: Tensor | None) -> State:
    return state if rows is None else tuple(part[rows] for part in state)


def _moved(old: State, new: State, passage: Passage) -> State:
    assert passage.moved is not None
    return tuple(_put(a, passage.rows, passage.moved, b) for a, b in zip(old, new, strict=True))


def _put(old: Tensor, rows: Tensor | None, mask: Tensor, new: Tensor) -> Tensor:
    """`old` with the masked rows of `new` (which are `rows` of the batch) in their places."""
    mask = mask.reshape(-1, *(1,) * (new.ndim - 1))
    if rows is None:
        return torch.where(mask, new, old)
    return old.index_copy(0, rows, torch.where(mask, new, old[rows]))


def _outputs(step: Step, passage: Passage) -> list[Tensor]:
    out = []
    for _, theta, _ in passage.outputs:
        if step.dense is None or bool((torch.as_tensor(theta) == 1.0).all()):
            out.append(step.state[0])
        else:
            out.append(step.dense(theta))
    return out


def _unreached(y: Tensor, run: March, time: Tensor, sign: Tensor) -> Tensor:
    """Outputs beyond the end of a sample that did not arrive are its last state."""
    assert isinstance(run.end, Tensor)
    beyond = (time - run.end) * sign > 0
    if not bool(beyond.any()):
        return y
    return torch.where(beyond.reshape(-1, *(1,) * (y.ndim - 1)), run.state[0], y)


def _norms(error: Tensor, y: Tensor, y1: Tensor, control: Control) -> Tensor:
    """Each sample's root mean square of error / (atol + rtol max(|y|, |y1|)), in float64."""
    scale = torch.maximum(y.abs(), y1.abs()) * control.rtol + control.atol
    size = torch.linalg.vector_norm((error / scale).reshape(error.shape[0], -1), dim=1)
    return size.double() / math.sqrt(max(error[0].numel(), 1))


def _next_steps(
    method: Method,
    rows: Tensor,
    h: Tensor,
    previous: Tensor,
    step_h: Tensor,
    error: Tensor,
    good: Tensor,
    full: Tensor,
    here: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The controller of `march.growth` for each sample; also which samples can step no further."""
    q = method.error_order + 1
    finite = torch.isfinite(error)
    size = torch.where(finite, error, 1.0).clamp(min=1e-10)
    factor = (0.9 * size ** (-0.85 / q) * previous[rows] ** (0.2 / q)).clamp(0.2, 10.0)
    factor = torch.where(good, factor, torch.where(finite, factor.clamp(max=0.9), 0.1))
    new = step_h.abs() * factor
    new = torch.where(good & full, torch.maximum(new, h[rows]), new)
    stuck = torch.zeros_like(h, dtype=torch.bool)
    stuck[rows] = ~good & (step_h != 0) & (here + new == here)
    h = h.index_copy(0, rows, torch.where(step_h == 0, h[rows], new))
    memory = torch.where(good, size.clamp(min=1e-4), previous[rows])
    return h, previous.index_copy(0, rows, memory), stuck


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
