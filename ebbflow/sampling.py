"""`sample` and `trajectory`: run any solver on any denoiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ebbflow import noise, solvers
from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.progress import bar
from ebbflow.solvers import Solver, differentiable
from ebbflow.solvers.stepping import Model, Walk, cut
from ebbflow.solvers.stepping import Point as Point


@dataclass(frozen=True)
class Result:
    """What `sample(full=True)` returns.

    nfe: denoiser calls, of the costliest sample where solvers choose them; passes: network passes;
    status: "completed", or how many samples reached their cap; seconds: wall time;
    evaluations: (B,), what each sample has spent; times: (B,), how far each came.
    """

    samples: Tensor
    nfe: int
    passes: int
    status: str
    seconds: float
    evaluations: Tensor
    times: Tensor


@overload
def sample(
    denoiser: Denoiser, shape: Sequence[int], *, full: Literal[True], **rest: Any
) -> Result: ...
@overload
def sample(denoiser: Denoiser, shape: Sequence[int], **rest: Any) -> Tensor: ...
def sample(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    solver: str | Solver = "auto",
    steps: int | None = None,
    nfe: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    plan: Plan | Walk | None = None,
    x_init: Tensor | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch: int | None = None,
    gradient: str | None = None,
    denoise: bool = False,
    progress: bool = False,
    on_step: Callable[[Point], None] | None = None,
    full: bool = False,
    **condition: Any,
) -> Tensor | Result:
    """Samples of the denoiser's law, carried from noise to data.

    Args:
        shape: (B, *shape) of the result.
        solver: a name of `ef.solvers.list()`, a solver, or "auto".
        steps, nfe, times, plan: at most one of them: steps (10 by default), a budget of calls,
            the nodes, or a finished plan.
        x_init: the state at the first node; drawn from the schedule's prior unless given.
        seed, first_index: row i is sample `first_index + i` of this seed, whatever the batch.
        batch: evaluate in chunks of this many samples, aligned to the sample index and padded, so
            that every sample is the same bit for bit in any request.
        gradient: "direct" keeps the graph; "checkpoint", "reversible" and "adjoint" have a backward
            pass of their own, whose memory grows as √steps or not at all, for gradients of the
            last state (`solvers.differentiable`); without it nothing is differentiated.
        denoise: spend one more call to remove noise left at the last node (VE).
        on_step: called with a `Point` at each node.
        full: return a `Result` instead of the samples.
        condition: passed to the network; tensors whose first axis is B are cut by sample.

    Raises ValueError for arguments that contradict each other, and NonFinite (step, time, share)
    when the network returns NaN or infinity.
    """
    began = time.perf_counter()
    job = prepare(denoiser, shape, solver, steps, nfe, times, plan, x_init, gradient, condition)
    job = replace(job, seed=seed, first_index=first_index, denoise=denoise)
    parts, accounts = [], []
    chunks = job.chunks(batch)
    with bar("sampling", (len(job.plan.times) - 1) * len(chunks), progress) as advance, job.mode():
        for chunk in chunks:
            state, account = None, job.account(chunk)
            for point in job.run(chunk, account):
                advance()
                state = point.state
                if on_step is not None:
                    on_step(point)
            parts.append(state)
            accounts.append(account)
    samples = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not full:
        return samples
    pairs = [(account, chunk.keep) for account, chunk in zip(accounts, chunks, strict=True)]
    evaluations = torch.cat([account.evaluations[keep] for account, keep in pairs])
    reached = torch.cat([account.reached(job.plan.times[-1])[keep] for account, keep in pairs])
    short = int((reached != job.plan.times[-1]).sum())
    return Result(
        samples,
        int(evaluations.max()),
        max(account.passes for account in accounts),
        f"{short} of {len(reached)} samples reached their cap" if short else "completed",
        time.perf_counter() - began,
        evaluations,
        reached,
    )


def trajectory(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    solver: str | Solver = "auto",
    steps: int | None = None,
    nfe: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    plan: Plan | Walk | None = None,
    x_init: Tensor | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch: int | None = None,
    gradient: str | None = None,
    denoise: bool = False,
    **condition: Any,
) -> Iterator[Point]:
    """Iterate over (time, state, prediction) at the nodes after the first; see `sample`."""
    job = prepare(denoiser, shape, solver, steps, nfe, times, plan, x_init, gradient, condition)
    job = replace(job, seed=seed, first_index=first_index, denoise=denoise)
    return _together(job, [job.run(chunk, job.account(chunk)) for chunk in job.chunks(batch)])


def _together(job: Job, runs: list[Iterator[Point]]) -> Iterator[Point]:
    while True:
        # Entered at each step, so that the caller's own gradient mode holds in between.
        with job.mode():
            points = [next(run, None) for run in runs]
        reached = [point for point in points if point is not None]
        if not reached:
            return
        states, predictions = (
            torch.cat(parts) for parts in zip(*(p[1:] for p in reached), strict=True)
        )
        yield Point(reached[0].time, states, predictions)


class Chunk(NamedTuple):
    """Samples `first` to `first + size` are evaluated; rows `keep` of them were asked for."""

    first: int
    size: int
    keep: slice


@dataclass(frozen=True)
class Job:
    """What is to be sampled, checked; `prepare` makes it."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    plan: Plan | Walk
    x_init: Tensor | None
    condition: dict[str, Any]
    gradient: str | None
    seed: int = 0
    first_index: int = 0
    denoise: bool = False

    @property
    def extra(self) -> bool:
        return self.denoise and self.plan.schedule.sigma(self.plan.times[-1]).item() > 0

    def mode(self) -> Any:
        return nullcontext() if self.gradient else torch.no_grad()

    def chunks(self, batch: int | None) -> list[Chunk]:
        begin, end = self.first_index, self.first_index + self.shape[0]
        if batch is None:
            return [Chunk(begin, self.shape[0], slice(None))]
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
        return [
            Chunk(c, batch, slice(max(begin - c, 0), min(end - c, batch)))
            for c in range(begin // batch * batch, end, batch)
        ]

    def account(self, chunk: Chunk) -> Model:
        """The denoiser with the condition of one chunk; it counts what is spent."""
        rows = self._rows(chunk)
        batch = self.shape[0]
        condition = {name: cut(value, rows, batch) for name, value in self.condition.items()}
        indices = range(chunk.first, chunk.first + chunk.size)
        return Model(self.denoiser, condition, self.seed, indices)

    def run(self, chunk: Chunk, account: Model) -> Iterator[Point]:
        last = self.plan.times[-1]
        for t, state, prediction in self._nodes(account, self.start(chunk)):
            if t == last and self.extra:
                prediction = state = account(state, t)
            yield Point(t, state[chunk.keep], prediction[chunk.keep])

    def _nodes(self, account: Model, x: Tensor) -> Iterator[Point]:
        if isinstance(self.plan, Walk):
            yield from self.plan.execute(account, x)
            return
        first, stages = account.indices.start, self.plan.stages
        account.evaluations += len(stages)
        account.passes += sum(self.denoiser.passes(stage.time) for stage in stages)
        for step in self.plan.execute(self.denoiser, x, self.seed, first, **account.condition):
            stage = stages[step.stage]
            if stage.node is not None and step.state is not None:
                yield Point(stage.node, step.state, step.prediction)

    def _rows(self, chunk: Chunk) -> Tensor:
        rows = torch.arange(chunk.size) + (chunk.first - self.first_index)
        return rows.clamp(0, self.shape[0] - 1)  # padding repeats an end row

    def start(self, chunk: Chunk) -> Tensor:
        """The states at the first node: those given, or the prior's."""
        if self.x_init is not None:
            return cut(self.x_init, self._rows(chunk), self.shape[0])
        parameter = next(self.denoiser.parameters(), None)
        device = "cpu" if parameter is None else parameter.device
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        indices = range(chunk.first, chunk.first + chunk.size)
        z = noise.normal(self.seed, indices, 0, self.shape[1:], dtype, device)
        return z * self.plan.schedule.sigma(1.0).item()


def prepare(
    denoiser: Denoiser,
    shape: Sequence[int],
    solver: str | Solver,
    steps: int | None,
    nfe: int | None,
    times: Sequence[float] | Tensor | None,
    plan: Plan | Walk | None,
    x_init: Tensor | None,
    gradient: str | None,
    condition: dict[str, Any],
) -> Job:
    """The job that the arguments of `sample` ask for; raises ValueError where they contradict."""
    shape = tuple(torch.Size(shape))
    if len(shape) < 2 or shape[0] < 1:
        raise ValueError(f"shape must be (batch, *sample) with a batch of at least 1, got {shape}")
    if denoiser.shape is not None and shape[1:] != denoiser.shape:
        raise ValueError(
            f"samples of shape {shape[1:]} were asked for; this denoiser makes {denoiser.shape}"
        )
    named = {"steps": steps, "nfe": nfe, "times": times, "plan": plan}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give at most one of steps, nfe, times and plan; got {sorted(given)}")
    if plan is None:
        solver = solvers.get(solver) if isinstance(solver, str) else solver
        known = denoiser.statistics
        statistics = None if known is None else known.given(**condition)
        if nfe is not None:
            plan = solver.largest(denoiser.schedule, nfe, statistics)
        else:
            plan = solver.plan(denoiser.schedule, steps, times=times, statistics=statistics)
        assert plan is not None
        if solver.about_mean(statistics) and denoiser.mean(torch.empty(1)) is not None:
            plan = replace(plan, centred=True)
    if x_init is None and plan.start != 1:
        raise ValueError(
            f"the first node is {plan.start:g}, not 1: give x_init, the state at that time"
        )
    if x_init is not None and tuple(x_init.shape) != shape:
        raise ValueError(f"x_init has shape {tuple(x_init.shape)}, expected {shape}")
    if gradient not in (None, "direct"):
        plan = differentiable.through(plan, gradient)
    for name, value in {"x_init": x_init, **condition}.items():
        if gradient is None and isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but sampling runs without: pass gradient='direct', "
                f"or {name}.detach()"
            )
    return Job(denoiser, shape, plan, x_init, condition, gradient)
