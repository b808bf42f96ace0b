"""`invert`: the noise from which a sampler returns given data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ebbflow import grids, solvers
from ebbflow.denoiser import Denoiser, require_known
from ebbflow.inversion.fixed_point import FixedPoint
from ebbflow.inversion.schemes import Scheme, angles, bdia, edict, leapfrog
from ebbflow.plan import Plan
from ebbflow.rows import require_start
from ebbflow.schedules import Schedule
from ebbflow.solvers import Levels, Solver

METHODS: Mapping[str, Scheme | FixedPoint | None] = {
    "bdia": bdia,
    "edict": edict,
    "leapfrog": leapfrog,
    "reversed": None,
    "fixed-point": FixedPoint("fixed-point", 10),
    "renoise": FixedPoint("renoise", 10, (9, 10)),
}
"""The first three return their input exactly; `reversed` takes any deterministic solver that can
run towards noise; the last two invert DDIM."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """Data carried to noise, and what it takes to come back.

    Args:
        x0: the data (B, *shape); x1: the state at the last node.
        latents: every register at the last node; the first is x1. Exact methods need them all.
        times: the nodes from data to noise. The first is where x0 is taken to be
            `x_t = alpha(t) / alpha(0) x_0`, without noise: 0 for exact methods.
        nearest: the least time at which the denoiser was called.
        nfe: its calls on the whole batch.
        back: the plan from the latents to the data.
    """

    x0: Tensor
    x1: Tensor
    latents: tuple[Tensor, ...]
    times: tuple[float, ...]
    nearest: float
    nfe: int
    method: str
    back: Any
    denoiser: Denoiser
    condition: Mapping[str, Any] = field(repr=False)

    @property
    def start(self) -> float:
        """The time at which the inversion starts near the data."""
        return self.times[0]

    def reconstruct(self, denoiser: Denoiser | None = None, **condition: Any) -> Tensor:
        """The data from the latents (B, *shape).

        condition: replaces conditions of the inversion by name, which edits; denoiser: replaces the
        denoiser, such as guidance of another scale.
        """
        return self.decode(self.latents, denoiser, **condition)

    def decode(
        self, latents: tuple[Tensor, ...], denoiser: Denoiser | None = None, **condition: Any
    ) -> Tensor:
        """The same from other latents, one a register, at the same time."""
        used = self.denoiser if denoiser is None else denoiser
        given = {**self.condition, **condition}
        with torch.no_grad():
            if isinstance(self.back, Plan) and len(latents) == self.back.registers > 1:
                # Register 1 of BDIA is one node ahead: at the data.
                ends = self.back.run(used, latents, **given)
                end = ends[0] if self.back.times[-1] == self.start else ends[1]
            else:
                end = self.back.run(used, latents[0], **given)
        return end / _shrunk(used.schedule, self.start)

    @cached_property
    def round_trip_error(self) -> Tensor:
        """The largest difference between `reconstruct()` and x0, a number in float64."""
        return (self.reconstruct().double() - self.x0.double()).abs().max()


def invert(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    method: str | Scheme | FixedPoint = "bdia",
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    solver: str | Solver = "ddim",
    **condition: Any,
) -> Inversion:
    """The state at the noisy end from which the same method returns x0.

    Args:
        x0: data (B, *shape); the state has its dtype, at least float32.
        method: "bdia", "edict" or "leapfrog", which are exact up to round-off; "reversed", the
            solver on increasing times; "fixed-point" and "renoise", which invert DDIM's steps by
            10 calls each; or a scheme of its own parameters, `replace(inversion.bdia, gamma=0.9)`.
        steps: 50 unless times are given; uniform in the angle atan(sigma / alpha).
        times: increasing nodes. Methods that are not exact must start above sigma = 0: by default
            half a step above it.
        solver: of "reversed": a name or a solver.
        condition: passed to the denoiser, there and back; wrap it in guidance to invert guidance.

    x0 is taken to be a state without noise at the first node. A network that predicts the noise
    says nothing of the data at alpha = 0: "reversed" and the fixed points then end a step before.
    Raises ValueError for an unknown method, decreasing times, or a stochastic solver.
    """
    if isinstance(method, str):
        require_known("method", method, METHODS)
        scheme, name = METHODS[method], method
    else:
        scheme, name = method, method.name
    if times is not None and steps is not None:
        raise ValueError(f"give steps or times, not both (steps={steps})")
    schedule = denoiser.schedule
    if times is not None:
        nodes = grids.given(times)
        if nodes[1] < nodes[0]:
            raise ValueError(
                f"times fall from {nodes[0]:g} to {nodes[-1]:g}: inversion runs from data (0) to "
                "noise (1), give them increasing"
            )
    else:
        nodes = grids.angle(schedule, grids.check_steps(50 if steps is None else steps))[::-1]
    # One memory layout there and back: convolutions round differently in another, which undoes
    # exactness at the level of the network's own precision.
    x0 = require_start(schedule, denoiser, x0).clone(memory_format=torch.contiguous_format)
    if isinstance(scheme, Scheme):
        plan = scheme.plan(schedule, nodes)
        back = scheme.back(plan)
        start = angles(Levels.of(schedule, nodes[:1]))[0]
        factors = scheme.start(start)
    else:
        if times is None:
            nodes = _half_a_step_in(schedule, nodes)
        known = None if denoiser.statistics is None else denoiser.statistics.given(**condition)
        there, again = _solvers(scheme, solver)

        def compile(nodes: tuple[float, ...]) -> tuple[Any, Any]:
            denoiser.prepare(nodes[-1:], x0)  # raises where the network cannot be called
            plan = there.plan(schedule, times=nodes, statistics=known)
            return plan, again.plan(schedule, times=nodes[::-1], statistics=known)

        try:
            plan, back = compile(nodes)
        except ValueError:
            if times is not None or schedule.alpha(nodes[-1]) > 0:
                raise
            nodes = nodes[:-1]
            plan, back = compile(nodes)
        if not isinstance(plan, Plan):
            raise ValueError(f"solver {there.name!r} writes no plan: take one that does, as ddim")
        factors = (1.0,) * plan.registers
    starts = tuple(c * _shrunk(schedule, nodes[0]) * x0 for c in factors)
    with torch.no_grad():
        ends = plan.run(denoiser, starts, **condition)
    nearest = min(stage.time for stage in plan.stages)
    latents = ends if isinstance(scheme, Scheme) else ends[:1]
    return Inversion(
        x0, ends[0], latents, nodes, nearest, plan.nfe, name, back, denoiser, condition
    )


def _shrunk(schedule: Schedule, t: float) -> float:
    """alpha(t) / alpha(0)."""
    alpha = schedule.alpha(torch.tensor([t, 0.0], dtype=torch.float64))
    return float(alpha[0] / alpha[1])


def _solvers(scheme: FixedPoint | None, solver: str | Solver) -> tuple[Any, Solver]:
    """What makes the plan to noise, and the solver that comes back."""
    if scheme is not None:
        return scheme, solvers.get("ddim")
    chosen = solvers.get(solver) if isinstance(solver, str) else solver
    return chosen, chosen


def _half_a_step_in(schedule: Schedule, nodes: tuple[float, ...]) -> tuple[float, ...]:
    """The nodes with the first one half a step above the data, in angle."""
    phi = [node.phi for node in angles(Levels.of(schedule, nodes[:2]))]
    start = schedule.time(torch.tensor(-2 * math.log(math.tan(sum(phi) / 2)), dtype=torch.float64))
    return (float(start), *nodes[1:])
