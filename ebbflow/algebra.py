"""What follows from a plan being a linear machine: its dense form, its moments under Gaussian data,
the Gaussian of one step, and its inverse. Nothing here calls a denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow.plan import Plan, Row, Stage


@dataclass(frozen=True)
class Dense:
    """`row = a X_0 + sum_j B_j D_j + sum_j C_j Z_j + constant`, for queries and nodes; float64.

    a (n,), B (n, nfe), C (n, nfe), constant (n,), over the nfe queries in order of their calls;
    `node_*` the same over the nodes after the start, in the order of `Plan.times[1:]`. A plan with
    a basis has one such form a coordinate: a last axis more, of its shape flattened. The form of a
    centred plan is that of its rows, about the mean.
    """

    a: Tensor
    B: Tensor
    C: Tensor
    constant: Tensor
    node_a: Tensor
    node_B: Tensor
    node_C: Tensor
    node_constant: Tensor


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of a state, float64."""

    mean: Tensor
    covariance: Tensor


class Transition(NamedTuple):
    """The law of the next node's state given the stage before it: N(mean, deviation²).

    `mean` is a row over that stage's registers, its query "X" and its prediction "D"; `stage` is
    the stage that ends the step.
    """

    mean: Row
    deviation: Any
    stage: int


def dense(plan: Plan) -> Dense:
    """Write every query and every node of a plan in X_0, D_0 … and Z_0 …."""
    n, table = plan.nfe, _table(plan)
    unit = torch.eye(2 * n + 2, dtype=torch.float64)  # X_0, the constant, D_0 …, Z_0 …
    registers = unit[0].expand(table.shape[1], plan.registers, -1)
    queries, nodes = [], []
    for k, stage in enumerate(plan.stages):
        # Of X there is none yet when the query is made.
        fresh = unit[[2 + k, 2 + n + k, 1]].expand(len(registers), 3, -1)
        query = table[k, :, :1] @ torch.cat([registers, 0 * fresh[:, :1], fresh], 1)
        registers = table[k, :, 1:] @ torch.cat([registers, query, fresh], 1)
        queries.append(query[:, 0].T)
        nodes += [registers[:, 0].T] if stage.node is not None else []
    parts = []
    for rows in (torch.stack(queries), torch.stack(nodes)):
        rows = rows[..., 0] if plan.basis is None else rows
        parts += [rows[:, 0], rows[:, 2 : 2 + n], rows[:, 2 + n :], rows[:, 1]]
    return Dense(*parts)


def moments(
    plan: Plan, mean: Tensor, covariance: Tensor, start: tuple[Tensor, Tensor] | None = None
) -> Moments:
    """Propagate mean and covariance through a plan under the denoiser of N(mean, covariance).

    That denoiser is linear and diagonal in the covariance's eigenbasis, so each eigen-direction is
    a machine of `registers` scalars. See `Plan.moments`.
    """
    mean = torch.as_tensor(mean, dtype=torch.float64)
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    covariance = torch.diag(covariance) if covariance.ndim == 1 else covariance
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)}: give (d,) and "
            "(d, d), or (d,) for a diagonal covariance"
        )
    variance, basis, ones = _directions(plan, covariance)
    away = mean if plan.centred else torch.zeros_like(mean)  # where the rows have their origin
    centre = basis.T @ (mean - away)
    alpha, sigma = plan.schedule.alpha(plan.start), plan.schedule.sigma(plan.start)
    if start is None:
        first, spread = alpha * centre, torch.diag(alpha**2 * variance + sigma**2)
    else:
        first = basis.T @ (torch.as_tensor(start[0], dtype=torch.float64) - alpha * away)
        spread = basis.T @ torch.as_tensor(start[1], dtype=torch.float64) @ basis
    d, m = len(mean), plan.registers
    times = torch.tensor([stage.time for stage in plan.stages], dtype=torch.float64)
    alpha, sigma = plan.schedule.alpha(times)[:, None], plan.schedule.sigma(times)[:, None]
    slope = alpha * variance / (alpha**2 * variance + sigma**2)  # (nfe, d): D = slope X + offset
    offset = (1 - slope * alpha) * centre
    table = _table(plan)
    # Registers as affine maps of X_0 in each direction (all equal at first); noise adds up aside.
    # Directions stay independent given X_0, whose covariance may couple them.
    gain = torch.ones(d, m, dtype=torch.float64)
    shift = torch.zeros(d, m, dtype=torch.float64)
    noise = torch.zeros(d, m, m, dtype=torch.float64)
    for k, rows in enumerate(table):
        query, update = rows[:, :1], rows[:, 1:]
        on_x, on_d, on_z, on_1 = update[:, :, m:].unbind(-1)
        through = on_x + slope[k][:, None] * on_d  # (d, m): what each register takes from X
        matrix = update[:, :, :m] + through[:, :, None] * query[:, :, :m]
        fresh = on_z + through * query[:, :, m + 2]
        constant = ones * (on_1 + through * query[:, :, m + 3]) + offset[k][:, None] * on_d
        gain = (matrix @ gain[:, :, None])[:, :, 0]
        shift = (matrix @ shift[:, :, None])[:, :, 0] + constant
        noise = matrix @ noise @ matrix.transpose(1, 2) + fresh[:, :, None] * fresh[:, None, :]
    final = gain[:, 0] * first + shift[:, 0]
    total = gain[:, :1] * spread * gain[:, 0] + torch.diag(noise[:, 0, 0])
    away = plan.schedule.alpha(plan.times[-1]) * away
    return Moments(basis @ final + away, basis @ total @ basis.T)


def _directions(plan: Plan, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances (d,), directions (d, d) and the constant 1 in each (d, 1): eigen-directions of the
    covariance or, for a plan with a basis, its coordinates, in which it must be diagonal."""
    if plan.basis is None:
        variance, basis = torch.linalg.eigh(covariance)
        return variance, basis, basis.sum(0)[:, None]
    d = len(covariance)
    unit = torch.eye(d, dtype=torch.float64).reshape(d, *plan.basis.shape)
    basis = plan.basis.inverse(unit, unit.shape).reshape(d, d).T
    turned = basis.T @ covariance @ basis
    variance = turned.diagonal()
    if (turned - torch.diag(variance)).abs().max() > 1e-9 * turned.abs().max():
        raise ValueError(
            "the covariance is not diagonal in the plan's basis: its directions are coupled; "
            "compile the solver with the statistics of this law"
        )
    return variance, basis, torch.ones(d, 1, dtype=torch.float64)


def _table(plan: Plan) -> Tensor:
    """(nfe, c, 1 + registers, registers + 4): the query and the update rows of each stage, over the
    registers, X, D, Z and 1; c is 1 or, in a basis, the number of coordinates."""
    names = [*(f"x{i}" for i in range(plan.registers)), "X", "D", "Z", "1"]
    c = 1 if plan.basis is None else math.prod(plan.basis.shape)
    table = torch.zeros(plan.nfe, c, 1 + plan.registers, len(names), dtype=torch.float64)
    for k, stage in enumerate(plan.stages):
        for i, row in enumerate([stage.query, *stage.update]):
            for name, v in row.items():
                value = v.flatten() if isinstance(v, Tensor) else v
                table[k, :, i, names.index(name)] = value
    return table


def _draws(row: Row) -> bool:
    return bool(torch.as_tensor(row.get("Z", 0.0)).any())


def transition(plan: Plan, step: int) -> Transition:
    """The Gaussian of one step of a plan. See `Plan.transition`."""
    ends = [k for k, stage in enumerate(plan.stages) if stage.node is not None]
    if not 0 <= step < len(ends):
        raise ValueError(f"step {step}: the plan has steps 0 to {len(ends) - 1}")
    last = ends[step]
    first = ends[step - 1] + 1 if step else 0
    for k in range(first, last + 1):
        early = [plan.stages[k].query] + ([] if k == last else list(plan.stages[k].update))
        if any(_draws(row) for row in early):
            raise ValueError(
                f"step {step} draws noise before its last call (stage {k}): given the state its "
                "end is not Gaussian"
            )
    row = plan.stages[last].update[0]
    mean = {name: c for name, c in row.items() if name != "Z"}
    return Transition(mean, abs(row.get("Z", 0.0)), last)


def reverse(plan: Plan) -> Plan:
    """Invert a plan stage by stage: `r' = M r + b D(q · r)` becomes `r = M⁻¹ (r' - b D)`.

    That is explicit where the query is untouched by its own prediction, `q M⁻¹ b = 0`, as in
    coupled schemes with two registers (EDICT, BDIA). See `Plan.reverse`.
    """
    if plan.basis is not None:
        raise ValueError("a plan in a basis is not reversed: invert with increasing times instead")
    m = plan.registers
    nodes = plan.times
    table = _table(plan)[:, 0]
    stages: list[Stage] = []
    for k, stage in enumerate(plan.stages):
        if any(_draws(row) for row in (stage.query, *stage.update)):
            raise ValueError(f"stage {k} draws noise: a stochastic plan has no inverse")
        query, q_constant = table[k, 0, :m], table[k, 0, m + 3]
        on_x, b, _, on_1 = table[k, 1:, m:].T
        matrix = table[k, 1:, :m] + on_x[:, None] * query
        constant = on_1 + on_x * q_constant
        if torch.linalg.matrix_rank(matrix) < m:
            raise ValueError(
                f"stage {k} is singular: it forgets a register (a step to sigma = 0, or a history "
                "of predictions); invert with the solver on increasing times instead"
            )
        inverse = torch.linalg.inv(matrix)
        back = query @ inverse
        if abs(float(back @ b)) > 1e-12 * float(back.norm() * b.norm()):
            raise ValueError(
                f"stage {k} moves its own query: its inverse is implicit; use an exactly "
                "invertible scheme, or the solver on increasing times"
            )
        row = _row(back, 0.0, q_constant - back @ constant)
        update = tuple(
            _row(inverse[i], -(inverse[i] @ b), -(inverse[i] @ constant)) for i in range(m)
        )
        stages.append(Stage(stage.time, row, update))
    ends = [k for k, stage in enumerate(plan.stages) if stage.node is not None]
    befores = dict(zip([e + 1 for e in ends[:-1]], nodes[1:-1], strict=True)) | {0: nodes[0]}
    reversed_stages = tuple(
        Stage(stages[k].time, stages[k].query, stages[k].update, befores.get(k))
        for k in reversed(range(len(stages)))
    )
    origin = {**plan.origin, "reversed": True}
    return Plan(plan.schedule, nodes[-1], reversed_stages, origin, centred=plan.centred)


def _row(registers: Tensor, prediction: float | Tensor, constant: float | Tensor) -> Row:
    names = {f"x{i}": float(c) for i, c in enumerate(registers)}
    names |= {"D": float(prediction), "1": float(constant)}
    return {name: c for name, c in names.items() if c != 0}
