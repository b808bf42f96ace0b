"""Gradients through a plan without recording it: `sample(gradient="checkpoint" | …)`.

A stage maps the registers to the registers, `r' = M r + b D(q · r)`. All modes run the plan itself,
so that the samples are the same as without gradients; they differ in where a stage's registers come
from when it is differentiated:

- "checkpoint" recomputes them from at most √n snapshots;
- "reversible" undoes the stages where their inverse is explicit (plans that `reverse` takes, such
  as coupled schemes), and recomputes them from at most eight snapshots elsewhere: the memory does
  not grow with the steps, and the gradient is exact either way;
- "adjoint" solves the adjoint equation of the probability-flow ODE back along the nodes: two
  states' memory, and the gradient of the ODE, which is the plan's as the steps go to 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ebbflow import algebra, noise
from ebbflow.differentiation import gradients
from ebbflow.differentiation import parameters as owned
from ebbflow.plan import Plan, Step
from ebbflow.rows import Stage, combine, compile_stage, on_device, require_start
from ebbflow.solvers.stepping import Model, Point, Walk, points_about_mean

MODES = ("checkpoint", "adjoint", "reversible")
SNAPSHOTS = 8

State = tuple[Tensor, ...]


def through(plan: Plan | Walk, gradient: str) -> Walk:
    """The same sampler, whose last state carries gradients that were not recorded.

    The states before it carry none. Raises ValueError for an unknown mode, for solvers that are no
    plan, and for the adjoint of a plan that draws noise.
    """
    if gradient not in MODES:
        raise ValueError(f"gradient must be None, 'direct', {str(MODES)[1:-1]}, got {gradient!r}")
    if not isinstance(plan, Plan):
        raise ValueError(
            f"gradient={gradient!r} replays a plan, and {plan.solver.name} chooses its steps as it "
            "goes: use gradient='direct'"
        )
    if gradient == "adjoint" and (plan.stochastic or plan.times[-1] > plan.start):
        raise ValueError(
            "gradient='adjoint' is of the ODE from noise to data; this plan draws noise or runs the"
            " other way: use gradient='checkpoint' or 'reversible'"
        )
    return Unrecorded(None, plan.schedule, plan.times, plan=plan, gradient=gradient)  # pyright: ignore


@dataclass(frozen=True)
class Unrecorded(Walk):
    """A plan that runs without a graph and has its own backward pass."""

    plan: Plan = field(kw_only=True)
    gradient: str = field(kw_only=True)

    @property
    def nfe(self) -> int:
        return self.plan.nfe

    @property
    def stochastic(self) -> bool:
        return self.plan.stochastic

    @property
    def origin(self) -> dict[str, Any]:
        return dict(self.plan.origin)

    def execute(self, model: Model, x_init: Tensor) -> Iterator[Point]:
        plan = self.plan
        x = require_start(plan.schedule, model.denoiser, x_init)
        if plan.centred:
            inner = replace(self, plan=replace(plan, centred=False))
            yield from points_about_mean(inner, model, x)
            return
        start = x.detach()
        model.evaluations += plan.nfe
        model.passes += sum(model.denoiser.passes(stage.time) for stage in plan.stages)
        problem = (Adjoint if self.gradient == "adjoint" else Replay)(plan, model, self.gradient)
        problem.look(-1, Step(-1, problem.start(start), start, start))
        first = model.indices.start
        steps = plan.execute(model.denoiser, start, model.seed, first, **model.condition)
        for k, stage in enumerate(plan.stages):
            with torch.no_grad():  # not across the yield, where the caller's mode holds
                step = next(steps)
            if k < plan.nfe - 1:
                problem.look(k, step)
                if stage.node is not None and step.state is not None:
                    yield Point(stage.node, step.state, step.prediction)
                continue
            assert step.state is not None
            state = step.state
            if torch.is_grad_enabled():
                problem.end = (torch.stack([start, state]), step.registers)
                tensors = owned.collect(model.denoiser, model.condition)
                tensors = owned.checked(problem.evaluate, [start], tensors)
                ends = gradients.Replayed.apply(problem, x, *tensors)
                assert isinstance(ends, Tensor)
                state = ends[1]
            yield Point(plan.times[-1], state, step.prediction)


class Replay:
    """The stages of a plan one at a time (`gradients.Problem`)."""

    def __init__(self, plan: Plan, model: Model, gradient: str) -> None:
        self.plan, self.model, self.gradient = plan, model, gradient
        # Which registers hold something before each stage, and after the last.
        self.held: list[tuple[int, ...]] = [tuple(range(plan.registers))]
        for stage in plan.stages:
            self.held.append(tuple(i for i, row in enumerate(stage.update) if row))
        self.inverses: list[Stage | None] | None = None
        # Registers before the stages that cannot be undone.
        self.kept: dict[int, State] = {}
        self.end: tuple[Tensor, tuple[Tensor | None, ...]] | None = None
        self.first = None
        self.shape = torch.Size()

    def look(self, k: int, step: Step) -> None:
        """What to keep of the run after stage k; -1 is the start."""
        if k < 0 and self.gradient == "reversible":
            self.inverses = inverses(self.plan, step.prediction.dtype)
        if self.inverses is not None and self.inverses[k + 1] is None:
            self.kept[k + 1] = tuple(x for x in step.registers if x is not None)

    def evaluate(self, x: Tensor) -> list[Tensor]:
        """The prediction at the start, in which every tensor that matters is looked for."""
        return [self.model.denoiser(x, self.plan.stages[0].time, **self.model.condition)]

    def forward(self, y0: Tensor) -> tuple[Tensor, Any, int]:
        assert self.end is not None
        outputs, registers = self.end
        # What is returned gets a graph that holds this object: it is not held in turn.
        self.end = None
        return outputs, () if self.inverses is None else registers, self.plan.nfe

    def start(self, y0: Tensor) -> State:
        self.shape = y0.shape
        basis = self.plan.basis
        return (y0 if basis is None else basis.forward(y0),) * self.plan.registers

    def stage(self, k: int, stage: Stage, state: State, held: Sequence[int]) -> list[Any]:
        """The registers after a stage; `held` says which of them `state` are."""
        plan, model, x = self.plan, self.model, state[0]
        query, update, draws = on_device(compile_stage(stage, x.dtype), x.device)
        values: list[Any] = [None] * plan.registers
        for i, register in zip(held, state, strict=True):
            values[i] = register
        values += [None, None, None, 1.0]
        X, D, Z = range(plan.registers, plan.registers + 3)
        if draws:
            where = (k + 1, tuple(x.shape[1:]), x.dtype, x.device)
            values[Z] = noise.normal(model.seed, model.indices, *where)
        values[X] = combine(query, values, False)
        inputs = values[X] if plan.basis is None else plan.basis.inverse(values[X], self.shape)
        prediction = model.denoiser(inputs, stage.time, **model.condition)
        values[D] = prediction if plan.basis is None else plan.basis.forward(prediction)
        return [combine(row, values, False) for row in update]

    def replay(self, index: int, state: State) -> tuple[State, list[Tensor]]:
        after = self.stage(index, self.plan.stages[index], state, self.held[index])
        if index < self.plan.nfe - 1:
            return tuple(x for x in after if x is not None), []
        basis = self.plan.basis
        end = after[0] if basis is None else basis.inverse(after[0], self.shape)
        # As many registers as at the start, the empty ones too: that is what nothing comes back to.
        return tuple(after), [end]

    def undo(self, index: int, state: State) -> State:
        assert self.inverses is not None
        inverse = self.inverses[index]
        if inverse is None:
            return self.kept[index]
        before = tuple(self.stage(index, inverse, state, self.held[index + 1]))
        if index:
            return before
        assert self.first is not None
        start = self.start(self.first)
        lost = float((before[0] - start[0]).abs().max())
        if not lost <= 1e-2 * float(start[0].abs().max()):
            raise RuntimeError(
                f"undoing the plan came back {lost:.1g} beside its start, too far for a gradient: "
                "use gradient='checkpoint', or float64"
            )
        return start

    def output_indices(self, index: int) -> list[int]:
        return [1] if index == self.plan.nfe - 1 else []

    def backward(
        self,
        cotangents: Tensor,
        y0: Tensor,
        outputs: Tensor,
        end: State,
        n: int,
        parameters: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Gradients of the state at the first node and of the tensors."""
        self.first = y0
        if self.inverses is not None:
            return gradients.undoing(self, parameters, cotangents, None, y0, end, n)
        slots = max(1, math.isqrt(n)) if self.gradient == "checkpoint" else SNAPSHOTS
        return gradients.checkpointing(self, parameters, cotangents, None, y0, n, slots)


def inverses(plan: Plan, dtype: torch.dtype) -> list[Stage | None] | None:
    """Each stage's inverse, None for stages without; None where undoing is no use.

    That is where more than `SNAPSHOTS` stages have no explicit inverse, or where the inverses
    magnify rounding beyond a thousandth.
    """
    if plan.stochastic or plan.basis is not None:
        return None
    found: list[Stage | None] = []
    for stage in plan.stages:
        try:
            alone = Plan(plan.schedule, 1.0, (replace(stage, node=0.0),))
            found.append(algebra.reverse(alone).stages[0])
        except ValueError:
            found.append(None)
        if found.count(None) > SNAPSHOTS:
            return None
    eye = torch.eye(plan.registers, dtype=torch.float64)
    growth = eye
    for stage in reversed(found):
        if stage is None:
            growth = eye
            continue
        rows = [[row.get(f"x{i}", 0.0) for i in range(plan.registers)] for row in stage.update]
        growth = torch.tensor(rows, dtype=torch.float64) @ growth
        if float(growth.abs().max()) * torch.finfo(dtype).eps > 1e-3:
            return None
    return found


class Adjoint(Replay):
    """The adjoint of `du/dphi = (cos phi u - D) / sin phi`, with u = x / r, alpha + i sigma = r
    e^(i phi), which is finite at both ends but for sigma = 0; a step that ends there is D itself.
    """

    def __init__(self, plan: Plan, model: Model, gradient: str) -> None:
        super().__init__(plan, model, gradient)
        times = torch.tensor(plan.times, dtype=torch.float64)
        alpha, sigma = plan.schedule.alpha(times), plan.schedule.sigma(times)
        self.to_data = not bool(sigma[-1])
        self.radius = torch.hypot(alpha, sigma).tolist()
        self.angle = torch.atan2(sigma, alpha).tolist()
        self.last = torch.empty(0)

    def look(self, k: int, step: Step) -> None:
        if step.state is not None:
            self.last = step.state

    def backward(
        self,
        cotangents: Tensor,
        y0: Tensor,
        outputs: Tensor,
        end: State,
        n: int,
        parameters: Sequence[Tensor],
    ) -> list[Tensor | None]:
        nodes, found = self.plan.times, _Sum([None] * len(parameters))
        x, a = outputs[1], cotangents[1]
        k = len(nodes) - 1
        if self.to_data:
            k, x = k - 1, self.last
            _, a = self._pulled(nodes[k], x, a, 1.0, parameters, found)
        u, a = x / self.radius[k], a * self.radius[k]
        for j in reversed(range(k)):
            # Heun's method from node j + 1 up to node j, on u and on its cotangent.
            h = self.angle[j] - self.angle[j + 1]
            first, pull = self._slope(j + 1, u, a, h, parameters, found)
            second, pulled = self._slope(j, u + h * first, a - h * pull, h, parameters, found)
            u, a = u + h / 2 * (first + second), a - h / 2 * (pull + pulled)
        return [cotangents[0] + a / self.radius[0], *found.totals]

    def _slope(
        self,
        k: int,
        u: Tensor,
        a: Tensor,
        h: float,
        parameters: Sequence[Tensor],
        found: _Sum,
    ) -> tuple[Tensor, Tensor]:
        """du/dphi and aᵀ ∂(du/dphi)/∂u at node k; `found` gets half a step of the quadrature."""
        radius, cos, sin = self.radius[k], math.cos(self.angle[k]), math.sin(self.angle[k])
        node = self.plan.times[k]
        clean, pull = self._pulled(node, radius * u, a, h / 2 / sin, parameters, found)
        return (cos * u - clean) / sin, (cos * a - radius * pull) / sin

    def _pulled(
        self,
        t: float,
        x: Tensor,
        a: Tensor,
        weight: float,
        parameters: Sequence[Tensor],
        found: _Sum,
    ) -> tuple[Tensor, Tensor]:
        """D and aᵀ ∂D/∂x; `found` gets weight · aᵀ ∂D/∂θ."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            clean = self.model.denoiser(x, t, **self.model.condition)
            if not clean.requires_grad:
                return clean, torch.zeros_like(a)
            pull, *rest = torch.autograd.grad(clean, [x, *parameters], a, allow_unused=True)
        found.add(rest, weight)
        return clean.detach(), torch.zeros_like(a) if pull is None else pull


@dataclass
class _Sum:
    """Gradients that add up; None where nothing has come."""

    totals: list[Tensor | None]

    def add(self, parts: Sequence[Tensor | None], weight: float) -> None:
        for i, part in enumerate(parts):
            if part is not None:
                old = self.totals[i]
                self.totals[i] = weight * part if old is None else old + weight * part
