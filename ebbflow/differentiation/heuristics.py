"""What a solver knows of its own trouble, as something to train against: error and stiffness."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ebbflow.differentiation.fields import Field, Structure
from ebbflow.differentiation.march import STATUS, Control, Passage, error_norm, first_step, march
from ebbflow.differentiation.methods import RungeKutta, Step, dopri5, tsit5
from ebbflow.differentiation.ode import Gradient, odeint
from ebbflow.differentiation.times import output_times

PAIRS = {"dopri5": dopri5, "tsit5": tsit5}


@dataclass(frozen=True)
class Heuristics:
    """A solution with its cost, to be added to a loss.

    `ys` (len(t), *y0.shape); `error` is `Σ_j E_j |h_j|` and `stiffness` `max_j S_j / ρ` over the
    accepted steps (or of one step), scalars with gradients; `evaluations` of f; `times`,
    where steps began.
    """

    ys: Any
    error: Tensor
    stiffness: Tensor
    evaluations: int
    times: list[float]


def regularized_odeint(
    f: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str = "tsit5",
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = 10_000,
) -> Heuristics:
    """Solve like `odeint` and sum up the solver's own estimates over its accepted steps (global).

    `E_j = rms(h Σ_i (b_i - b̂_i) k_i / (atol + rtol max(|y_j|, |y_{j+1}|)))` and
    `S_j = |k_7 - k_6| / |y_7 - y_6|`, of the two last stages, which are at one time: an estimate of
    the largest eigenvalue; ρ is how far the stability region reaches. Gradients go through stages
    and states, not through the choice of steps; everything is recorded. Step control keeps each E
    near a half whatever the tolerance, so weights need little change with it.
    Raises ArithmeticError where the solve ends early.
    Paper: Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal
    Solver Heuristics (Pal et al. 2021), equations 8 to 11.
    """
    pair = _pair(method)
    structure = Structure(y0, 0)
    packed = structure.pack(y0)
    times = output_times(t, packed, 0)
    assert isinstance(times, list)
    field, control = Field(f, structure), Control(rtol, atol, max_steps)
    errors: list[Tensor] = []
    stiffness: list[Tensor] = []
    begun: list[float] = []

    def look(passage: Passage, step: Step) -> None:
        assert isinstance(passage.h, float) and isinstance(passage.t, float)
        error, stiff = _of_step(pair, step, control)
        errors.append(error * abs(passage.h))
        stiffness.append(stiff)
        begun.append(passage.t)

    run = march(pair, field, times, packed, control, look)
    assert isinstance(run.status, int)
    _finished(STATUS[run.status], float(run.end))
    ys = structure.unpack(torch.stack(run.outputs))
    return Heuristics(
        ys, torch.stack(errors).sum(), torch.stack(stiffness).amax(), field.calls, begun
    )


def locally_regularized_odeint(
    f: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    at: float,
    method: str = "tsit5",
    rtol: float = 1e-6,
    atol: float = 1e-9,
    gradient: Gradient = "direct",
    max_steps: int = 10_000,
    parameters: Sequence[Tensor] | None = None,
) -> Heuristics:
    """Solve by `odeint` with any gradient, and add the estimates of one step from the time `at`.

    The step is `local_heuristics`' from y(at), as long as the one that the solve took there.
    `error` is E times the length of the span: for `at` drawn uniformly within the span its mean is
    near the global sum, so that both take weights of one size; for `at` drawn from an earlier
    solve's `times` it leans towards short steps. `evaluations` leave out the added step's.
    Raises ValueError for `at` outside the span, ArithmeticError where the solve ends early.
    Paper: Locally Regularized Neural Differential Equations: Some Black Boxes Were Meant to Remain
    Closed! (Pal et al. 2023), algorithm 1.
    """
    _pair(method)
    structure = Structure(y0, 0)
    times = output_times(t, structure.pack(y0), 0)
    assert isinstance(times, list)
    sign = 1.0 if times[-1] > times[0] else -1.0
    if not 0 < (at - times[0]) * sign < (times[-1] - times[0]) * sign:
        raise ValueError(f"at must lie inside the span {times[0]} to {times[-1]}, got {at}")
    place = bisect_left(times, at * sign, key=lambda s: s * sign)
    added = times[place] != at
    grid = [*times[:place], at, *times[place:]] if added else times
    run = odeint(
        f,
        y0,
        grid,
        method=method,
        rtol=rtol,
        atol=atol,
        gradient=gradient,
        max_steps=max_steps,
        parameters=parameters,
        full=True,
    )
    _finished(run.status, run.t)
    sizes = run.step_sizes.tolist()
    begun = list(accumulate(sizes[:-1], initial=times[0]))
    inside = bisect_right(begun, at * sign, key=lambda s: s * sign) - 1
    # The last step was shortened to land: the one before says more.
    last = inside > 0 and inside == len(sizes) - 1
    size = max(abs(h) for h in sizes[inside - last : inside + 1])
    state = tree_map(lambda y: y[place], run.ys)
    error, stiffness = local_heuristics(
        f, at, state, times[-1], method=method, rtol=rtol, atol=atol, step_size=size
    )
    used = min(size, abs(times[-1] - at))
    kept = [k for k in range(len(grid)) if not added or k != place]
    ys = tree_map(lambda y: y[kept], run.ys) if added else run.ys
    error = error * (abs(times[-1] - times[0]) / used)
    return Heuristics(ys, error, stiffness, run.evaluations, begun)


def local_heuristics(
    f: Callable[..., Any],
    t: float,
    y: Any,
    end: float,
    *,
    method: str = "tsit5",
    rtol: float = 1e-6,
    atol: float = 1e-9,
    step_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`(E h, S / ρ)` of one step from (t, y) towards `end`, scalars with gradients (local).

    y is taken as a constant, so that this costs one step whatever the gradient of the solve it is
    added to. h is `step_size`, such as the step that a solve took there
    (`odeint(..., full=True).step_sizes`), or the solver's own cautious starting step, whose E is
    far smaller; it stops at `end`. Draw t uniformly from the span (unbiased: then E is the global
    sum over the span in expectation), or from the times at which steps of a solve began (biased
    towards where they are short).
    Paper: Locally Regularized Neural Differential Equations: Some Black Boxes Were Meant to Remain
    Closed! (Pal et al. 2023), algorithm 1.
    """
    pair = _pair(method)
    structure = Structure(y, 0)
    packed = structure.pack(y).detach()
    if not t != end:
        raise ValueError(f"t must differ from end, got {t} and {end}")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"step_size must be positive, towards end, got {step_size}")
    field, control = Field(f, structure), Control(rtol, atol)
    state = pair.start(field, t, packed)
    h = step_size or first_step(pair, field, t, packed, state, end - t, control)
    h = min(h, abs(end - t)) * (1 if end > t else -1)
    error, stiff = _of_step(pair, pair.step(field, t, h, state), control)
    return error * abs(h), stiff


def _finished(status: Any, end: Any) -> None:
    if status != "done":
        raise ArithmeticError(
            f"the solve ended at t = {float(end):.6g} ({status}), so its estimates say nothing: "
            "loosen the tolerances, raise max_steps, or train with a smaller weight of the "
            "estimates, a smaller learning rate or clipped gradients"
        )


def _pair(method: str) -> RungeKutta:
    if method not in PAIRS:
        raise ValueError(f"method must be one of {', '.join(PAIRS)}, got {method!r}")
    return PAIRS[method]


def _of_step(pair: RungeKutta, step: Step, control: Control) -> tuple[Tensor, Tensor]:
    """(E, S / ρ) of one step."""
    assert step.error is not None
    error = error_norm(step.error, step.nodes[0][1], step.state[0], control)
    across = torch.linalg.vector_norm(step.nodes[-1][1] - step.nodes[-2][1])
    rise = torch.linalg.vector_norm(step.slopes[-1] - step.slopes[-2])
    # Equal states, as at a point of rest, say nothing of the eigenvalues.
    still = across == 0
    ratio = torch.where(still, 0.0, rise / torch.where(still, 1.0, across))
    return error, ratio / pair.tableau.dissipative_size
