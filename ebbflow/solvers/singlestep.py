"""Explicit one-step methods: single-step DPM-Solver and DPM-Solver++, and Runge-Kutta in rho.

A step is a table: stage i is evaluated at an inner point, from x and the values E_j of the earlier
stages, `q_i = a_i x + sum_j b_ij E_j`, and so is the end. E is the data or the noise prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver, first_order
from ebbflow.solvers.interpolation import phi

Table = Sequence[tuple[float, Sequence[float]]]
"""(a_i, (b_i0, …)) for the stages after the first, then for the end."""


def step_stages(points: Levels, table: Table, noise: bool = True) -> Iterator[Stage]:
    """One step's stages; `points` are the start, the inner ones and the end.

    Register 0 gathers the end, register i the query of stage i.
    """
    rows = [table[-1], *table[:-1]]
    for i in range(len(table)):
        alpha, sigma = points.alpha[i], points.sigma[i]
        value = {"X": 1 / sigma, "D": -alpha / sigma} if noise else {"D": 1.0}
        update: list[dict[str, float]] = []
        for j, (a, b) in enumerate(rows):
            if 0 < j <= i:
                update.append({})
            elif i or not noise or not b[0]:
                row = {f"x{j}": 1.0} if i else {"x0": a}
                update.append(row | {name: b[i] * c for name, c in value.items() if b[i]})
            else:
                # a x + b_0 eps with all of eps' weight on this stage is the exact first-order
                # step; the rest is a correction, so no difference of large numbers is left.
                kept = (points.sigma[j or -1] - sum(b[1:])) / sigma
                update.append({"x0": kept, "D": -b[0] * alpha / sigma})
        node = points.times[-1] if i == len(table) - 1 else None
        yield Stage(points.times[i], {f"x{i}": 1.0}, tuple(update), node)


def exact_stage(levels: Levels, k: int, registers: int) -> Stage:
    """The step that is exact for a constant prediction, with empty registers beside the state."""
    a, b = first_order(levels, k)
    empty = [{}] * (registers - 1)
    return Stage(levels.times[k], {"x0": 1.0}, ({"x0": a, "D": b}, *empty), levels.times[k + 1])


@dataclass(frozen=True)
class ExponentialSinglestep(Solver):
    """Single-step DPM-Solver (noise) and DPM-Solver++ (data), with `calls` calls a step.

    With z the offset of a target from the start in lambda (-z in the data form), G the scale there
    (sigma or alpha), and E_j, at z_j, the newest value,

        x_z = a_z x - G (e^z - 1) E_0 - G (z/z_j) z phi_2(z) (E_j - E_0)

    Two calls: the inner point is the middle in lambda, and the end is `a x - G (e^h - 1) E_1`.
    Three calls: the inner points are at 1/3 and 2/3. Order `calls`. A step to sigma = 0 or from
    alpha = 0 is the exact one for its prediction, with one call.
    DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps,
    algorithms 1 and 2; DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
    Models, algorithm 1 and its third-order counterpart.
    """

    calls: int = 2
    noise: bool = False

    def __post_init__(self) -> None:
        if self.calls not in (2, 3):
            raise ValueError(f"calls must be 2 or 3, got {self.calls}; one call is ddim")

    @property
    def grid(self) -> Grid:
        return grids.log_snr

    def stages(self, levels: Levels) -> Iterator[Stage]:
        ratios = [i / self.calls for i in range(1, self.calls)]
        for k in range(len(levels.times) - 1):
            start, end = levels.times[k], levels.times[k + 1]
            if not levels.alpha[k] or not levels.sigma[k + 1]:
                yield exact_stage(levels, k, self.calls)
                continue
            h = levels.lambda_[k + 1] - levels.lambda_[k]
            inner = [levels.time(math.exp(-levels.lambda_[k] - r * h)) for r in ratios]
            points = Levels.of(levels.schedule, [start, *inner, end])
            yield from step_stages(points, self.table(points), self.noise)

    def table(self, points: Levels) -> Table:
        keep, scale, sign = points.sigma, points.alpha, -1
        if self.noise:
            keep, scale, sign = points.alpha, points.sigma, 1
        offsets = [sign * (lambda_ - points.lambda_[0]) for lambda_ in points.lambda_]
        rows: list[tuple[float, Sequence[float]]] = []
        for i, z in enumerate(offsets[1:], start=1):
            total = -scale[i] * math.expm1(z)
            weights = [total]
            if i > 1 and self.calls == 2:
                weights = [0.0, total]
            elif i > 1:
                newest = -scale[i] * z / offsets[i - 1] * z * phi(z, 2)
                weights = [total - newest, *[0.0] * (i - 2), newest]
            rows.append((keep[i] / keep[0], weights))
        return rows


@dataclass(frozen=True)
class RhoRungeKutta(Solver):
    """A classical explicit Runge-Kutta method on `d(x/alpha)/d rho = eps`, rho = sigma/alpha.

    `tableau` has the weights of the stages after the first, then of the end; a call each. Such a
    step multiplies predictions by up to (rho/rho')^(calls - 1), so rho may fall by a few times a
    step and not by thousands; the order is that of the tableau. A step to sigma = 0 or from
    alpha = 0 is the exact one for its prediction, with one call.
    Fast Sampling of Diffusion Models with Exponential Integrator, section 3.4 (rhoRK-DEIS).
    """

    tableau: tuple[tuple[float, ...], ...] = ((0.5,), (0.0, 1.0))

    @property
    def grid(self) -> Grid:
        # Neighbours differ by a small factor in rho wherever the state is not nearly noise.
        return grids.angle

    def stages(self, levels: Levels) -> Iterator[Stage]:
        parts = [sum(row) for row in self.tableau[:-1]]
        for k in range(len(levels.times) - 1):
            start, end = levels.times[k], levels.times[k + 1]
            if not levels.alpha[k] or not levels.sigma[k + 1]:
                yield exact_stage(levels, k, len(self.tableau))
                continue
            rho = math.exp(-levels.lambda_[k])
            step = math.exp(-levels.lambda_[k + 1]) - rho
            inner = [end if part == 1 else levels.time(rho + part * step) for part in parts]
            points = Levels.of(levels.schedule, [start, *inner, end])
            table = [
                (points.alpha[i] / points.alpha[0], [points.alpha[i] * step * a for a in row])
                for i, row in enumerate(self.tableau, start=1)
            ]
            yield from step_stages(points, table)


DPM = "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps"
PP = "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models"
DEIS = "Fast Sampling of Diffusion Models with Exponential Integrator, section 3.4"
MIDPOINT = ((0.5,), (0.0, 1.0))
KUTTA = ((0.5,), (-1.0, 2.0), (1 / 6, 2 / 3, 1 / 6))
CLASSICAL = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
dpm_2 = ExponentialSinglestep("dpm-solver-2", 2, 2, f"{DPM}, algorithm 1", 2, True)
dpm_3 = ExponentialSinglestep("dpm-solver-3", 3, 3, f"{DPM}, algorithm 2", 3, True)
pp_2s = ExponentialSinglestep("dpm-solver++2s", 2, 2, f"{PP}, algorithm 1", 2)
pp_3s = ExponentialSinglestep("dpm-solver++3s", 3, 3, f"{PP}, third order", 3)
rho_midpoint = RhoRungeKutta("deis-rho-midpoint", 2, 2, DEIS, MIDPOINT)
rho_kutta = RhoRungeKutta("deis-rho-kutta3", 3, 3, DEIS, KUTTA)
rho_rk4 = RhoRungeKutta("deis-rho-rk4", 4, 4, DEIS, CLASSICAL)
