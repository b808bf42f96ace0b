"""`odeint_event`: solve until a function of the solution changes its sign."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation.batched_steps import chosen
from ebbflow.differentiation.fields import Field, Structure, Time
from ebbflow.differentiation.march import Control, Passage, march
from ebbflow.differentiation.methods import Method, State, Step
from ebbflow.differentiation.ode import Gradient, odeint, resolve
from ebbflow.differentiation.times import output_times, step_ends


@dataclass(frozen=True)
class Event:
    """What `odeint_event` returns.

    `happened`, and then `t`, a scalar tensor in y's precision, and `y`, the state there; without an
    event they are of the last time. `ys` are the states at the requested times, `y` beyond `t`.
    With a batch axis `happened` and `t` are tensors (B,).
    """

    happened: bool | Tensor
    t: Tensor
    y: Any
    ys: Any


def odeint_event(
    f: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    event: Callable[[Tensor, Any], Tensor],
    *,
    method: str | Method = "dopri5",
    rtol: float = 1e-6,
    atol: float = 1e-9,
    gradient: Gradient = "direct",
    batch_dims: int = 0,
    steps: int | None = None,
    step_size: float | None = None,
    max_steps: int = 10_000,
    parameters: Sequence[Tensor] | None = None,
    checkpoints: int | None = None,
) -> Event:
    """Solve `dy/dt = f(t, y)` until `event(t, y)`, one real number, changes its sign.

    With `batch_dims=1` each sample has its own event: t has the shape (B, 1, …) and the event
    returns (B,).

    The first change of sign between the ends of two accepted steps is narrowed down by shorter
    steps of the same method; two in one step are not seen. A zero at t[0] does not count. The
    solution that is returned is a second solve that ends there, so that every `gradient` of
    `odeint` holds. With g = event, time and state have the implicit function's derivatives, once,
    `dt* = -δg / (∂g/∂t + ∂g/∂y · f)` and `dy* = δy + f dt*`, where δ is at fixed time.

    Raises ValueError for an event that is no real number, and where g is tangent to zero, so that
    its time has no derivative. Paper: Learning Neural Event Functions for Ordinary Differential
    Equations (Chen, Amos, Nickel 2021), section 3.
    """
    chosen = resolve(method, gradient)
    structure = Structure(y0, batch_dims)
    packed = structure.pack(y0)
    times = output_times(t, packed, batch_dims)
    grid = step_ends(times, steps, step_size)
    if steps is None and step_size is None and chosen.error_order:
        grid = None
    field = Field(f, structure)

    def value(t: Time, y: Tensor) -> Tensor:
        out = event(field.time(t), structure.unpack(y))
        count = packed.shape[:batch_dims].numel()
        if not isinstance(out, Tensor) or out.numel() != count or out.is_complex():
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"event(t, y) must return one real number{' a sample' * batch_dims} as a tensor, "
                f"got {what}"
            )
        return out.reshape(packed.shape[:batch_dims])

    control = Control(rtol, atol, max_steps, None, grid, record=False)
    stop = _first_change(chosen, field, times, packed.detach(), control, value)
    given = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    given, kept = _stopped(given.double(), times, stop)
    ys = odeint(
        f,
        y0,
        given,
        method=method,
        rtol=rtol,
        atol=atol,
        gradient=gradient,
        batch_dims=batch_dims,
        steps=steps,
        step_size=step_size,
        max_steps=max_steps,
        parameters=parameters,
        checkpoints=checkpoints,
    )
    ends = structure.pack(ys)
    happened = ~torch.isnan(stop)
    last = times[-1] if isinstance(times, Tensor) else torch.tensor(times[-1])
    where = torch.where(happened, stop, last.double().to(stop.device))
    at, y = _corrected(where, happened, ends[-1], field, value)
    shape = (*happened.shape, *(1,) * (packed.ndim - batch_dims))
    rows = [
        torch.where((kept > k).reshape(shape), ends[min(k, len(ends) - 1)], y)
        for k in range(len(times))
    ]
    answer = happened if batch_dims else bool(happened)
    return Event(answer, at, structure.unpack(y), structure.unpack(torch.stack(rows)))


def _stopped(given: Tensor, times: list[float] | Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Times that end at the event or with the last one, and how many of them are the given ones.

    Where a sample needs fewer than others, the rest divide its last interval.
    """
    fixed = torch.as_tensor(times, dtype=torch.float64, device=given.device)
    if fixed.ndim > given.ndim:
        given = given[:, None].expand_as(fixed)
    forwards = torch.sign(fixed[-1] - fixed[0])
    happened = ~torch.isnan(stop)
    end = torch.where(happened, stop.to(given.device), fixed[-1])
    kept = ((end - fixed) * forwards > 0).sum(0)
    before = given.gather(0, (kept - 1)[None])[0].detach()
    end = torch.where(happened, end, given[-1])
    count = int(kept.max()) + 1
    rows = []
    for k in range(count):
        part = (k + 1 - kept) / (count - kept)
        rows.append(torch.where(kept > k, given[k], before + (end - before) * part))
    rows[-1] = end
    return torch.stack(rows), kept


def _corrected(
    stop: Tensor, happened: Tensor, y: Tensor, f: Field, value: Callable[[Time, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One step of Newton's method on the time, which carries the implicit function's derivative."""
    at = stop.to(f.real)
    if not bool(happened.any()):
        return at, y
    now: Time = stop if stop.ndim else float(stop)
    with torch.no_grad():
        slope = f(now, y.detach())
    with torch.enable_grad():
        time, state = at.clone().requires_grad_(), y.detach().requires_grad_()
        found = torch.autograd.grad(
            value(time, state).sum(), [time, state], allow_unused=True, materialize_grads=True
        )
    rate = found[0] + (found[1].conj() * slope).real.reshape(*stop.shape, -1).sum(-1)
    flat = happened & (rate == 0)
    if bool(flat.any()):
        raise ValueError(
            f"the event is tangent to zero at t = {float(stop[flat].min()):g}: its time is not "
            "unique"
        )
    late = torch.where(happened, -value(now, y) / torch.where(happened, rate, 1.0), 0.0)
    shaped = late.reshape(*late.shape, *(1,) * (y.ndim - late.ndim))
    return at + late, y + slope * shaped


class _Found(Exception):
    """Ends a march at the last event."""


@torch.no_grad()
def _first_change(
    method: Method,
    f: Field,
    times: list[float] | Tensor,
    y0: Tensor,
    control: Control,
    value: Callable[[Time, Tensor], Tensor],
) -> Tensor:
    """The time of each first change of sign in float64, NaN where there is none."""
    start = times[0]
    state: State = method.start(f, start, y0)
    before = value(start, y0).double()
    found = torch.full_like(before, torch.nan)

    def look(passage: Passage, step: Step) -> None:
        nonlocal state, before
        t, h = passage.t, passage.h
        after = value(t + h, step.state[0]).double()
        # No number comes before what is not a number: those samples have nothing to find.
        change = (before * after < 0) | (after == 0) & (before != 0)
        change &= torch.isnan(found)
        if passage.moved is not None:
            change &= passage.moved
        if bool(change.any()):
            start = state

            def inside(theta: Tensor) -> Tensor:
                part = theta * h if theta.ndim else float(theta) * h
                return value(t + part, method.step(f, t, part, start).state[0]).double()

            theta = _root(inside, before, torch.where(change, after, -before))
            found.copy_(torch.where(change, t + theta * h, found))
            if not bool(torch.isnan(found).any()):
                raise _Found
        if passage.moved is None:
            state, before = step.state, after
        else:
            state = chosen(passage.moved, step.state, state)
            before = torch.where(passage.moved, after, before)

    with contextlib.suppress(_Found):
        march(method, f, times, y0, control, look)
    return found


def _root(g: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The zeros of g in [0, 1], given its values there: false position, halved (Illinois)."""
    a, b, side = torch.zeros_like(low), torch.ones_like(low), torch.zeros_like(low)
    scale = torch.maximum(low.abs(), high.abs())
    answer, done = b, (high == 0)
    for _ in range(60):
        if bool(done.all()):
            break
        middle = torch.minimum(torch.maximum((a * high - b * low) / (high - low), a), b)
        middle = torch.where((a < middle) & (middle < b), middle, (a + b) / 2)
        middle = torch.where(done, answer, middle)
        here = g(middle)
        answer = middle
        done = done | (here.abs() < 1e-14 * scale) | (b - a < 1e-13) | torch.isnan(here)
        upper = here * high > 0
        low_ = torch.where(upper, torch.where(side == 1, low / 2, low), here)
        high_ = torch.where(upper, here, torch.where(side == -1, high / 2, high))
        a, b = torch.where(upper, a, middle), torch.where(upper, middle, b)
        side, low, high = torch.where(upper, 1.0, -1.0), low_, high_
    return answer
