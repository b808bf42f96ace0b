"""Euler and Heun on the probability-flow ODE in time t."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ebbflow import grids
from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver, first_order


def velocity(levels: Levels) -> list[tuple[float, float]]:
    """(p, q) with `dx/dt = p x + q D` at each node: `p = sigma'/sigma`, `q = alpha' - alpha p`.

    They are not finite at sigma = 0, where no method uses them.
    """
    t = torch.tensor(levels.times, dtype=torch.float64)
    p = levels.schedule.sigma_prime(t) / levels.schedule.sigma(t)
    q = levels.schedule.alpha_prime(t) - levels.schedule.alpha(t) * p
    return list(zip(p.tolist(), q.tolist(), strict=True))


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method, `x' = x + (s - t) v(x, t)` with `v = dx/dt`.

    One call a step, order 1. A step to sigma = 0 returns the prediction.
    Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, algorithm 1.
    """

    @property
    def grid(self) -> Grid:
        return grids.uniform

    def stages(self, levels: Levels) -> Iterator[Stage]:
        rates = velocity(levels)
        for k in range(len(levels.times) - 1):
            t, s = levels.times[k], levels.times[k + 1]
            a, b = first_order(levels, k)
            if levels.sigma[k] and levels.sigma[k + 1]:
                p, q = rates[k]
                a, b = 1 + (s - t) * p, (s - t) * q
            yield Stage(t, {"x0": 1.0}, ({"x0": a, "D": b},), s)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method, `x' = x + (s - t)/2 (v(x, t) + v(x + (s - t) v(x, t), s))`.

    Two calls a step, order 2. A step to sigma = 0 returns its first prediction, with one call.
    Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 1, in time t.
    """

    @property
    def grid(self) -> Grid:
        return grids.uniform

    def stages(self, levels: Levels) -> Iterator[Stage]:
        rates = velocity(levels)
        for k in range(len(levels.times) - 1):
            t, s = levels.times[k], levels.times[k + 1]
            if not (levels.sigma[k] and levels.sigma[k + 1]):
                a, b = first_order(levels, k)
                yield Stage(t, {"x0": 1.0}, ({"x0": a, "D": b}, {}), s)
                continue
            h = s - t
            p, q = rates[k]
            half = {"x0": 1 + h / 2 * p, "D": h / 2 * q}
            yield Stage(t, {"x0": 1.0}, (half, {"x0": 1 + h * p, "D": h * q}))
            p, q = rates[k + 1]
            yield Stage(s, {"x1": 1.0}, ({"x0": 1.0, "X": h / 2 * p, "D": h / 2 * q}, {}), s)


euler = Euler("euler", 1, 1, "Flow Straight and Fast: Learning to Generate …, algorithm 1")
heun = Heun("heun", 2, 2, "Elucidating the Design Space of Diffusion-Based …, algorithm 1")
