"""UniPC: a multistep predictor and a corrector that reuses the next step's call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver, combination, first_order
from ebbflow.solvers.interpolation import polynomial


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC of `history` values of the data prediction; one call a step.

    Its nominal order is `history + 1`; the first step's corrector of two values caps it at 3.

    The predictor extrapolates D from its last values; once D is known at the predicted state, the
    corrector integrates the polynomial that also passes through it, and the next step starts from
    there. With `B = 1 - e^{-h}` ("b2") or `h` ("b1"), the underdetermined cases are
    `B/2 (D_{-1} - D_0)/r` (predictor of two values) and `B/2 (D_1 - D_0)` (corrector of two); all
    others are the exact integral. The last state is a predicted one.
    UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models,
    algorithms 1 and 2.
    """

    history: int = 2
    form: Literal["b1", "b2"] = "b2"

    @property
    def grid(self) -> Grid:
        return grids.log_snr

    def _weights(self, u: Sequence[float], h: float) -> list[float]:
        """Weights of D at the offsets u, in units of alpha'; u[0] = 0 is the current value."""
        if len(u) != 2:
            return polynomial(u, h, 1.0)
        half = (h if self.form == "b1" else -math.expm1(-h)) / 2 * h / u[1]
        return [-math.expm1(-h) - half, half]

    def stages(self, levels: Levels) -> Iterator[Stage]:
        lambda_, last = levels.lambda_, len(levels.times) - 2
        correct: list[float] = []
        for k in range(last + 1):
            past = range(k, max(k - self.history, -1), -1)
            past = [j for j in past if math.isfinite(lambda_[j]) or j == k]
            names = ["D"] + [f"x{k - j + 1}" for j in past[1:]]
            # The corrected state: what register 1 gathered, and this stage's prediction.
            state = {"x1": 1.0, "D": correct[-1]} if correct else {"x0": 1.0}
            h = lambda_[k + 1] - lambda_[k]
            a, b = first_order(levels, k)
            exact = not math.isfinite(h)
            weights = [b] if exact else []
            if not exact:
                u = [lambda_[j] - lambda_[k] for j in past]
                weights = [levels.alpha[k + 1] * w for w in self._weights(u, h)]
            row = combination((a, state), (1.0, dict(zip(names, weights, strict=False))))
            gathered: dict[str, float] = {}
            correct = []
            if k < last and not exact:
                u = [lambda_[j] - lambda_[k] for j in past]
                late = self._corrector(u, h)
                correct = [levels.alpha[k + 1] * w for w in late]
                gathered = combination((a, state), (1.0, dict(zip(names, correct, strict=False))))
            keep = [{"D": 1.0}] + [{f"x{j}": 1.0} if k >= j - 1 else {} for j in range(2, 9)]
            yield Stage(
                levels.times[k],
                {"x0": 1.0},
                (row, gathered, *keep[: self.history - 1]),
                levels.times[k + 1],
            )

    def _corrector(self, u: Sequence[float], h: float) -> list[float]:
        """Weights at the offsets u and, last, at h."""
        if len(u) == 1:
            return self._weights([0.0, h], h)
        current, *rest = polynomial([u[0], *u[1:], h], h, 1.0)
        return [current, *rest]


PAPER = "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"
b1_2 = UniPC("unipc-b1-2", 3, 3, f"{PAPER}, algorithm 1", 2, "b1")
b2_2 = UniPC("unipc-b2-2", 3, 3, f"{PAPER}, algorithm 1", 2, "b2")
b1_3 = UniPC("unipc-b1-3", 3, 4, f"{PAPER}, algorithm 1", 3, "b1")
b2_3 = UniPC("unipc-b2-3", 3, 4, f"{PAPER}, algorithm 1", 3, "b2")
