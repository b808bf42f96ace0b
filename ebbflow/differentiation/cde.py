"""`cdeint`: differential equations controlled by a path, `dz = f(t, z) dX`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ebbflow.differentiation.methods import Method
from ebbflow.differentiation.ode import Gradient, odeint
from ebbflow.differentiation.times import output_times


class Path(Protocol):
    """A differentiable path X."""

    def derivative(self, t: Tensor) -> Tensor:
        """dX/dt at a scalar time, (*batch, channels)."""
        ...


@dataclass(frozen=True)
class _Knots:
    """`values` (T, *batch, channels) seen at `times`, strictly increasing."""

    times: Sequence[float]
    values: Tensor
    # The interval whose formula holds at every time; by default the one that t is in.
    held: int | None = None

    def __post_init__(self) -> None:
        times = [float(t) for t in self.times]
        if len(times) < 2 or len(times) != self.values.shape[0] or self.values.ndim < 2:
            raise ValueError(
                "a path needs at least two times and values (T, *batch, channels), got "
                f"{len(times)} times and values {tuple(self.values.shape)}"
            )
        if any(s <= t for t, s in pairwise(times)):
            raise ValueError(f"the times of a path must increase strictly, got {times}")
        object.__setattr__(self, "times", times)

    def _interval(self, t: Tensor | float) -> int:
        """Which interval t is in; the first and the last go on beyond the ends."""
        if self.held is not None:
            return self.held
        return min(max(bisect_right(self.times, float(t)) - 1, 0), len(self.times) - 2)

    def around(self, t: float) -> Self:
        """The path's smooth continuation from the interval that t is in."""
        return replace(self, held=self._interval(t))

    def _slope(self, i: int) -> Tensor:
        return (self.values[i + 1] - self.values[i]) / (self.times[i + 1] - self.times[i])


@dataclass(frozen=True)
class LinearPath(_Knots):
    """Straight lines between the values: known causally, with kinks at the knots."""

    def __call__(self, t: Tensor | float) -> Tensor:
        i = self._interval(t)
        return self.values[i] + (t - self.times[i]) * self._slope(i)

    def derivative(self, t: Tensor | float) -> Tensor:
        """dX/dt, (*batch, channels)."""
        return self._slope(self._interval(t))


@dataclass(frozen=True)
class HermitePath(_Knots):
    """Cubics whose slope at a knot is the backward difference; the first interval is straight.

    Continuously differentiable, and X up to t_i depends on values up to t_(i+1) only. Neural
    Controlled Differential Equations for Online Prediction Tasks (Morrill et al. 2021).
    """

    def _pieces(self, t: Tensor | float) -> tuple[Any, float, Tensor, Tensor, Tensor]:
        """θ, the interval's length, its left value and the slopes at both ends."""
        i = self._interval(t)
        length = self.times[i + 1] - self.times[i]
        theta = (t - self.times[i]) / length
        return theta, length, self.values[i], self._slope(max(i - 1, 0)), self._slope(i)

    def __call__(self, t: Tensor | float) -> Tensor:
        # Hermite's cubic whose increment over the interval is length · right slope.
        theta, length, value, left, right = self._pieces(t)
        rise = theta * theta * (2 - theta)
        return value + length * (rise * right + (theta - rise) * left)

    def derivative(self, t: Tensor | float) -> Tensor:
        """dX/dt, (*batch, channels)."""
        theta, _, _, left, right = self._pieces(t)
        rise = theta * (4 - 3 * theta)
        return rise * right + (1 - rise) * left


def cdeint(
    f: Callable[[Tensor, Tensor], Tensor],
    path: Path,
    z0: Tensor,
    t: Tensor | Sequence[float],
    *,
    method: str | Method = "dopri5",
    rtol: float = 1e-6,
    atol: float = 1e-9,
    gradient: Gradient = "direct",
    steps: int | None = None,
    step_size: float | None = None,
    max_steps: int = 10_000,
    parameters: Sequence[Tensor] | None = None,
    checkpoints: int | None = None,
) -> Tensor:
    """Solve `dz/dt = f(t, z) dX/dt`, z(t[0]) = z0; returns z at each t, (len(t), *z0.shape).

    `f` returns (*z.shape, channels), a matrix for each sample; `path.derivative(t)` is (*batch,
    channels). One step size for the whole batch; the rest is `odeint`'s, also gradients to the
    path's values. The knots of a LinearPath or HermitePath cut the solve into pieces, within which
    the field is smooth; the state at each knot is kept, so that memory grows with the knots, not
    with the steps.
    Paper: Neural Controlled Differential Equations for Irregular Time Series (Kidger et al. 2020).
    """
    times = output_times(t, z0, 0)
    assert isinstance(times, list)
    lo, hi = min(times[0], times[-1]), max(times[0], times[-1])
    knots = {s for s in path.times if lo < s < hi} if isinstance(path, _Knots) else set()
    stops = sorted(knots | {lo, hi}, reverse=times[-1] < times[0])
    states, z = [z0], z0
    for start, end in pairwise(stops):
        piece = path.around((start + end) / 2) if isinstance(path, _Knots) else path
        inside = [s for s in times[1:-1] if min(start, end) < s < max(start, end)]
        zs = odeint(
            partial(_field, f, piece),
            z,
            [start, *inside, end],
            method=method,
            rtol=rtol,
            atol=atol,
            gradient=gradient,
            steps=steps,
            step_size=step_size,
            max_steps=max_steps,
            parameters=parameters,
            checkpoints=checkpoints,
        )
        z = zs[-1]
        states += list(zs[1:] if end in times else zs[1:-1])
    return torch.stack(states)


def _field(f: Callable[[Tensor, Tensor], Tensor], path: Path, t: Tensor, z: Tensor) -> Tensor:
    matrix, slope = f(t, z), path.derivative(t)
    if matrix.shape[:-1] != z.shape or slope.shape[-1:] != matrix.shape[-1:]:
        raise ValueError(
            f"f(t, z) must return {(*z.shape, slope.shape[-1])}, z's shape and the path's "
            f"channels, got {tuple(matrix.shape)}"
        )
    return (matrix @ slope.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)
