"""`odeint`: ordinary differential equations on tensors and nested structures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ebbflow.differentiation import adjoint, gradients
from ebbflow.differentiation import parameters as owned
from ebbflow.differentiation.fields import Field, Structure
from ebbflow.differentiation.march import STATUS, Control, March, advance, march, undo
from ebbflow.differentiation.methods import METHODS, Coupled, DiagonallyImplicit, Method, State
from ebbflow.differentiation.times import output_times, step_ends

Gradient = Literal["direct", "checkpoint", "adjoint", "reversible"]
GRADIENTS = ("direct", "checkpoint", "adjoint", "reversible")
log = logging.getLogger("ebbflow")


@dataclass(frozen=True)
class Solution:
    """What `odeint(..., full=True)` returns.

    `ys` are the states at the requested times; `status` is "done", "max_steps" (the cap on steps
    was reached), "stuck" (the step fell below the rounding of t) or "event", one or a list of one a
    sample; where it is not "done", outputs that were not reached hold the last state. `t` is the
    time reached; `steps`, `rejected` and `evaluations` are counts of the forward solve, numbers or
    tensors (B,). `step_sizes` are the accepted steps in order, (n,), without a batch axis.
    """

    ys: Any
    status: str | list[str]
    t: float | Tensor
    steps: int | Tensor
    rejected: int | Tensor
    evaluations: int | Tensor
    step_sizes: Tensor | None = None


def odeint(
    f: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | Method = "dopri5",
    rtol: float = 1e-6,
    atol: float = 1e-9,
    gradient: Gradient = "direct",
    batch_dims: int = 0,
    steps: int | None = None,
    step_size: float | None = None,
    max_steps: int = 10_000,
    first_step: float | None = None,
    parameters: Sequence[Tensor] | None = None,
    checkpoints: int | None = None,
    compact: bool = False,
    full: bool = False,
) -> Any:
    """Solve `dy/dt = f(t, y)`, `y(t[0]) = y0`; returns y at each t, (len(t), *y0.shape).

    State. `y0` is a tensor, or tuples, lists and dicts of tensors, at least float32; `t` is
    strictly monotonic, either way. `batch_dims=0`: one state, one step size, t is a scalar tensor.
    `batch_dims=1`: the first axis is a batch whose samples have their own step sizes and ends
    (t may be (T, B)); f receives t of shape (B, 1, …), and a sample's evaluations are counted while
    it is on its way. With `compact=True`, f is called as `f(t, y, rows)` with only those samples;
    `rows` are their indices, for whatever f holds for each sample.

    Steps. Methods with an error estimate adapt: euler and rk4 do not; midpoint, heun, bosh3,
    dopri5, tsit5, reversible-heun, alf and the implicit kvaerno3, esdirk4 do. `steps` (for each
    interval of t) or `step_size` (at most) fixes them; euler and rk4 take one step an interval
    without either. At most `max_steps` are attempted; then the last state is returned with a
    status.

    Gradients, to y0, to t and to the tensors that f reads. They are found in modules, closures,
    defaults and globals of f, or named by `parameters`; a dependence that is not found raises.
    Step sizes count as constants.
    - "direct" records every operation: exact, memory grows with the steps, twice differentiable.
    - "checkpoint" replays the accepted steps from at most `checkpoints` states (default √steps).
    - "reversible" undoes the steps: exact to rounding, one state's memory. Methods that cannot be
      undone are wrapped in a reversible coupling of the same order, twice the evaluations.
    - "adjoint" solves the continuous adjoint equation backwards with the same error control, set
      back to at most eight states on the way: their memory, exact only as the tolerance goes to 0;
      raises where f contracts too strongly.

    Raises ValueError or TypeError for arguments out of range and for half precision.
    Paper: On Neural Differential Equations (Kidger 2022), chapter 5; a method's own in its class.
    """
    chosen = resolve(method, gradient)
    if batch_dims not in (0, 1):
        raise ValueError(f"batch_dims must be 0 or 1, got {batch_dims!r}")
    if compact and batch_dims == 0:
        raise ValueError("compact=True evaluates some samples of a batch: it needs batch_dims=1")
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol and atol must be ≥ 0 and not both 0, got {rtol} and {atol}")
    structure = Structure(y0, batch_dims)
    packed = structure.pack(y0)
    given = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    times = output_times(t, packed, batch_dims)
    grid = step_ends(times, steps, step_size)
    if steps is None and step_size is None and chosen.error_order:
        grid = None
    replayed = gradient in ("checkpoint", "reversible") and torch.is_grad_enabled()
    control = Control(rtol, atol, max_steps, first_step, grid, replayed or not batch_dims)
    problem = OdeProblem(f, structure, compact, chosen, times, control, gradient, checkpoints)

    start = packed
    if given.requires_grad:
        # y(t; t0 + δ, y0) = y(t; t0, y0 - δ f(t0, y0)), so that t0's gradient flows through y0.
        start = packed - problem.shift(given, 0, packed)
    if gradient == "direct" or not torch.is_grad_enabled():
        run = problem.solve(start)
        ys = torch.stack(run.outputs)
    else:
        found = owned.collect(f) if parameters is None else list(parameters)
        found = owned.checked(problem.evaluate, [packed], found)
        ys = gradients.Replayed.apply(problem, start, *found)
        run = problem.run
    assert run is not None and isinstance(ys, Tensor)
    if given.requires_grad:
        later = [ys[k] + problem.shift(given, k, ys[k]) for k in range(1, len(ys))]
        ys = torch.stack([packed, *later])
    return _result(problem, run, structure.unpack(ys), full)


def resolve(method: str | Method, gradient: str) -> Method:
    """The method object, coupled where the gradient needs to undo it."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        method = METHODS[method]
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if gradient == "reversible" and not method.reversible:
        return Coupled.around(method)
    if gradient == "adjoint" and isinstance(method, DiagonallyImplicit):
        raise ValueError(
            f"{method.name} is for stiff equations, whose adjoint is unstable when solved "
            "backwards; use gradient='checkpoint' or 'direct'"
        )
    return method


class OdeProblem:
    """A solve with everything that its gradients need (`gradients.Problem`)."""

    def __init__(
        self,
        f: Callable[..., Any],
        structure: Structure,
        compact: bool,
        method: Method,
        times: list[float] | Tensor,
        control: Control,
        gradient: str,
        checkpoints: int | None,
    ) -> None:
        self.method, self.times, self.control = method, times, control
        self.gradient, self.checkpoints = gradient, checkpoints
        self.field = Field(f, structure, compact)
        self.run: March | None = None
        self.snapshots: adjoint.Snapshots | None = None
        self.evaluations: int | Tensor = 0

    @property
    def first_time(self) -> float | Tensor:
        return self.times[0]

    def solve(self, y0: Tensor) -> March:
        run = march(self.method, self.field, self.times, y0, self.control, self.snapshots)
        self.evaluations = self.field.calls if run.evaluations is None else run.evaluations
        return run

    def evaluate(self, y: Tensor) -> list[Tensor]:
        if self.field.compact:
            self.field.rows = torch.arange(y.shape[0], device=y.device)
        return [self.field(self.first_time, y)]

    def shift(self, given: Tensor, k: int, y: Tensor) -> Tensor:
        """`f(t_k, y) (t_k - stop(t_k))`: zero in value, with the derivative of y(t_k) in t_k."""
        with torch.no_grad():
            if self.field.compact:
                self.field.rows = torch.arange(y.shape[0], device=y.device)
            slope = self.field(self.times[k], y.detach())
        moved = given[k] - given[k].detach()
        if moved.ndim:
            moved = moved.reshape(-1, *(1,) * (y.ndim - 1))
        return slope * moved.to(self.field.real)

    def forward(self, y0: Tensor) -> tuple[Tensor, State, int]:
        fractions = self.control.grid is not None and isinstance(self.times, Tensor)
        if self.gradient == "adjoint" and not fractions:
            self.snapshots = adjoint.Snapshots(y0, self.times, self.control.grid)
        with torch.no_grad():
            self.run = self.solve(y0)
        end = self.run.state if self.gradient == "reversible" else ()
        outputs = torch.stack(self.run.outputs)
        # The steps stay; the states go.
        self.run.outputs, self.run.state = [], ()
        return outputs, end, len(self.run.passages)

    def start(self, y0: Tensor) -> State:
        if self.field.compact:
            self.field.rows = torch.arange(y0.shape[0], device=y0.device)
        return self.method.start(self.field, self.first_time, y0)

    def replay(self, index: int, state: State) -> tuple[State, list[Tensor]]:
        assert self.run is not None
        return advance(self.method, self.field, self.run.passages[index], state)

    def undo(self, index: int, state: State) -> State:
        assert self.run is not None
        return undo(self.method, self.field, self.run.passages[index], state)

    def output_indices(self, index: int) -> list[int]:
        assert self.run is not None
        return [k for k, _, _ in self.run.passages[index].outputs]

    def backward(
        self,
        cotangents: Tensor,
        y0: Tensor,
        outputs: Tensor,
        end: State,
        n: int,
        parameters: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Gradients of y0 and of the parameters."""
        run = self.run
        assert run is not None
        if self.gradient == "adjoint":
            times, ys, pulls = self._reached(), outputs, cotangents
            if self.snapshots is not None:
                times, ys, pulls = self.snapshots.merged(times, [*outputs], [*cotangents])
            control = self.control
            return adjoint.backsolve(
                *(self.method, self.field, times, control, [*ys], [*pulls], parameters)
            )
        last = self._last_cotangent(cotangents)
        if self.gradient == "reversible":
            return gradients.undoing(self, parameters, cotangents, last, y0, end, n)
        slots = self.checkpoints or max(1, math.isqrt(n))
        return gradients.checkpointing(self, parameters, cotangents, last, y0, n, slots)

    def _reached(self) -> list[float] | Tensor:
        """The output times, those beyond the end of the solve moved to it."""
        run, times = self.run, self.times
        assert run is not None
        if isinstance(times, Tensor):
            ahead = (times - run.end) * torch.sign(times[-1] - times[0]) > 0
            return torch.where(ahead, run.end, times)
        sign = 1.0 if times[-1] > times[0] else -1.0
        end = float(run.end)
        return [end if (t - end) * sign > 0 else t for t in times]

    def _last_cotangent(self, cotangents: Tensor) -> Tensor | None:
        """Outputs that were not reached repeat the last state, and so do their cotangents."""
        moved = torch.as_tensor(self.times) != torch.as_tensor(self._reached())
        if not bool(moved.any()):
            return None
        moved = moved.to(cotangents.device)
        moved = moved.reshape(*moved.shape, *(1,) * (cotangents.ndim - moved.ndim))
        return torch.where(moved, cotangents, 0.0).sum(0)


def _result(problem: OdeProblem, run: March, ys: Any, full: bool) -> Any:
    if isinstance(run.status, Tensor):
        status = [STATUS[i] for i in run.status.tolist()]
        ended = [s for s in status if s not in ("done", "event")]
    else:
        status = STATUS[run.status]
        ended = [] if status in ("done", "event") else [status]
    if ended and not full:
        log.warning(
            "odeint ended early (%s): outputs that were not reached hold the last state; "
            "full=True returns the status",
            ", ".join(sorted(set(ended))),
        )
    if not full:
        return ys
    sizes = None
    if not isinstance(run.status, Tensor):
        sizes = torch.tensor([p.h for p in run.passages], dtype=torch.float64)
    return Solution(ys, status, run.end, run.steps, run.rejected, problem.evaluations, sizes)
