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
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.bases import Basis
from ebbflow.centred import centre, restore
from ebbflow.denoiser import Denoiser, plain
from ebbflow.files import (
    as_list,
    exact_keys,
    read_json,
    read_tensors,
    write_tensors,
    write_text,
)
from ebbflow.finite import readable, require_finite
from ebbflow.rows import Row as Row
from ebbflow.rows import (
    Stage,
    combine,
    compile_stage,
    on_device,
    require_model,
    require_start,
    validate,
    watch,
)
from ebbflow.schedules import Schedule, from_config

if TYPE_CHECKING:
    from ebbflow.algebra import Dense, Moments, Transition


class Step(NamedTuple):
    """What the executor yields after each stage.

    registers: in the coordinates of the plan's basis; state: register 0 itself at a node, or None.
    """

    stage: int
    registers: tuple[Tensor | None, ...]
    prediction: Tensor
    state: Tensor | None


@dataclass(frozen=True)
class Plan:
    """A sampler as data; malformed rows raise ValueError when it is made.

    Args:
        schedule: on which it was compiled; a denoiser on another one is refused.
        start: the time of the initial state, which every register holds at first.
        stages: the denoiser calls, in order; the last one ends at a node.
        origin: JSON values saying which solver, command and model made it.
        basis: coordinates in which the rows hold, so that coefficients may differ by coordinate;
            Z and "1" are then coordinates too. None for the state's own.
        centred: whether the rows hold for `x_t - alpha m` and `D - m`, with m the mean that the
            denoiser knows of the data under each sample's condition (`Denoiser.mean`).
    """

    schedule: Schedule
    start: float
    stages: tuple[Stage, ...]
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    basis: Basis | None = None
    centred: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        validate(self.schedule, self.start, self.stages, self.basis)
        wide = (torch.float32, torch.float64)
        programs = {dtype: tuple(compile_stage(s, dtype) for s in self.stages) for dtype in wide}
        object.__setattr__(self, "_programs", programs)
        object.__setattr__(self, "_watched", watch(self.stages))

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
        denoiser, start, mean = self._initial(denoiser, x_init, condition)
        *_, (_, end, _) = self._loop(denoiser, start, seed, first_index, condition)
        ends = end[: len(start)] if isinstance(x_init, tuple) else end[:1]
        if self.basis is not None:
            ends = [x if x is None else self.basis.inverse(x, start[0].shape) for x in ends]
        ends = [restore(x, mean, self.schedule, self.times[-1]) for x in ends]
        return tuple(ends) if isinstance(x_init, tuple) else ends[0]

    def execute(
        self,
        denoiser: Denoiser,
        x_init: Tensor | tuple[Tensor, ...],
        seed: int = 0,
        first_index: int = 0,
        **condition: Any,
    ) -> Iterator[Step]:
        """Run, yielding after each stage; its loop is the library's one multiply-add loop."""
        denoiser, start, mean = self._initial(denoiser, x_init, condition)
        held, shape = len(start), start[0].shape
        for k, values, prediction in self._loop(denoiser, start, seed, first_index, condition):
            node = self.stages[k].node
            state = values[0] if node is not None else None
            if self.basis is not None and state is not None:
                state = self.basis.inverse(state, shape)
            state = restore(state, mean, self.schedule, node)
            prediction = prediction if mean is None else prediction + mean
            yield Step(k, tuple(values[:held]), prediction, state)

    def _loop(
        self,
        denoiser: Denoiser,
        start: tuple[Tensor, ...],
        seed: int,
        first_index: int,
        condition: Mapping[str, Any],
        inspect: bool = False,
    ) -> Iterator[tuple[int, list[Any], Tensor]]:
        x, basis, given = start[0], self.basis, start
        indices = range(first_index, first_index + len(x))
        calls = denoiser.prepare(tuple(stage.time for stage in self.stages), x)
        watched: Mapping[int, tuple[int, ...]] = self.__dict__["_watched"]
        in_place = plain()
        programs = self.__dict__["_programs"][x.dtype]
        if basis is not None:
            start = tuple(basis.forward(x) for x in start)
            programs = tuple(on_device(program, x.device) for program in programs)
        # The machine: the registers, X, D, Z and 1. Nothing else keeps a tensor in memory.
        values: list[Any] = [*start, None, None, None, 1.0]
        X, D, Z = range(len(start), len(start) + 3)
        sums: list[Tensor] = []
        last, looked = self.nfe - 1, time.monotonic()
        if inspect:
            require_finite(x, f"x_init, the state at t = {self.start:g},")
        for k, (query, update, draws) in enumerate(programs):
            if draws:
                shape = start[0].shape[1:]
                values[Z] = noise.normal(seed, indices, k + 1, shape, x.dtype, x.device)
            values[X] = combine(query, values, in_place)
            if basis is None:
                values[D] = prediction = calls[k](values[X], **condition)
            else:
                prediction = calls[k](basis.inverse(values[X], x.shape), **condition)
                values[D] = basis.forward(prediction)
            values[:X] = [combine(row, values, in_place) for row in update]
            if inspect:
                where = f"at step {k + 1} of {self.nfe}, t = {self.stages[k].time:g},"
                require_finite(prediction, f"the prediction {where}")
                for register in values[:X]:
                    require_finite(register, f"the state {where}")
            else:
                # A number that is not finite cannot leave a linear machine by itself, so a few
                # sums, placed by `watch`, see every prediction; they are read seldom.
                if k in watched:
                    sums += [values[i].sum() for i in watched[k]]
                if k == last or time.monotonic() - looked > 3:
                    if values[0] is not None and k < last:
                        sums.append(values[0].sum())
                    if not all(math.isfinite(x.item()) for x in sums if readable(x)):
                        for _ in self._loop(denoiser, given, seed, first_index, condition, True):
                            pass
                    sums, looked = [], time.monotonic()
            yield k, values, prediction
            values[X] = values[D] = values[Z] = prediction = None

    def _initial(
        self,
        denoiser: Denoiser,
        x_init: Tensor | tuple[Tensor, ...],
        condition: Mapping[str, Any],
    ) -> tuple[Denoiser, tuple[Tensor, ...], Tensor | None]:
        """The denoiser and the registers that the rows hold for, and the mean if centred."""
        given = x_init if isinstance(x_init, tuple) else (x_init,) * self.registers
        if len(given) != self.registers or len({x.shape for x in given}) != 1:
            raise ValueError(
                f"x_init has shapes {[tuple(x.shape) for x in given]}; the plan needs "
                f"{self.registers} register(s) of one shape"
            )
        require_model(denoiser, self.origin.get("model", {}))
        start = tuple(require_start(self.schedule, denoiser, x) for x in given)
        if self.centred:
            return centre(denoiser, start, self.start, condition)
        return denoiser, start, None

    def dense(self) -> Dense:
        """The plan written out: every query and node in X_0, the predictions and the noise."""
        return _algebra().dense(self)

    def moments(
        self, mean: Tensor, covariance: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> Moments:
        """Exact mean and covariance of the last state when the data are Gaussian.

        mean: (d,); covariance: (d, d) or, diagonal, (d,). start: mean and covariance of the initial
        state; the process' own law at the first node unless given.
        """
        return _algebra().moments(self, mean, covariance, start)

    def transition(self, step: int) -> Transition:
        """The Gaussian of step `step` (0 is the first): its mean as a row, and its deviation.

        Raises ValueError when the noise enters before the step's last call.
        """
        return _algebra().transition(self, step)

    def reverse(self) -> Plan:
        """The plan that undoes this one exactly, in exact arithmetic.

        Raises ValueError where a stage has no explicit inverse, or draws noise.
        """
        return _algebra().reverse(self)

    def to_config(self) -> dict[str, Any]:
        """JSON values from which `from_config` makes an equal plan, beside `tensors`."""

        def row(k: int, where: str, row: Row) -> dict[str, Any]:
            return {n: f"{k}.{where}.{n}" if isinstance(v, Tensor) else v for n, v in row.items()}

        basis = None if self.basis is None else [self.basis.kind, list(self.basis.shape)]
        return {
            "format": "ebbflow-plan",
            "version": 1,
            "schedule": self.schedule.config(),
            "start": self.start,
            "stages": [
                {
                    "time": stage.time,
                    "query": row(k, "query", stage.query),
                    "update": [row(k, str(i), r) for i, r in enumerate(stage.update)],
                    "node": stage.node,
                }
                for k, stage in enumerate(self.stages)
            ],
            "origin": dict(self.origin),
            **({} if basis is None else {"basis": basis}),
            **({"centred": True} if self.centred else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The coefficients that differ by coordinate, by the names that `to_config` gives them."""
        out: dict[str, Tensor] = {}
        for k, stage in enumerate(self.stages):
            for where, row in [("query", stage.query), *enumerate(stage.update)]:
                found = {f"{k}.{where}.{n}": v for n, v in row.items() if isinstance(v, Tensor)}
                out |= {name: value.contiguous() for name, value in found.items()}
        if self.basis is not None and self.basis.matrix is not None:
            out["basis"] = self.basis.matrix.contiguous()
        return out

    @staticmethod
    def from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan that `to_config` described; raises ValueError for anything else."""
        if not isinstance(config, Mapping) or config.get("format") != "ebbflow-plan":
            raise ValueError("this is no plan: the key 'format' must be 'ebbflow-plan'")
        if config.get("version") != 1:
            raise ValueError(f"plan version {config.get('version')!r}: this release reads 1")
        keys = ("format", "version", "schedule", "start", "stages", "origin")
        needed = {k: v for k, v in config.items() if k not in ("basis", "centred")}
        exact_keys(needed, keys, "plan")
        known = {} if tensors is None else tensors

        def row(values: Any) -> Any:
            if not isinstance(values, Mapping):
                return values
            named = {n: v for n, v in values.items() if isinstance(v, str)}
            lost = sorted(v for v in named.values() if v not in known)
            if lost:
                raise ValueError(
                    f"the plan's tensors {lost[:3]} are missing: load it from its file"
                )
            return {**values, **{n: known[v] for n, v in named.items()}}

        stages = []
        for stage in as_list(config["stages"], "stages"):
            exact_keys(stage, ("time", "query", "update", "node"), "stage")
            update = tuple(row(r) for r in as_list(stage["update"], "update"))
            stages.append(Stage(stage["time"], row(stage["query"]), update, stage["node"]))
        if not isinstance(config["origin"], Mapping):
            raise ValueError(f"origin is {config['origin']!r:.40}, expected an object")
        basis = None
        if "basis" in config:
            kind, shape = as_list(config["basis"], "basis")
            basis = Basis(kind, tuple(as_list(shape, "basis")), known.get("basis"))
        schedule = from_config(config["schedule"])
        centred = config.get("centred", False)
        if not isinstance(centred, bool):
            raise ValueError(f"centred is {centred!r:.40}, expected true or false")
        return Plan(schedule, config["start"], tuple(stages), config["origin"], basis, centred)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and its tensors as safetensors beside it, each atomically."""
        tensors = self.tensors()
        if tensors:
            write_tensors(Path(path).with_suffix(".safetensors"), tensors)
        write_text(path, json.dumps(self.to_config(), indent=1, allow_nan=False))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote; raises ValueError for any other content."""
        config = read_json(path)
        beside = Path(path).with_suffix(".safetensors")
        return Plan.from_config(config, read_tensors(beside) if "basis" in config else None)


def _algebra() -> Any:
    from ebbflow import algebra  # which imports this file

    return algebra
