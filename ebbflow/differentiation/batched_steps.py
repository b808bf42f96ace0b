"""Single steps of a batch in which every sample has its own time: fixed, replayed and undone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebbflow.differentiation.fields import Field
from ebbflow.differentiation.march import CLOSE, DONE, Control, March, OnStep, Passage, detached
from ebbflow.differentiation.methods import Method, State, Step


def march_grid_each(
    method: Method,
    f: Field,
    times: Tensor,
    y0: Tensor,
    control: Control,
    on_step: OnStep | None,
) -> March:
    """Fixed steps, at the same fraction of each sample's interval between consecutive outputs."""
    count, batch = times.shape
    every = torch.arange(batch, device=times.device)
    f.rows, calls = (every if f.compact else None), f.calls
    run = March([y0] * count, method.start(f, times[0], y0), end=times[-1])
    # Where all samples have the same times, one number a step is kept, whatever the batch.
    grid = control.grid or (0.0,)
    columns = times if times.stride(1) else times[:, :1]
    moved = torch.ones(1, dtype=torch.bool, device=times.device).expand(batch)
    t = _grid_point(columns, grid[0])
    for place in grid[1:]:
        s = _grid_point(columns, place)
        here, h = t.expand(batch), (s - t).expand(batch)
        step = method.step(f, here, h, run.state)
        outputs = ((int(place), 1.0, moved),) if place == int(place) else ()
        for index, _, _ in outputs:
            run.outputs[index] = step.state[0]
        new, gap, kept, part = step.state, method.gap(step.state), None, None
        if gap is not None:
            y = new[0].detach().flatten(1)
            part = gap.detach().flatten(1).norm(dim=1) > CLOSE * y.norm(dim=1)
            new, kept = closed_of(method, part, new, run.state)
        passage = Passage(here, h, outputs, f.rows, moved, kept, part)
        if control.record:
            run.passages.append(passage)
        if on_step is not None:
            on_step(passage, step)
        run.state, t = new, s
    run.status, run.rejected = torch.full_like(every, DONE), torch.zeros_like(every)
    run.steps = torch.full_like(every, len(grid) - 1)
    run.evaluations = torch.full_like(every, f.calls - calls)
    return run


def _grid_point(times: Tensor, place: float) -> Tensor:
    """The time of each sample at a place of the grid: output k plus a fraction of its interval."""
    k = min(math.floor(place), times.shape[0] - 1)
    fraction = place - k
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
    for (_, _, inside), value in zip(passage.outputs, outputs_of(step, passage), strict=True):
        assert inside is not None
        outputs.append(put(torch.zeros_like(state[0]), passage.rows, inside, value))
    new = step.state
    if passage.before is not None and passage.closed is not None:
        new = chosen(passage.closed, method.closed(new), new)
    return _moved(state, new, passage), outputs


def undo_each(method: Method, f: Field, passage: Passage, state: State) -> State:
    """The state before an accepted step of a batch."""
    f.rows = passage.rows
    before = method.undo(f, passage.t, passage.h, _take(state, passage.rows))
    if passage.before is not None and passage.closed is not None:
        rows = passage.closed.nonzero()[:, 0]
        pairs = zip(before, passage.before, strict=True)
        before = tuple(part.index_copy(0, rows, kept) for part, kept in pairs)
    return _moved(state, before, passage)


def closed_of(method: Method, which: Tensor, new: State, old: State) -> tuple[State, State | None]:
    """`new` with the gap of these samples closed, and what they were before, if there are any."""
    if not bool(which.any()):
        return new, None
    return chosen(which, method.closed(new), new), tuple(x[which] for x in detached(old))


def _take(state: State, rows: Tensor | None) -> State:
    return state if rows is None else tuple(part[rows] for part in state)


def _moved(old: State, new: State, passage: Passage) -> State:
    assert passage.moved is not None
    return tuple(put(a, passage.rows, passage.moved, b) for a, b in zip(old, new, strict=True))


def chosen(mask: Tensor, new: State, old: State) -> State:
    """The masked rows of `new`, the others of `old`."""
    shaped = (mask.reshape(-1, *(1,) * (part.ndim - 1)) for part in new)
    return tuple(torch.where(m, a, b) for m, a, b in zip(shaped, new, old, strict=True))


def put(old: Tensor, rows: Tensor | None, mask: Tensor, new: Tensor) -> Tensor:
    """`old` with the masked rows of `new` (which are `rows` of the batch) in their places."""
    mask = mask.reshape(-1, *(1,) * (new.ndim - 1))
    if rows is None:
        return torch.where(mask, new, old)
    return old.index_copy(0, rows, torch.where(mask, new, old[rows]))


def outputs_of(step: Step, passage: Passage) -> list[Tensor]:
    out = []
    for _, theta, _ in passage.outputs:
        if step.dense is None or bool((torch.as_tensor(theta) == 1.0).all()):
            out.append(step.state[0])
        else:
            out.append(step.dense(theta))
    return out


def unreached(y: Tensor, run: March, time: Tensor, sign: Tensor) -> Tensor:
    """Outputs beyond the end of a sample that did not arrive are its last state."""
    assert isinstance(run.end, Tensor)
    beyond = (time - run.end) * sign > 0
    if not bool(beyond.any()):
        return y
    return torch.where(beyond.reshape(-1, *(1,) * (y.ndim - 1)), run.state[0], y)
