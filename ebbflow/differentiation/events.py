"""`odeint_event`: solve until a function of the solution changes its sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation.fields import Field, Structure
from ebbflow.differentiation.march import Control, Passage, march
from ebbflow.differentiation.methods import Method, State, Step
from ebbflow.differentiation.ode import Gradient, odeint, resolve
from ebbflow.differentiation.times import output_times, step_ends


@dataclass(frozen=True)
class Event:
    """What `odeint_event` returns.

    `happened`, and then `t`, a scalar tensor in y's precision, and `y`, the state there; without an
    event they are of the last time. `ys` are the states at the requested times, `y` beyond `t`.
    """

    happened: bool
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
    steps: int | None = None,
    step_size: float | None = None,
    max_steps: int = 10_000,
    parameters: Sequence[Tensor] | None = None,
    checkpoints: int | None = None,
) -> Event:
    """Solve `dy/dt = f(t, y)` until `event(t, y)`, one real number, changes its sign.

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
    structure = Structure(y0, 0)
    packed = structure.pack(y0)
    times = output_times(t, packed, 0)
    assert isinstance(times, list)
    grid = step_ends(times, steps, step_size)
    if steps is None and step_size is None and chosen.error_order:
        grid = None
    field = Field(f, structure)

    def value(t: float | Tensor, y: Tensor) -> Tensor:
        time = t if isinstance(t, Tensor) else torch.tensor(t, dtype=field.real, device=y.device)
        out = event(time, structure.unpack(y))
        if not isinstance(out, Tensor) or out.numel() != 1 or out.is_complex():
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"event(t, y) must return one real number as a tensor, got {what}")
        return out.reshape(())

    stop = _first_change(
        chosen, field, times, packed.detach(), Control(rtol, atol, max_steps, None, grid), value
    )
    forwards = times[-1] > times[0]
    given = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    kept = len(times)
    if stop is not None:
        kept = sum((s < stop) == forwards and s != stop for s in times)
        given = torch.cat([given[:kept].double(), given.new_tensor([stop], dtype=torch.float64)])
    ys = odeint(
        f,
        y0,
        given,
        method=method,
        rtol=rtol,
        atol=atol,
        gradient=gradient,
        steps=steps,
        step_size=step_size,
        max_steps=max_steps,
        parameters=parameters,
        checkpoints=checkpoints,
    )
    ends = structure.pack(ys)
    if stop is None:
        last = torch.tensor(times[-1], dtype=field.real, device=packed.device)
        return Event(False, last, structure.unpack(ends[-1]), ys)
    at, y = _corrected(stop, ends[-1], field, value)
    held = torch.stack([*ends[:-1], *[y] * (len(times) - kept)])
    return Event(True, at, structure.unpack(y), structure.unpack(held))


def _corrected(
    stop: float, y: Tensor, f: Field, value: Callable[[float | Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One step of Newton's method on the time, which carries the implicit function's derivative."""
    with torch.no_grad():
        slope = f(stop, y.detach())
    with torch.enable_grad():
        time = torch.tensor(stop, dtype=f.real, device=y.device, requires_grad=True)
        state = y.detach().requires_grad_()
        found = torch.autograd.grad(value(time, state), [time, state], allow_unused=True)
    rate = sum(
        float((part.conj() * by).real.sum())
        for part, by in zip(found, (torch.ones_like(time), slope), strict=True)
        if part is not None
    )
    if rate == 0:
        raise ValueError(f"the event is tangent to zero at t = {stop:g}: its time is not unique")
    at = stop - value(stop, y) / rate
    return at, y + slope * (at - stop)


class _Found(Exception):
    """Ends a march at an event."""

    def __init__(self, t: float) -> None:
        super().__init__(t)
        self.t = t


@torch.no_grad()
def _first_change(
    method: Method,
    f: Field,
    times: list[float],
    y0: Tensor,
    control: Control,
    value: Callable[[float | Tensor, Tensor], Tensor],
) -> float | None:
    """The time of the first change of sign, or None."""
    state: State = method.start(f, times[0], y0)
    before = float(value(times[0], y0))

    def look(passage: Passage, step: Step) -> None:
        nonlocal state, before
        t, h = passage.t, passage.h
        assert isinstance(t, float) and isinstance(h, float)
        after = float(value(t + h, step.state[0]))
        if before * after < 0 or (after == 0 and before != 0):
            start, low, high = state, before, after

            def inside(theta: float) -> float:
                return float(value(t + theta * h, method.step(f, t, theta * h, start).state[0]))

            raise _Found(t + h * _root(inside, low, high))
        state, before = step.state, after

    try:
        march(method, f, times, y0, control, look)
    except _Found as found:
        return found.t
    return None


def _root(g: Callable[[float], float], low: float, high: float) -> float:
    """The zero of g in [0, 1], given its values there: false position, halved (Illinois)."""
    a, b, side, scale = 0.0, 1.0, 0, max(abs(low), abs(high))
    for _ in range(60):
        if high == 0 or b - a < 1e-13:
            return b
        middle = min(max((a * high - b * low) / (high - low), a), b)
        if not a < middle < b:
            middle = (a + b) / 2
        here = g(middle)
        if abs(here) < 1e-14 * scale:
            return middle
        if here * high > 0:
            b, high = middle, here
            low = low / 2 if side == 1 else low
            side = 1
        else:
            a, low = middle, here
            high = high / 2 if side == -1 else high
            side = -1
    return b
