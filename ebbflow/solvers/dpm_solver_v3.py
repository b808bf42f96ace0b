"""DPM-Solver-v3: an exponential multistep method in variables fitted to the model.

With the model's statistics l, s, b (see `ModelStatistics`), `y = x/alpha` and `f = (1 - l) y - D`,
`G = e^{-S} f - ∫ e^{-S} b` hardly moves along the ODE, and from lambda_s on (S, L and J from there)

    x_t = alpha_t [ e^{-L_t} y_s - ∫ e^{L + S - L_t} (G + J) dlambda ],   J = ∫ e^{-S} b,

is exact; the method takes for G the polynomial through its known values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ebbflow import grids
from ebbflow.bases import Basis
from ebbflow.plan import Plan, Stage
from ebbflow.schedules import Schedule
from ebbflow.solvers.base import Grid, Levels, Solver, combination, first_order
from ebbflow.solvers.model_statistics import ModelStatistics

PAPER = "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics"


def step(
    statistics: ModelStatistics, start: float, end: float, known: Sequence[float]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(a, weights, c), each (*shape), with `y_t = a y_s + sum_j weights_j f_j + c`.

    known: the levels lambda_j of the values f_j; the end may be one of them (a corrector).
    """
    way = statistics.trace(start, end)
    kernel = torch.exp(way.L - way.L_end + way.S)
    constant = -torch.einsum("r,r...->...", way.weights, kernel * way.J)
    weights = []
    for j, level in enumerate(known):
        basis = way.weights.clone()
        for other in (v for i, v in enumerate(known) if i != j):
            basis = basis * (way.points - other) / (level - other)
        share = torch.einsum("r,r...->...", basis, kernel)
        if level == start:
            weights.append(-share)
            continue
        there = statistics.trace(start, level)
        weights.append(-share * torch.exp(-there.S_end))
        constant = constant + share * there.J_end
    return torch.exp(-way.L_end), weights, constant


@dataclass(frozen=True)
class DPMSolverV3(Solver):
    """One call a step; with `corrector`, each prediction also redoes the step that led to it.

    Made by `DPMSolverV3.of(model_statistics)`, since without a model there is nothing to compile;
    for the same reason it is no name of `ef.solvers.list()`. Steps from alpha = 0 and to sigma = 0
    are of first order. DPM-Solver-v3, algorithms 1 and 2.
    """

    history: int = 2
    corrector: bool = True
    model_statistics: ModelStatistics | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(
        model_statistics: ModelStatistics, history: int = 2, corrector: bool = True
    ) -> DPMSolverV3:
        """history: values of f that the predictor interpolates, 1, 2 or 3."""
        if history not in (1, 2, 3):
            raise ValueError(f"history must be 1, 2 or 3, got {history!r}")
        nominal = history + 1 if corrector else history
        # The first step has no past: it is of order 1, 2 with the corrector.
        order = min(nominal, 3 if corrector else 2)
        return DPMSolverV3(
            "dpm-solver-v3", order, nominal, PAPER, history, corrector, model_statistics
        )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"model statistics"})

    @property
    def grid(self) -> Grid:
        return grids.log_snr

    def compile(self, schedule: Schedule, nodes: grids.Times, statistics: Any) -> Plan:
        plan = tuple(self.stages(Levels.of(schedule, nodes)))
        assert self.model_statistics is not None
        shape = tuple(self.model_statistics.l.shape[1:])
        return Plan(schedule, nodes[0], plan, self.origin, Basis("identity", shape))

    def stages(self, levels: Levels) -> Iterator[Stage]:
        known = self.model_statistics
        if known is None:
            raise ValueError(
                "dpm-solver-v3 needs the model's statistics: "
                "ef.solvers.DPMSolverV3.of(ef.ModelStatistics.from_model(denoiser, samples))"
            )
        lambda_, alpha = levels.lambda_, levels.alpha
        depth = self.history if self.corrector else self.history - 1
        keep = f"x{depth + 1}"  # the corrected state; the registers before it hold the last f
        past: list[int] = []
        for k in range(len(levels.times) - 1):
            state: dict[str, Any] = {"X": 1.0}
            f: dict[str, Any] = {}
            if alpha[k]:
                slope = known.at(torch.tensor([lambda_[k]], dtype=torch.float64))[0, 0]
                f = {"X": (1 - slope) / alpha[k], "D": -1.0}
            rows = {k: f} | {j: {f"x{i + 1}": 1.0} for i, j in enumerate(past)}
            if self.corrector and past:
                used = [k, *past]
                last = past[0]
                state = self._row(levels, last, k, {keep: 1.0}, {j: rows[j] for j in used})
            if alpha[k] and levels.sigma[k + 1]:
                used = [k, *past[: self.history - 1]]
                ahead = self._row(levels, k, k + 1, state, {j: rows[j] for j in used})
            else:
                a, b = first_order(levels, k)
                ahead = combination((a, state), (b, {"D": 1.0}))
            shift = [f, *({f"x{i}": 1.0} if i <= len(past) else {} for i in range(1, depth))]
            update = (ahead, *shift[:depth], *([state] if self.corrector else []))
            past = [k, *past][:depth] if alpha[k] else []
            yield Stage(levels.times[k], {"x0": 1.0}, update, levels.times[k + 1])

    def _row(
        self,
        levels: Levels,
        k: int,
        end: int,
        state: dict[str, Any],
        values: dict[int, dict[str, Any]],
    ) -> dict[str, Any]:
        """The row of x at node `end`, given those of x at node k and of f at some nodes."""
        assert self.model_statistics is not None
        places = [levels.lambda_[j] for j in values]
        a, weights, c = step(self.model_statistics, levels.lambda_[k], levels.lambda_[end], places)
        terms = zip(weights, values.values(), strict=True)
        row = combination((a / levels.alpha[k], state), *terms, (c, {"1": 1.0}))
        return {name: levels.alpha[end] * value for name, value in row.items()}
