"""PNDM: pseudo numerical methods, a classical scheme whose every move is a DDIM step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.adams import adams_stage, equal_steps, noise_row
from ebbflow.solvers.base import Grid, Levels, Solver
from ebbflow.solvers.singlestep import Table, exact_stage, step_stages


@dataclass(frozen=True)
class PNDM(Solver):
    """Adams-Bashforth weights of equal steps on `history` values of eps, after a one-step start.

        x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) e,   e = sum_j w_j eps_j

    S-PNDM (history 2) starts with one pseudo improved Euler step, `e = (e_1 + e_2)/2`, with two
    calls; F-PNDM (history 4) with three pseudo Runge-Kutta steps, `e = (e_1 + 2 e_2 + 2 e_3 +
    e_4)/6`, with four calls each, the inner ones half-way in t. One call a step afterwards; a step
    to sigma = 0 or from alpha = 0 is the exact one for its prediction.
    Order 2, also with history 4: the weights are those of steps that are equal in rho =
    sigma/alpha, and the paper's are equal in t. `order` is what shows from 48 steps on, and
    S-PNDM gets there late (1.7 on the cosine schedule, uniform in t): 1 is stated.
    Pseudo Numerical Methods for Diffusion Models on Manifolds, equations 12 and 13, and its
    second-order method.
    """

    history: int = 4

    def __post_init__(self) -> None:
        if self.history not in (2, 4):
            raise ValueError(f"history must be 2 (S-PNDM) or 4 (F-PNDM), got {self.history}")

    @property
    def grid(self) -> Grid:
        return grids.uniform

    def stages(self, levels: Levels) -> Iterator[Stage]:
        first = 0 if levels.alpha[0] else 1
        starting = 1 if self.history == 2 else 3
        calls = self.history
        # The start's registers, then the past: x_calls is the last eps, and so on.
        registers = calls + self.history - 1
        for k in range(len(levels.times) - 1):
            if k < first or not levels.sigma[k + 1]:
                yield exact_stage(levels, k, registers)
            elif k < first + starting:
                yield from self._start(levels, k, k - first)
            else:
                nodes = range(k, k - self.history, -1)
                past = equal_steps(levels, k, nodes)[1:]
                yield adams_stage(levels, k, past, self.history, calls - 1)

    def _start(self, levels: Levels, k: int, held: int) -> Iterator[Stage]:
        """A step of the start; its first eps goes before the `held` values of the past."""
        t, s = levels.times[k], levels.times[k + 1]
        inner = [s] if self.history == 2 else [(t + s) / 2, (t + s) / 2, s]
        points = Levels.of(levels.schedule, [t, *inner, s])
        first, *rest = step_stages(points, self._table(points))
        names = [f"x{len(rest) + 1 + j}" for j in range(self.history - 1)]
        shifted = [{name: 1.0} if j < held else {} for j, name in enumerate(names[:-1])]
        yield replace(first, update=(*first.update, noise_row(levels, k), *shifted))
        kept = [{name: 1.0} if j <= held else {} for j, name in enumerate(names)]
        yield from (replace(stage, update=(*stage.update, *kept)) for stage in rest)

    def _table(self, points: Levels) -> Table:
        weights = {
            2: ((1.0,), (0.5, 0.5)),
            4: ((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
        }[self.history]
        table = []
        for i, row in enumerate(weights, start=1):
            a = points.alpha[i] / points.alpha[0]
            c = points.sigma[i] - a * points.sigma[0]
            table.append((a, [c * w for w in row]))
        return table


PAPER = "Pseudo Numerical Methods for Diffusion Models on Manifolds"
s_pndm = PNDM("s-pndm", 1, 2, f"{PAPER}, second order", 2)
f_pndm = PNDM("f-pndm", 2, 2, f"{PAPER}, equations 12 and 13", 4)
