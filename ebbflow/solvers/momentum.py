"""Samplers with momentum: Heavy Ball and its higher-order generalisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ebbflow.plan import Stage
from ebbflow.solvers.adams import noise_row
from ebbflow.solvers.base import Levels, Solver
from ebbflow.solvers.singlestep import exact_stage


@dataclass(frozen=True)
class GHVB(Solver):
    """Momentum `v_n = (1 - b) v_{n-1} + b eps_n`, then Adams-Bashforth weights that undo its lag.

        d(x/alpha) = d rho sum_j c_j v_{n-j},  c = (1), ((2 + b), -(2 - b)) / 2b, …

    One call a step; b = 1 is iPNDM, smaller b a larger region of stability; a step to sigma = 0 or
    from alpha = 0 is the exact one for its prediction. Order `history` on grids uniform in rho =
    sigma/alpha, at most 2 otherwise; from 48 steps on, histories of 3 and 4 show 1.2 to 2 on grids
    uniform in t (least on the linear schedule), so 1 is stated.
    Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, equation 14 and table 4.
    """

    history: int = 2
    damping: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}; 1 is no momentum")

    def weights(self, known: int) -> tuple[float, ...]:
        b = self.damping
        return {
            1: (1.0,),
            2: ((2 + b) / (2 * b), -(2 - b) / (2 * b)),
            3: ((18 + 5 * b) / (12 * b), -(24 - 8 * b) / (12 * b), (6 - b) / (12 * b)),
            4: tuple(v / (24 * b) for v in (46 + 9 * b, 19 * b - 78, 42 - 5 * b, b - 10)),
        }[known]

    def stages(self, levels: Levels) -> Iterator[Stage]:
        b, registers = self.damping, max(self.history, 2)
        known = 0
        for k in range(len(levels.times) - 1):
            if not levels.alpha[k]:
                yield exact_stage(levels, k, registers)
                continue
            held, known = known, min(known + 1, self.history)
            eps = noise_row(levels, k)
            # v_n as a row: x1 is v_{n-1}, x2 the one before …; the first v is the first eps.
            v = {"x1": 1 - b} | {name: b * c for name, c in eps.items()} if held else dict(eps)
            row: dict[str, float] = {"D": levels.alpha[k + 1]}
            if levels.sigma[k + 1]:
                a = levels.alpha[k + 1] / levels.alpha[k]
                c = levels.sigma[k + 1] - a * levels.sigma[k]
                head, *tail = self.weights(known)
                row = {"x0": a} | {name: c * head * w for name, w in v.items()}
                for j, w in enumerate(tail, start=1):
                    row[f"x{j}"] = row.get(f"x{j}", 0.0) + c * w
            keep = [{f"x{j}": 1.0} if j <= held else {} for j in range(1, registers - 1)]
            yield Stage(levels.times[k], {"x0": 1.0}, (row, v, *keep), levels.times[k + 1])


PAPER = "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts"
heavy_ball = GHVB("heavy-ball", 1, 1, f"{PAPER}, equation 11", 1)
ghvb2 = GHVB("ghvb2", 2, 2, f"{PAPER}, equation 14", 2)
ghvb3 = GHVB("ghvb3", 1, 3, f"{PAPER}, equation 14", 3)
ghvb4 = GHVB("ghvb4", 1, 4, f"{PAPER}, equation 14", 4)
