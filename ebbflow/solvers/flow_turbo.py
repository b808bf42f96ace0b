"""FlowTurbo's sampler: Heun's method, then one call a step with a corrector that looks back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ebbflow.plan import Stage
from ebbflow.solvers.base import Grid, Levels, Solver, first_order
from ebbflow.solvers.straight import straight


@dataclass(frozen=True)
class FlowTurbo(Solver):
    """`heun` steps of Heun's method, then pseudo-corrector steps, on the straight path.

        y~ = y + h d,   d' = v(y~, tau'),   y' = y + h/2 (d + d'),   h = tau' - tau

    Any process is the paper's linear flow in `y = x/(alpha + sigma) = (1 - tau) x_0 + tau eps`;
    its velocity `v = dy/dtau = eps - D` is finite at alpha = 0. Heun asks for `d = v(y, tau)`; a
    pseudo step keeps the d' of the step before it, taken at y~ instead of y: as these differ by
    O(h²), the order stays 2. Two calls a Heun step, then one; a step to sigma = 0 returns its own
    prediction.
    FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner, section 3.3.
    """

    heun: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.heun, int) or self.heun < 1:
            raise ValueError(f"heun is {self.heun!r}: at least 1, as the first step has no past")

    @property
    def grid(self) -> Grid:
        return straight

    def stages(self, levels: Levels) -> Iterator[Stage]:
        alpha, sigma, times = levels.alpha, levels.sigma, levels.times
        steps = len(times) - 1
        plain = [not (sigma[k] and sigma[k + 1]) for k in range(steps)]
        for k in range(steps):
            t, s = times[k], times[k + 1]
            if plain[k]:
                a, b = first_order(levels, k)
                yield Stage(t, {"x0": 1.0}, ({"x0": a, "D": b}, {}), s)
                continue
            size, size_s = alpha[k] + sigma[k], alpha[k + 1] + sigma[k + 1]
            if k < self.heun or plain[k - 1]:
                slope = {"X": 1 / sigma[k], "D": -size / sigma[k]}
                yield Stage(t, {"x0": 1.0}, ({"x0": 1.0}, slope))
            h = sigma[k + 1] / size_s - sigma[k] / size
            kept, moved = size_s / size, size_s * h
            slope = {"X": 1 / sigma[k + 1], "D": -size_s / sigma[k + 1]}
            half = {name: moved / 2 * value for name, value in slope.items()}
            used = self.heun <= k + 1 < steps and not plain[k + 1]
            query, update = {"x0": kept, "x1": moved}, {"x0": kept, "x1": moved / 2, **half}
            yield Stage(s, query, (update, slope if used else {}), s)


REFERENCE = "FlowTurbo: Towards Real-time Flow-Based Image Generation …, section 3.3"
flow_turbo = FlowTurbo("flow-turbo", 2, 2, REFERENCE)
