"""The plan: what a solver compiles a schedule and its times into, and the one loop that runs it.

Almost every published sampler is linear in the state, the past predictions and the noise. A plan
stores that linear machine as data, over m registers:

    X_k = query_k · (x0 … x_{m-1}, Z, 1)             the k-th query
    D_k = denoiser(X_k, t_k)                         its prediction
    x_i ← update_k,i · (x0 … x_{m-1}, X, D, Z, 1)    all registers at once

Register 0 is the state at the nodes. Z is one draw of noise a stage.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.files import write_text
from ebbflow.schedules import Schedule, from_config

if TYPE_CHECKING:
    from ebbflow.algebra import Dense, Moments, Transition

Row = Mapping[str, float]
"""A sparse linear form over the names "x0", "x1", …, "X", "D", "Z" and "1"."""


@dataclass(frozen=True)
class Stage:
    """One denoiser call.

    Args:
        time: of the call, in [0, 1]; sigma must be positive there.
        query: the row over registers, "Z" and "1" that is denoised.
        update: one row a register; an empty row empties the register.
        node: the time at which register 0 is the state once this stage is done, or None.
    """

    time: float
    query: Row
    update: tuple[Row, ...]
    node: float | None = None


class Step(NamedTuple):
    """What the executor yields after each stage."""

    stage: int
    registers: tuple[Tensor | None, ...]
    prediction: Tensor


class NonFinite(FloatingPointError):
    """A prediction or a state stopped being finite."""


@dataclass(frozen=True)
class Plan:
    """A sampler as data; malformed rows raise ValueError when it is made.

    Args:
        schedule: on which it was compiled; a denoiser on another one is refused.
        start: the time of the initial state, which every register holds at first.
        stages: the denoiser calls, in order; the last one ends at a node.
        origin: JSON values saying which solver, command and model made it.
    """

    schedule: Schedule
    start: float
    stages: tuple[Stage, ...]
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        _validate(self)
        program = tuple(_compile(stage, self.registers) for stage in self.stages)
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_watched", _watch(self))

    @property
    def nfe(self) -> int:
        """Denoiser calls of one run, exactly."""
        return len(self.stages)

    @property
    def registers(self) -> int:
        """Tensors that the run keeps."""
        return len(self.stages[0].update)

    @property
    def times(self) -> tuple[float, ...]:
        """The nodes, the start included: strictly monotone."""
        return (self.start, *(s.node for s in self.stages if s.node is not None))

    @property
    def stochastic(self) -> bool:
        """Whether any stage draws noise."""
        return any("Z" in row for stage in self.stages for row in (stage.query, *stage.update))

    def run(
        self,
        denoiser: Denoiser,
        x_init: Tensor | tuple[Tensor, ...],
        seed: int = 0,
        first_index: int = 0,
        **condition: Any,
    ) -> Any:
        """The state at the last node, from the state at the first.

        x_init: (B, *shape), or a tuple of one tensor a register, which returns such a tuple.
        seed, first_index: of the noise of stochastic plans; row i is sample first_index + i.
        Raises NonFinite naming the step and the time when a prediction is NaN or infinite.
        """
        registers: Any = None
        for step in self.execute(denoiser, x_init, seed, first_index, **condition):
            registers = step.registers
        return registers if isinstance(x_init, tuple) else registers[0]

    def execute(
        self,
        denoiser: Denoiser,
        x_init: Tensor | tuple[Tensor, ...],
        seed: int = 0,
        first_index: int = 0,
        **condition: Any,
    ) -> Iterator[Step]:
        """Run, yielding after each stage; its loop is the library's one multiply-add loop."""
        registers = self._initial(denoiser, x_init)
        return self._loop(denoiser, registers, seed, first_index, condition, inspect=False)

    def _loop(
        self,
        denoiser: Denoiser,
        start: tuple[Tensor, ...],
        seed: int,
        first_index: int,
        condition: Mapping[str, Any],
        inspect: bool,
    ) -> Iterator[Step]:
        like = start[0]
        indices = range(first_index, first_index + len(like))
        calls = denoiser.prepare(tuple(stage.time for stage in self.stages), like)
        watched: Mapping[int, tuple[int, ...]] = self.__dict__["_watched"]
        registers: tuple[Any, ...] = start
        doubt: Tensor | float = 0.0
        looked = time.monotonic()
        if inspect:
            _require_finite(like, f"x_init, the state at t = {self.start:g},")
        for k, (query, update, draws) in enumerate(self.__dict__["_program"]):
            z = None
            if draws:
                z = noise.normal(seed, indices, k + 1, like.shape[1:], like.dtype, like.device)
            x = _combine(query, (*registers, None, None, z, 1.0))
            d = calls[k](x, **condition)
            values = (*registers, x, d, z, 1.0)
            registers = tuple([_combine(row, values) for row in update])
            if inspect:
                where = f"at step {k + 1} of {self.nfe}, t = {self.stages[k].time:g},"
                _require_finite(d, f"the prediction {where}")
                for register in registers:
                    _require_finite(register, f"the state {where}")
            else:
                # A number that is not finite cannot leave a linear machine by itself, so a few
                # sums, placed by `_watch`, see every prediction; they are read seldom.
                for i in watched.get(k, ()):
                    doubt = doubt + registers[i].sum()
                now = time.monotonic()
                if now - looked > 3 or k == self.nfe - 1:
                    looked = now
                    if registers[0] is not None and k < self.nfe - 1:
                        doubt = doubt + registers[0].sum()
                    if not math.isfinite(_read(doubt)):
                        for _ in self._loop(denoiser, start, seed, first_index, condition, True):
                            pass
                    doubt = 0.0
            yield Step(k, registers, d)

    def _initial(
        self, denoiser: Denoiser, x_init: Tensor | tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"denoiser is a {type(denoiser).__name__}: wrap it, ef.Denoiser(net, schedule)"
            )
        if denoiser.schedule != self.schedule:
            raise ValueError(
                f"the plan was made for {self.schedule!r}, the denoiser lives on "
                f"{denoiser.schedule!r}: compile the solver on the denoiser's schedule"
            )
        given = x_init if isinstance(x_init, tuple) else (x_init,) * self.registers
        if len(given) != self.registers or len({x.shape for x in given}) != 1:
            raise ValueError(
                f"x_init has shapes {[tuple(x.shape) for x in given]}; the plan needs "
                f"{self.registers} register(s) of one shape"
            )
        if not given[0].is_floating_point() or given[0].ndim == 0:
            raise ValueError(
                f"x_init of dtype {given[0].dtype} and shape {tuple(given[0].shape)}: a state is "
                "a floating-point batch (B, *shape)"
            )
        dtype = torch.promote_types(given[0].dtype, torch.float32)
        return tuple(x if x.dtype == dtype else x.to(dtype) for x in given)

    def dense(self) -> Dense:
        """The plan written out: every query and node in X_0, the predictions and the noise."""
        from ebbflow.algebra import dense

        return dense(self)

    def moments(
        self, mean: Tensor, covariance: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> Moments:
        """Exact mean and covariance of the last state when the data are Gaussian.

        mean: (d,); covariance: (d, d) or, diagonal, (d,). start: mean and covariance of the initial
        state; the process' own law at the first node unless given.
        """
        from ebbflow.algebra import moments

        return moments(self, mean, covariance, start)

    def transition(self, step: int) -> Transition:
        """The Gaussian of step `step` (0 is the first): its mean as a row, and its deviation.

        Raises ValueError when the noise enters before the step's last call.
        """
        from ebbflow.algebra import transition

        return transition(self, step)

    def reverse(self) -> Plan:
        """The plan that undoes this one exactly, in exact arithmetic.

        Raises ValueError where a stage has no explicit inverse, or draws noise.
        """
        from ebbflow.algebra import reverse

        return reverse(self)

    def to_config(self) -> dict[str, Any]:
        """JSON values from which `from_config` makes an equal plan."""
        return {
            "format": "ebbflow-plan",
            "version": 1,
            "schedule": self.schedule.config(),
            "start": self.start,
            "stages": [
                {
                    "time": stage.time,
                    "query": dict(stage.query),
                    "update": [dict(row) for row in stage.update],
                    "node": stage.node,
                }
                for stage in self.stages
            ],
            "origin": dict(self.origin),
        }

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Plan:
        """The plan that `to_config` described; raises ValueError for anything else."""
        if not isinstance(config, Mapping) or config.get("format") != "ebbflow-plan":
            raise ValueError("this is no plan: the key 'format' must be 'ebbflow-plan'")
        if config.get("version") != 1:
            raise ValueError(f"plan version {config.get('version')!r}: this release reads 1")
        _exact_keys(config, {"format", "version", "schedule", "start", "stages", "origin"}, "plan")
        stages = []
        for stage in config["stages"]:
            _exact_keys(stage, {"time", "query", "update", "node"}, "stage")
            stages.append(
                Stage(stage["time"], stage["query"], tuple(stage["update"]), stage["node"])
            )
        schedule = from_config(config["schedule"])
        return Plan(schedule, config["start"], tuple(stages), config["origin"])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_text(path, json.dumps(self.to_config(), indent=1, allow_nan=False))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote; raises ValueError for any other content."""
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return Plan.from_config(config)


def _exact_keys(config: Any, keys: set[str], what: str) -> None:
    found = set(config) if isinstance(config, Mapping) else set()
    if found != keys:
        raise ValueError(
            f"{what} has keys {sorted(found)}, it needs {sorted(keys)}: "
            f"missing {sorted(keys - found)}, unknown {sorted(found - keys)}"
        )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _validate(plan: Plan) -> None:
    if not plan.stages:
        raise ValueError("a plan needs at least one stage")
    if not _is_time(plan.start):
        raise ValueError(f"start {plan.start!r} is not a time in [0, 1]")
    for k, stage in enumerate(plan.stages):
        if not _is_time(stage.time):
            raise ValueError(f"stage {k}: time {stage.time!r} is not in [0, 1]")
    sigma = plan.schedule.sigma(torch.tensor([s.time for s in plan.stages], dtype=torch.float64))
    held = {f"x{i}" for i in range(plan.registers)}
    every = frozenset(held)
    for k, stage in enumerate(plan.stages):
        where = f"stage {k}"
        if sigma[k] == 0:
            raise ValueError(
                f"{where}: there is no noise at t = {stage.time:g}, nothing to denoise"
            )
        if len(stage.update) != plan.registers:
            raise ValueError(
                f"{where}: {len(stage.update)} update rows for {plan.registers} register(s)"
            )
        _check_row(stage.query, held | {"Z", "1"}, every, f"{where}, query")
        for i, row in enumerate(stage.update):
            if row:
                _check_row(row, held | {"X", "D", "Z", "1"}, every, f"{where}, register {i}")
        held = {f"x{i}" for i, row in enumerate(stage.update) if row}
        if stage.node is not None and (not _is_time(stage.node) or "x0" not in held):
            raise ValueError(f"{where}: node {stage.node!r} needs a time in [0, 1] and a state")
    if plan.stages[-1].node is None:
        raise ValueError("the last stage must end at a node, where register 0 is the state")
    from ebbflow.grids import given

    given(plan.times)


def _check_row(row: Row, names: set[str], registers: frozenset[str], where: str) -> None:
    if not row:
        raise ValueError(f"{where}: the row is empty")
    for name, value in row.items():
        if name not in names:
            why = "is empty there" if name in registers else "is not a name there"
            raise ValueError(f"{where}: {name!r} {why}; the row may use {sorted(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}: coefficient {name!r} is {value!r}, not a number")
        if not math.isfinite(value):
            raise ValueError(f"{where}: coefficient {name!r} is {value!r}, not finite")
    if set(row) == {"1"}:
        raise ValueError(f"{where}: a row needs more than the constant")


Terms = tuple[tuple[int, float], ...]


def _compile(stage: Stage, registers: int) -> tuple[Terms, tuple[Terms, ...], bool]:
    """Rows as (slot, coefficient) pairs, a unit coefficient first and the constant last."""
    slots = {"X": registers, "D": registers + 1, "Z": registers + 2, "1": registers + 3}
    slots |= {f"x{i}": i for i in range(registers)}

    def terms(row: Row) -> Terms:
        kept = [(slots[name], float(value)) for name, value in row.items() if value != 0]
        kept = kept or [(slots[name], 0.0) for name in list(row)[:1]]
        return tuple(sorted(kept, key=lambda term: (term[0] == slots["1"], term[1] != 1.0)))

    rows = (stage.query, *stage.update)
    draws = any(row.get("Z", 0) != 0 for row in rows)
    return terms(stage.query), tuple(terms(row) for row in stage.update), draws


def _combine(terms: Terms, values: tuple[Any, ...]) -> Any:
    if not terms:
        return None
    slot, coefficient = terms[0]
    total = values[slot]
    if coefficient != 1.0:
        total = total * coefficient
    for slot, coefficient in terms[1:]:
        total = torch.add(total, values[slot], alpha=coefficient)
    return total


def _watch(plan: Plan) -> dict[int, tuple[int, ...]]:
    """Where to sum registers so that every prediction is seen: {stage: registers}.

    Prediction j is bit j of a mask. A register's mask says which predictions it contains with a
    coefficient that is not zero; going backwards, a register is summed when it holds a prediction
    that nothing summed later holds.
    """
    masks: list[dict[str, int]] = []
    current = {f"x{i}": 0 for i in range(plan.registers)}
    for k, stage in enumerate(plan.stages):

        def gather(row: Row, values: Mapping[str, int]) -> int:
            mask = 0
            for name, value in row.items():
                mask |= values.get(name, 0) if value != 0 else 0
            return mask

        values = current | {"D": 1 << k}
        values["X"] = gather(stage.query, values)
        current = {f"x{i}": gather(row, values) for i, row in enumerate(stage.update)}
        masks.append(current)
    seen = 0
    watched: dict[int, tuple[int, ...]] = {}
    for k in reversed(range(plan.nfe)):
        for name, mask in masks[k].items():
            if mask & ~seen or (k == plan.nfe - 1 and name == "x0"):
                seen |= mask
                watched[k] = (*watched.get(k, ()), int(re.sub(r"\D", "", name)))
    return watched


def _read(value: Tensor | float) -> float:
    """The number on the device; inside vmap, where it cannot be read, a finite one."""
    if not isinstance(value, Tensor):
        return value
    if torch._C._functorch.is_functorch_wrapped_tensor(value):  # pyright: ignore
        return 0.0
    return float(value.detach())


def _require_finite(x: Tensor | None, what: str) -> None:
    if x is None:
        return
    bad = 1 - torch.isfinite(x).double().mean().item()
    if bad > 0:
        raise NonFinite(
            f"{what} is not finite in {bad:.1%} of its elements (dtype {x.dtype}): check the "
            "network's weights and inputs; float16 networks overflow, try bfloat16 or float32"
        )
