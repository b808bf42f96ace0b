"""A plan that is asked from outside: it gives out its queries, and somebody else's loop answers.

`Plan.execute` does the arithmetic. It calls a denoiser, so it is given one that returns the answer
that has just come in; the next query is computed here, by the same `combine`, to be handed out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser, Frozen
from ebbflow.finite import require_finite
from ebbflow.interop.diffusers.schedules import Facts
from ebbflow.plan import Plan
from ebbflow.rows import combine, compile_stage, on_device
from ebbflow.schedules import Schedule


class Answers(Denoiser):
    """A denoiser whose network's output is set before each call."""

    def __init__(self, facts: Facts, schedule: Schedule) -> None:
        super().__init__(
            self._received, schedule, facts.prediction, None, None, facts.time, facts.sigma_data
        )
        self.sign, self.limit = facts.sign, facts.limit
        self.output: Tensor | None = None

    def _received(self, x: Tensor, clock: Tensor) -> Tensor:
        assert self.output is not None
        return self.output if self.sign == 1.0 else self.output * self.sign

    def prepare(self, times: tuple[float, ...], x: Tensor, target: str = "x0") -> list[Frozen]:
        calls, limit = super().prepare(times, x, target), self.limit
        return calls if limit is None else [partial(_clipped, call, limit) for call in calls]


def _clipped(call: Frozen, limit: float, x: Tensor) -> Tensor:
    return call(x).clamp(-limit, limit)


def is_state(query: Mapping[str, Any]) -> bool:
    """Whether the query is register 0 itself."""
    kept = {name: v for name, v in query.items() if isinstance(v, Tensor) or v != 0}
    return set(kept) == {"x0"} and not isinstance(kept["x0"], Tensor) and kept["x0"] == 1.0


def first_query(plan: Plan, x: Tensor, seed: int = 0) -> Tensor:
    """Where a plan that starts from x (B, *shape) wants its first answer."""
    x = _wide(x)
    return _query(plan, 0, _registers(plan, x), x.shape, seed)


def draw_seed(generator: Any) -> int:
    """A seed from the pipeline's generator, or from torch's own where it has none."""
    if isinstance(generator, list | tuple):
        raise ValueError(
            f"generator is a list of {len(generator)}; with seed=None the noise of a run comes "
            "from one: pass one generator, or Scheduler(plan, seed=…)"
        )
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def prediction_of(output: Tensor, sample: Tensor, learned: bool, what: str) -> Tensor:
    """The network's prediction, checked, without the variance that some networks learn beside it.

    learned: the second half of twice as many channels is such a variance; what: for messages.
    """
    wanted = tuple(sample.shape)
    if learned and tuple(output.shape) == (wanted[0], 2 * wanted[1], *wanted[2:]):
        output = output[:, : wanted[1]]
    if tuple(output.shape) != wanted:
        raise ValueError(
            f"{what} has shape {tuple(output.shape)}, the sample {wanted}: they must be equal (a "
            'learned variance is dropped where config.variance_type is "learned" or '
            '"learned_range")'
        )
    require_finite(output, what)
    return output


class Run:
    """One run: `asked` is where the next answer is wanted, `answer` takes it.

    Args:
        plan: what is run.
        answers: its denoiser.
        x: the initial state (B, *shape), in any floating-point dtype.
        seed: of the noise of stochastic plans.

    Raises ValueError where the plan's coefficients are for samples of another shape.
    """

    def __init__(self, plan: Plan, answers: Answers, x: Tensor, seed: int) -> None:
        basis, shape = plan.basis, tuple(x.shape[1:])
        if basis is not None:
            flat = basis.matrix is not None
            if (math.prod(shape) if flat else shape) != (basis.shape[0] if flat else basis.shape):
                raise ValueError(
                    f"sample has shape {tuple(x.shape)}: the plan's coefficients are for samples "
                    f"of {f'{basis.shape[0]} numbers' if flat else f'shape {basis.shape}'}"
                )
        x = _wide(x)
        self.plan, self.answers, self.seed, self.shape = plan, answers, seed, x.shape
        self.registers: tuple[Tensor | None, ...] = _registers(plan, x)
        self.asked = _query(plan, 0, self.registers, x.shape, seed)
        self._steps = plan.execute(answers, x, seed)
        self._next = 0

    def answer(self, output: Tensor) -> Tensor:
        """Take the network's output at `asked`; returns the prediction of x_0 that it means.

        After the last one `asked` is the plan's result.
        """
        self.answers.output = output
        done = next(self._steps)
        self.answers.output = None
        self.registers, self._next = done.registers, done.stage + 1
        if self._next < self.plan.nfe:
            self.asked = _query(self.plan, self._next, self.registers, self.shape, self.seed)
        else:
            assert done.state is not None
            require_finite(done.state, "the plan's last state")
            self.asked, self.registers = done.state, ()
            next(self._steps, None)  # the loop ends, and lets go of its tensors
        return done.prediction

    def accept(self, sample: Tensor) -> None:
        """Take over what the loop has made of `asked` before the next answer, or refuse it.

        A batch whose second half repeats its first, for guidance, is no change.
        """
        asked = self.asked.to(sample.dtype)
        if sample.shape != asked.shape:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}, at the last call {tuple(asked.shape)}"
            )
        first, second = sample[: len(sample) // 2], sample[len(sample) // 2 :]
        if torch.equal(sample, asked) or (
            torch.equal(first, asked[: len(first)]) and torch.equal(first, second)
        ):
            return
        stages, k, basis = self.plan.stages, self._next, self.plan.basis
        state, *others = self.registers
        free = k > 0 and stages[k - 1].node is not None and is_state(stages[k].query)
        if not free or state is None or any(other is state for other in others):
            raise ValueError(
                f"sample was changed after {k} of the plan's {len(stages)} calls (by a callback, "
                "or to paint in a mask), where its query is not its state; take a plan that asks "
                "at its states, such as one of ddim"
            )
        edited = sample.to(state.dtype)
        state.copy_(edited if basis is None else basis.forward(edited))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _registers(plan: Plan, x: Tensor) -> tuple[Tensor, ...]:
    return (x if plan.basis is None else plan.basis.forward(x),) * plan.registers


def _query(
    plan: Plan, k: int, registers: tuple[Tensor | None, ...], shape: torch.Size, seed: int
) -> Tensor:
    """The point at which stage k is evaluated, as the executor will compute it."""
    stage, like = plan.stages[k], next(x for x in registers if x is not None)
    row, _, _ = on_device(compile_stage(stage, like.dtype), like.device)
    fresh = None
    if "Z" in stage.query:
        rows = range(len(like))
        fresh = noise.normal(seed, rows, k + 1, like.shape[1:], like.dtype, like.device)
    asked = combine(row, [*registers, None, None, fresh, 1.0], False)
    return asked if plan.basis is None else plan.basis.inverse(asked, shape)
