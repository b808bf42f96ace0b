"""What a solver knows of its own trouble, as something to train against: error and stiffness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation.fields import Field, Structure
from ebbflow.differentiation.march import Control, Passage, error_norm, first_step, march
from ebbflow.differentiation.methods import RungeKutta, Step, dopri5, tsit5
from ebbflow.differentiation.times import output_times

PAIRS = {"dopri5": dopri5, "tsit5": tsit5}


@dataclass(frozen=True)
class Heuristics:
    """A solution with its cost, to be added to a loss.

    `ys` (len(t), *y0.shape); `error` is `Σ_j E_j |h_j|` and `stiffness` `max_j S_j / ρ` over the
    accepted steps, scalars with gradients; `evaluations` of f; `times`, where steps began.
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
    and states, not through the choice of steps; everything is recorded. E scales as 1/tolerance.
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
    ys = structure.unpack(torch.stack(run.outputs))
    return Heuristics(
        ys, torch.stack(errors).sum(), torch.stack(stiffness).amax(), field.calls, begun
    )


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
