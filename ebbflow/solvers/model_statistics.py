"""Empirical model statistics: what a denoiser does on average, as functions of the noise level."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.files import read_tensors, write_tensors
from ebbflow.schedules import along

EXACT_SIZE = 16  # up to this many coordinates the Jacobian's diagonal is computed, not estimated
_POINTS, _WIDEST = 8, 0.125  # of a quadrature panel


class Trace(NamedTuple):
    """Integrals from `start` to points r (R,) on the way to `end`, with the quadrature's weights.

    L = ∫ l, S = ∫ s, J = ∫ e^{-S} b, each (R, *shape), and their values at the end.
    """

    points: Tensor
    weights: Tensor
    L: Tensor
    S: Tensor
    J: Tensor
    L_end: Tensor
    S_end: Tensor
    J_end: Tensor


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """The statistics l, s and b of a denoiser on a grid of `lambda = log(alpha/sigma)`.

    With `y = x/alpha` and `f = (1 - l) y - D`, the probability-flow ODE is `dy/dlambda = -l y - f`,
    and along it `df/dlambda` is about `s f + b`:

        l = 1 - E[diag dD/dy],   s = Cov(f, f') / Var(f),   b = E[f'] - s E[f],

    coordinate by coordinate. In these variables they are the same for every schedule.
    DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics, section 3.2.

    Args:
        lambda_: (P,) increasing, P >= 4.
        l, s, b: (P, *shape), float64. (1, 0, 0) is the data prediction's solver, (0, -1, 0) the
            noise prediction's.
    """

    lambda_: Tensor
    l: Tensor  # noqa: E741, the paper's letter
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if (
            self.lambda_.ndim != 1
            or len(self.lambda_) < 4
            or bool((self.lambda_.diff() <= 0).any())
        ):
            raise ValueError(
                f"lambda_ of shape {tuple(self.lambda_.shape)} must hold 4 or more rising values"
            )
        for name, table in (("l", self.l), ("s", self.s), ("b", self.b)):
            if table.shape != (len(self.lambda_), *self.l.shape[1:]) or table.ndim < 2:
                raise ValueError(
                    f"{name} has shape {tuple(table.shape)}, expected ({len(self.lambda_)}, *shape)"
                )
            if not bool(torch.isfinite(table).all()):
                raise ValueError(f"{name} holds NaN or infinite values")

    @staticmethod
    def constant(l: float, s: float, b: float, shape: tuple[int, ...]) -> ModelStatistics:  # noqa: E741
        """The same three numbers at every level and coordinate."""
        lambda_ = torch.linspace(-8.0, 8.0, 4, dtype=torch.float64)
        tables = (torch.full((4, *shape), float(value), dtype=torch.float64) for value in (l, s, b))
        return ModelStatistics(lambda_, *tables)

    @staticmethod
    @torch.no_grad()
    def from_model(
        denoiser: Denoiser,
        samples: Tensor,
        points: int = 120,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        probes: int = 1,
        batch: int = 256,
        seed: int = 0,
        **condition: Any,
    ) -> ModelStatistics:
        """Measure a denoiser on noisy samples of its law, at `points` levels uniform in lambda.

        samples: (N, *shape) clean ones, of the data or of the model; 1,000 or more. Each keeps its
        noise (and its probes) over all levels, so that the statistics are smooth in lambda.
        sigma_min, sigma_max: of sigma/alpha, cut to what the schedule reaches.
        probes: random signs a sample that estimate the Jacobian's diagonal where it has
        more than 16 coordinates. batch: rows of one call; condition: shared by all.
        Costs N * points * (probes + 2) passes, most of them with a derivative.
        """
        if len(samples) < 2 or points < 4:
            raise ValueError(f"{len(samples)} samples at {points} points: need at least 2 and 4")
        low, high = (denoiser.schedule.log_snr(t).item() / 2 for t in (1.0, 0.0))
        low, high = max(low, -math.log(sigma_max)), min(high, -math.log(sigma_min))
        lambda_ = torch.linspace(low, high, points, dtype=torch.float64)
        times = denoiser.schedule.time(2 * lambda_).clamp(0, 1)
        rows, shape = range(len(samples)), samples.shape[1:]
        eps = noise.normal(
            seed, rows, 0, shape, torch.promote_types(samples.dtype, torch.float32), stream=3
        )
        measure = _Measure(denoiser, samples, eps.to(samples.device), batch, seed, condition)
        l = torch.stack([measure.diagonal(t, probes) for t in times])  # noqa: E741
        partial = ModelStatistics(lambda_, l, torch.zeros_like(l), torch.zeros_like(l))
        slopes = partial.at(lambda_, derivative=True)[0]
        fits = [measure.fit(t, *row) for t, *row in zip(times, l, slopes, strict=True)]
        return ModelStatistics(lambda_, l, *(torch.stack(part) for part in zip(*fits, strict=True)))

    @cached_property
    def _curvatures(self) -> Tensor:
        """Second derivatives at the grid of the natural cubic splines, (P, 3, *shape)."""
        tables = torch.stack([self.l, self.s, self.b], 1)
        h = self.lambda_.diff()
        matrix = torch.diag(
            torch.cat([torch.ones(1), 2 * (h[1:] + h[:-1]), torch.ones(1)]).double()
        )
        inner = torch.arange(1, len(h))
        matrix[inner, inner - 1], matrix[inner, inner + 1] = h[:-1], h[1:]
        slopes = tables.diff(dim=0) / along(h, tables[1:])
        right = torch.zeros_like(tables)
        right[1:-1] = 6 * slopes.diff(dim=0)
        return torch.linalg.solve(matrix, right.flatten(1)).reshape(tables.shape)

    def at(self, lambda_: Tensor, derivative: bool = False) -> Tensor:
        """l, s and b, or their derivatives, at levels (R,): (3, R, *shape); constant off the grid.

        Splines, since a method of order 3 wants two continuous derivatives.
        """
        inside = lambda_.clamp(self.lambda_[0], self.lambda_[-1])
        k = torch.searchsorted(self.lambda_, inside.contiguous()).clamp(1, len(self.lambda_) - 1)
        tables = torch.stack([self.l, self.s, self.b], 1)
        left, right = tables[k - 1], tables[k]
        bend_left, bend_right = self._curvatures[k - 1], self._curvatures[k]
        h = along(self.lambda_[k] - self.lambda_[k - 1], left)
        v = along(inside - self.lambda_[k - 1], left) / h
        u = 1 - v
        if derivative:
            rate = (3 * v**2 - 1) * bend_right - (3 * u**2 - 1) * bend_left
            return ((right - left) / h + h / 6 * rate).movedim(1, 0)
        bend = (u**3 - u) * bend_left + (v**3 - v) * bend_right
        return (u * left + v * right + h**2 / 6 * bend).movedim(1, 0)

    def trace(self, start: float, end: float) -> Trace:
        """The integrals along [start, end] (either direction), exact to about 1e-13.

        Gauss-Legendre panels that end at the grid's levels, where the splines change.
        """
        nodes, weights, inner = _rule()
        low, high = min(start, end), max(start, end)
        kinks = self.lambda_[(self.lambda_ > low) & (self.lambda_ < high)]
        ends = [low]
        for kink in (*kinks.tolist(), high):
            count = math.ceil((kink - ends[-1]) / _WIDEST)
            ends += [ends[-1] + (kink - ends[-1]) * i / count for i in range(1, count)] + [kink]
        ends = torch.tensor(ends, dtype=torch.float64)
        ends = ends if start < end else ends.flip(0)
        h = ends.diff()
        points = (ends[:-1, None] + h[:, None] * nodes).flatten()
        l, s, b = self.at(points).reshape(3, len(h), len(nodes), *self.l.shape[1:])  # noqa: E741

        def running(rate: Tensor) -> tuple[Tensor, Tensor]:
            whole = torch.einsum("j,pj...->p...", weights, rate) * along(h, rate[:, 0])
            part = torch.einsum("ij,pj...->pi...", inner, rate) * along(h, rate)
            before = whole.cumsum(0) - whole
            return before[:, None] + part, whole.sum(0)

        L, L_end = running(l)
        S, S_end = running(s)
        J, J_end = running(torch.exp(-S) * b)
        L, S, J = (values.flatten(0, 1) for values in (L, S, J))
        return Trace(points, (h[:, None] * weights).flatten(), L, S, J, L_end, S_end, J_end)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {"lambda": self.lambda_, "l": self.l, "s": self.s, "b": self.b}
        write_tensors(path, {name: value.contiguous() for name, value in tensors.items()})

    @staticmethod
    def load(path: str | Path) -> ModelStatistics:
        """Read what `save` wrote; raises ValueError for any other content."""
        tensors = read_tensors(path)
        if set(tensors) != {"lambda", "l", "s", "b"}:
            raise ValueError(f"{path} holds {sorted(tensors)}, expected lambda, l, s and b")
        return ModelStatistics(*(tensors[name].double() for name in ("lambda", "l", "s", "b")))


@lru_cache(maxsize=1)
def _rule() -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Legendre on [0, 1]: nodes, weights, and the matrix of integrals from 0 to each node."""
    from numpy.linalg import inv
    from numpy.polynomial import legendre

    nodes, weights = legendre.leggauss(_POINTS)
    integral = legendre.legint(inv(legendre.legvander(nodes, _POINTS - 1)), lbnd=-1)
    inner = legendre.legval(nodes, integral).T
    return tuple(torch.from_numpy(a) for a in ((nodes + 1) / 2, weights / 2, inner / 2))  # type: ignore


@dataclass(frozen=True)
class _Measure:
    """Averages over noisy samples at one time."""

    denoiser: Denoiser
    samples: Tensor
    noise: Tensor
    batch: int
    seed: int
    condition: dict[str, Any]

    def _parts(self, t: Tensor) -> Iterator[tuple[Tensor, range]]:
        """(noisy states, sample indices), a batch at a time."""
        schedule, like = self.denoiser.schedule, next(self.denoiser.parameters(), self.samples)
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        dtype = torch.promote_types(like.dtype, torch.float32)
        for first in range(0, len(self.samples), self.batch):
            part = slice(first, first + self.batch)
            clean, eps = (v[part].to(like.device, dtype) for v in (self.samples, self.noise))
            yield alpha * clean + sigma * eps, range(first, first + len(clean))

    def diagonal(self, t: Tensor, probes: int) -> Tensor:
        """l = 1 - alpha E[diag dD/dx] at t, (*shape)."""
        shape = self.samples.shape[1:]
        d = math.prod(shape)
        alpha = self.denoiser.schedule.alpha(t).item()
        total = torch.zeros(shape, dtype=torch.float64)
        for x, rows in self._parts(t):
            frozen = self.denoiser.at(t, x)

            def push(v: Tensor, x: Tensor = x, frozen: Any = frozen) -> Tensor:
                out = torch.func.jvp(lambda x: frozen(x, **self.condition), (x,), (v,))
                return (v * out[1]).double().sum(0).cpu()

            if d <= EXACT_SIZE:
                unit = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *shape)
                total += sum(push(v.repeat(len(x), *[1] * len(shape))) for v in unit)
            else:
                for probe in range(probes):
                    z = noise.normal(self.seed, rows, 1 + probe, shape, x.dtype, x.device, stream=3)
                    total += push(torch.sign(z)) / probes
        return 1 - alpha * total / len(self.samples)

    def fit(self, t: Tensor, l: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """(s, b) at t: the least-squares line of f' over f, given l and dl/dlambda."""
        schedule = self.denoiser.schedule
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        growth = schedule.alpha_prime(t).item() / alpha  # d log alpha / dt
        speed = growth - schedule.sigma_prime(t).item() / sigma  # dlambda / dt
        sums = torch.zeros(5, *self.samples.shape[1:], dtype=torch.float64)
        for x, _ in self._parts(t):
            noisy = (x - alpha * self.denoiser(x, t, **self.condition)) / sigma
            velocity = growth / speed * x - sigma * noisy
            clock = t.repeat(len(x))
            tangents = (velocity, torch.full_like(clock, 1 / speed))
            out = torch.func.jvp(
                lambda x, t: self.denoiser(x, t, **self.condition), (x, clock), tangents
            )
            y, y_rate = x.double().cpu() / alpha, -sigma / alpha * noisy.double().cpu()
            D, rate = out[0].double().cpu(), out[1].double().cpu()
            f = (1 - l) * y - D
            f_rate = (1 - l) * y_rate - slope * y - rate
            size = ((1 - l) * y) ** 2 + D**2
            sums += torch.stack([part.sum(0) for part in (f, f_rate, f * f, f * f_rate, size)])
        f, f_rate, square, product, size = sums / len(self.samples)
        variance = square - f**2
        # Of Gaussian data f does not depend on x, and there is no line to fit.
        varies = variance > 1e-10 * size
        s = torch.where(varies, (product - f * f_rate) / torch.where(varies, variance, 1.0), 0.0)
        return s, f_rate - s * f
