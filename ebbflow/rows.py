"""The rows of a plan: sparse linear forms, their checks, and the two ways to evaluate them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.bases import Basis
from ebbflow.denoiser import Denoiser, factor
from ebbflow.grids import given
from ebbflow.schedules import Schedule

Row = Mapping[str, Any]
"""A sparse linear form over the names "x0", "x1", …, "X", "D", "Z" and "1". Coefficients are floats
or, in a plan with a basis, float64 tensors of its shape: one number a coordinate."""


@dataclass(frozen=True, eq=False)
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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stage):
            return NotImplemented
        rows = zip((self.query, *self.update), (other.query, *other.update), strict=False)
        facts = ((stage.time, stage.node, len(stage.update)) for stage in (self, other))
        return next(facts) == next(facts) and all(
            a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a) for a, b in rows
        )


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    return not isinstance(one, Tensor) and not isinstance(two, Tensor) and one == two


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def validate(
    schedule: Schedule, start: float, stages: Sequence[Stage], basis: Basis | None = None
) -> None:
    """Raise ValueError, naming the stage and the row, unless the stages make a plan."""
    shape = None if basis is None else basis.shape
    if not stages:
        raise ValueError("a plan needs at least one stage")
    registers = len(stages[0].update)
    if not _is_time(start):
        raise ValueError(f"start {start!r} is not a time in [0, 1]")
    for k, stage in enumerate(stages):
        if not _is_time(stage.time):
            raise ValueError(f"stage {k}: time {stage.time!r} is not in [0, 1]")
    sigma = schedule.sigma(torch.tensor([s.time for s in stages], dtype=torch.float64))
    held = {f"x{i}" for i in range(registers)}
    every = frozenset(held)
    for k, stage in enumerate(stages):
        where = f"stage {k}"
        if sigma[k] == 0:
            raise ValueError(
                f"{where}: there is no noise at t = {stage.time:g}, nothing to denoise"
            )
        if len(stage.update) != registers:
            raise ValueError(
                f"{where}: {len(stage.update)} update rows for {registers} register(s)"
            )
        _check_row(stage.query, held | {"Z", "1"}, every, f"{where}, query", shape)
        for i, row in enumerate(stage.update):
            if row != {}:
                names = held | {"X", "D", "Z", "1"}
                _check_row(row, names, every, f"{where}, register {i}", shape)
        held = {f"x{i}" for i, row in enumerate(stage.update) if row}
        if stage.node is not None and (not _is_time(stage.node) or "x0" not in held):
            raise ValueError(f"{where}: node {stage.node!r} needs a time in [0, 1] and a state")
    if stages[-1].node is None:
        raise ValueError("the last stage must end at a node, where register 0 is the state")
    given((start, *(stage.node for stage in stages if stage.node is not None)))


def _check_row(
    row: Row,
    names: set[str],
    registers: frozenset[str],
    where: str,
    shape: tuple[int, ...] | None,
) -> None:
    if not isinstance(row, Mapping) or not row:
        raise ValueError(f"{where}: the row is {row!r:.40}, expected names with coefficients")
    for name, value in row.items():
        if name not in names:
            why = "is empty there" if name in registers else "is not a name there"
            raise ValueError(f"{where}: {name!r} {why}; the row may use {sorted(names)}")
        if isinstance(value, Tensor):
            if tuple(value.shape) != shape or value.dtype != torch.float64:
                raise ValueError(
                    f"{where}: coefficient {name!r} is a {value.dtype} tensor of shape "
                    f"{tuple(value.shape)}; a basis of shape {shape} takes such float64 tensors"
                )
            value = value.abs().max().item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}: coefficient {name!r} is {value!r}, not a number")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{where}: coefficient {name!r} is {value!r}, not finite")
    if set(row) == {"1"}:
        raise ValueError(f"{where}: a row needs more than the constant")


Terms = tuple[tuple[int, Any], ...]
"""(slot, coefficient) pairs: the first coefficient as `factor` gives it, the others numbers."""

Rows = tuple[Terms, tuple[Terms, ...], bool]
"""A query, the updates, and whether they draw noise."""


def compile_stage(stage: Stage, dtype: torch.dtype) -> Rows:
    """The rows for a state of this dtype, a unit coefficient first and the constant last."""
    registers = len(stage.update)
    slots = {"X": registers, "D": registers + 1, "Z": registers + 2, "1": registers + 3}
    slots |= {f"x{i}": i for i in range(registers)}

    def terms(row: Row) -> Terms:
        kept = [
            (slots[name], v.to(dtype) if isinstance(v, Tensor) else float(v))
            for name, v in row.items()
            if (v.requires_grad or bool(v.any()) if isinstance(v, Tensor) else v != 0)
        ]
        if row and all(slot == slots["1"] for slot, _ in kept):
            # Nothing but a number is left: a term of zero gives it a shape.
            kept.append((slots[next(name for name in row if name != "1")], 0.0))
        kept.sort(key=lambda term: (term[0] == slots["1"], not _equal(term[1], 1.0)))
        return tuple(
            (slot, c if i or isinstance(c, Tensor) else factor(c, dtype))
            for i, (slot, c) in enumerate(kept)
        )

    rows = (terms(stage.query), *map(terms, stage.update))
    return rows[0], rows[1:], any(slot == slots["Z"] for row in rows for slot, _ in row)


def combine(terms: Terms, values: Sequence[Any], in_place: bool) -> Any:
    """The linear form of these values, None for an empty row.

    in_place: add to tensors that were made here instead of making more. The same bits, in less
    time and memory, but `torch.func` cannot add its own tensors to a plain one.
    """
    if not terms:
        return None
    slot, first = terms[0]
    total = values[slot] if first is None else values[slot] * first
    own = in_place and first is not None
    for slot, coefficient in terms[1:]:
        add = total.add_ if own else total.add
        if isinstance(coefficient, Tensor):
            total = add(values[slot] * coefficient)
        else:
            total = add(values[slot], alpha=coefficient)
        own = in_place
    return total


def on_device(program: Rows, device: torch.device) -> Rows:
    """The same rows with their tensors on a device."""

    def moved(terms: Terms) -> Terms:
        return tuple((s, c.to(device) if isinstance(c, Tensor) else c) for s, c in terms)

    return moved(program[0]), tuple(moved(terms) for terms in program[1]), program[2]


def watch(stages: Sequence[Stage]) -> dict[int, tuple[int, ...]]:
    """Where to sum registers so that every prediction is seen: {stage: registers}.

    Prediction j is bit j of a mask. A register's mask says which predictions it contains with a
    coefficient that is not zero; going backwards, a register is summed when it holds a prediction
    that nothing summed later holds.
    """
    registers = len(stages[0].update)
    masks: list[list[int]] = []
    current = [0] * registers
    for k, stage in enumerate(stages):

        def gather(row: Row, values: Mapping[str, int]) -> int:
            mask = 0
            for name, value in row.items():
                mask |= 0 if _equal(value, 0.0) else values.get(name, 0)
            return mask

        values = {f"x{i}": mask for i, mask in enumerate(current)} | {"D": 1 << k}
        values["X"] = gather(stage.query, values)
        current = [gather(row, values) for row in stage.update]
        masks.append(current)
    seen = 0
    watched: dict[int, tuple[int, ...]] = {}
    last = len(stages) - 1
    for k in range(last, -1, -1):
        for i, mask in enumerate(masks[k]):
            if mask & ~seen or (k == last and i == 0):
                seen |= mask
                watched[k] = (*watched.get(k, ()), i)
    return watched


def require_model(denoiser: Denoiser, tuned_for: Mapping[str, Any]) -> None:
    """Raise ValueError where a plan was tuned for networks of another prediction or shape."""
    while isinstance(getattr(denoiser, "net", None), Denoiser):
        denoiser = denoiser.net  # pyright: ignore
    for name in sorted(tuned_for.keys() & {"prediction", "shape"}):
        own, other = getattr(denoiser, name), tuned_for[name]
        if None not in (own, other) and own != (tuple(other) if name == "shape" else other):
            raise ValueError(f"the plan was tuned for {name} {other!r}, this model has {own!r}")


def require_start(schedule: Schedule, denoiser: Denoiser, x_init: Tensor) -> Tensor:
    """A state to start from, at least float32; raises unless the denoiser lives on `schedule`."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"denoiser is a {type(denoiser).__name__}: wrap it, ef.Denoiser(net, schedule)"
        )
    if denoiser.schedule != schedule:
        raise ValueError(
            f"the plan was made for {schedule!r}, the denoiser lives on "
            f"{denoiser.schedule!r}: compile the solver on the denoiser's schedule"
        )
    if not x_init.is_floating_point() or x_init.ndim == 0:
        raise ValueError(
            f"x_init of dtype {x_init.dtype} and shape {tuple(x_init.shape)}: a state is "
            "a floating-point batch (B, *shape)"
        )
    dtype = torch.promote_types(x_init.dtype, torch.float32)
    return x_init if x_init.dtype == dtype else x_init.to(dtype)
