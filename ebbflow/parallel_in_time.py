"""`parallel`: the sample that the loop returns, with many calls of the denoiser at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebbflow.centred import centre, restore
from ebbflow.denoiser import Denoiser, require_known
from ebbflow.equations.triangular import Carry, Method, UnknownNotFinite, solve
from ebbflow.finite import NonFinite
from ebbflow.plan import Plan
from ebbflow.rows import combine, compile_stage, on_device, require_start
from ebbflow.sampling import prepare
from ebbflow.solvers import Solver
from ebbflow.solvers.stepping import Model

METHODS: Mapping[str, Method] = {
    "jacobi": Method(),
    "gauss-seidel": Method(block=4),
    "anderson": Method(memory=3),
}
"""Jacobi's is Picard's iteration; Gauss-Seidel's in blocks of 4 stages spends fewer evaluations and
more rounds; Anderson's combines the last 3 rounds."""


@dataclass(frozen=True)
class ParallelResult:
    """What `parallel` returns.

    samples (B, *shape); rounds: batched denoiser calls, one after another, at most `plan.nfe`;
    evaluations: of the denoiser on one sample, over the whole batch (the loop has B * plan.nfe);
    sample_rounds (B,); residual (B,): how far a prediction still moved after it had been used,
    inf where `max_rounds` cut; status: "converged" or "stopped".
    """

    samples: Tensor
    rounds: int
    evaluations: int
    sample_rounds: Tensor
    residual: Tensor
    status: str


@torch.no_grad()
def parallel(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    solver: str | Solver = "auto",
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    plan: Plan | None = None,
    method: str | Method = "jacobi",
    window: int | None = None,
    tolerance: float = 1e-6,
    max_rounds: int | None = None,
    batch: int | None = None,
    x_init: Tensor | None = None,
    seed: int = 0,
    first_index: int = 0,
    **condition: Any,
) -> ParallelResult:
    """The sample of `ef.sample` to a tolerance, in fewer rounds of larger batches.

    The predictions D_k = denoiser(query_k(X_0, D_0 … D_{k-1}, Z_0 … Z_k), t_k) of a plan are a
    triangular system; `window` of them are evaluated in one call, of B * window rows, until they
    stand still. Noise comes from a counter, so stochastic plans are such systems too. Each sample
    has its own window and does not know its neighbours.

    Args:
        shape, solver, steps, times, plan, x_init, seed, first_index, condition: as of `ef.sample`.
        method: "jacobi", "gauss-seidel", "anderson" or a `triangular.Method`.
        window: stages in flight, which bound the memory; all of them unless given.
        tolerance: of the sample, absolute and elementwise, in the data's unit: a prediction is used
            once it moves by less than a tenth of it. Networks in float32 agree with themselves at
            other batch sizes to about 1e-6 only; to ask for less than 1e-4 costs rounds.
        max_rounds: stop there, with status "stopped".
        batch: rows of one call of the network; all of a round's unless given.

    Raises ValueError for arguments that contradict each other, NonFinite when a prediction is NaN
    or infinite. Runs without gradients.
    Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, algorithms 1 to 4;
    the sliding window is that of Parallel Sampling of Diffusion Models.
    """
    if isinstance(method, str):
        require_known("method", method, METHODS)
        method = METHODS[method]
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
    job = prepare(denoiser, shape, solver, steps, None, times, plan, x_init, None, condition)
    job = replace(job, seed=seed, first_index=first_index)
    (chunk,) = job.chunks(None)
    if not isinstance(job.plan, Plan):
        raise ValueError(f"{type(job.plan).__name__} is no plan: its steps are not linear")
    plan = job.plan
    x = job.start(chunk)
    x, basis = require_start(plan.schedule, denoiser, x), plan.basis
    account, mean = job.account(chunk), None
    if plan.centred:
        account.denoiser, (x,), mean = centre(denoiser, (x,), plan.start, account.condition)
    z = x if basis is None else basis.forward(x)
    system = _Trajectory(account, plan, x, z, batch)
    try:
        found = solve(
            system,
            (z,) * plan.registers,
            torch.zeros_like(z),
            window=window,
            method=method,
            tolerance=tolerance / 10,
            max_rounds=max_rounds,
        )
    except UnknownNotFinite as error:
        k = error.t
        raise NonFinite(
            f"the prediction at step {k + 1} of {plan.nfe}, t = {plan.stages[k].time:g}, is not "
            f"finite (dtype {x.dtype}): check the network's weights and inputs"
        ) from error
    status = "converged" if bool(found.converged.all()) else "stopped"
    evaluations = int(found.evaluations.sum())
    end = found.carry[0]
    samples = end if basis is None else basis.inverse(end, x.shape)
    samples = restore(samples, mean, plan.schedule, plan.times[-1])
    return ParallelResult(samples, found.calls, evaluations, found.rounds, found.residual, status)


class _Trajectory:
    """A run of a plan as a triangular system: its carry is the registers, unknowns predictions."""

    def __init__(self, model: Model, plan: Plan, x: Tensor, z: Tensor, batch: int | None) -> None:
        self.model, self.plan, self.batch = model, plan, batch
        self.like, self.shape = z, x.shape  # z: the start in the plan's coordinates
        programs = (compile_stage(stage, x.dtype) for stage in plan.stages)
        self.programs = [on_device(program, x.device) for program in programs]
        self.times = torch.tensor([stage.time for stage in plan.stages], dtype=torch.float64)
        self.noise: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        return self.plan.nfe

    def _values(self, t: int, carry: Carry, rows: Tensor) -> list[Any]:
        """The machine before stage t: the registers, X, D, Z and 1."""
        fresh = None
        if self.programs[t][2]:
            if t not in self.noise:
                self.noise[t] = self.model.normal(self.like, t + 1)
            fresh = self.noise[t][rows.to(self.like.device)]
        return [*carry, None, None, fresh, 1.0]

    def ask(self, t: int, carry: Carry, rows: Tensor) -> Tensor:
        return combine(self.programs[t][0], self._values(t, carry, rows), True)

    def answer(self, times: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        first = int(times.min())
        self.noise = {t: z for t, z in self.noise.items() if t >= first}
        size = self.batch or len(rows)
        parts = zip(times.split(size), queries.split(size), rows.split(size), strict=True)
        return torch.cat([self._call(*part) for part in parts])

    def _call(self, times: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        condition, denoiser = self.model.cut(rows), self.model.denoiser
        basis = self.plan.basis
        if basis is None:
            return denoiser.at(self.times[times], queries)(queries, **condition)
        states = basis.inverse(queries, torch.Size((len(rows), *self.shape[1:])))
        return basis.forward(denoiser.at(self.times[times], states)(states, **condition))

    def advance(
        self, t: int, carry: Carry, query: Tensor, answer: Tensor, rows: Tensor
    ) -> Sequence[Tensor | None]:
        values = self._values(t, carry, rows)
        m = len(carry)
        values[m], values[m + 1] = query, answer
        return [combine(row, values, True) for row in self.programs[t][1]]
