"""Quadrature of what a denoiser says beyond the Gaussian one of the data's mean and covariance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow import grids
from ebbflow.bases import Basis
from ebbflow.plan import Plan, Stage
from ebbflow.schedules import Schedule
from ebbflow.solvers.base import Levels, Solver
from ebbflow.statistics import Statistics

FAR = 14.0  # e-folds of s beyond which an integral to 0 or to infinity has converged


@dataclass(frozen=True)
class GaussianResidual(Solver):
    """Exact for Gaussian data; the rest by quadrature, one call a step and no call at the start.

    Along each principal axis of variance L, with s = sigma/alpha and lambda = log s, let

        w = (x_t - alpha m) / sqrt(alpha² L + sigma²)
        r = (D - m) - alpha L / (alpha² L + sigma²) (x_t - alpha m)
        dw/dlambda = -r / sqrt(L + s²)

    which is exact, and w is constant for Gaussian data. r is `s / sqrt(L + s²)`, its decay in
    v-prediction, times a Gaussian process in lambda (Matérn 7/2, of this `length`) given the last
    `history` residuals; its mean is integrated. From t = 1 the first call lies inside the first
    step, all of which it corrects: the Gaussian's flow carries the state there.

    Nodes unless given: uniform in the integral over lambda of
    `sum_i L_i sqrt(s/a_i) / (1 + (s/a_i)²)^(decay/2)`, with `a_i = reach sqrt(L_i)`. Order 2. The
    kernel, the correction and the nodes are ours; the analytic start is that of "The Unreasonable
    Effectiveness of Gaussian Score Approximation for Diffusion Models and its Applications".
    """

    length: float = 2.0
    history: int = 4
    reach: float = 3.0
    decay: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("length", 0.0), ("reach", 0.0), ("decay", 0.5), ("history", 0)):
            value = getattr(self, name)
            if not least < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a number above {least:g}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"statistics"})

    def nodes(self, schedule: Schedule, steps: int, statistics: Statistics | None) -> grids.Times:
        """Two spacings are skipped at the start, at whose end the first call lies, one at the end:
        the first step is three spacings long."""
        n = grids.check_steps(steps)
        if n == 1:
            return 1.0, 0.0
        _, _, variance = self._axes(statistics)
        noisy, clean = (-schedule.log_snr(torch.tensor([1.0, 0.0])).double() / 2).tolist()
        high, low = self._range(variance, n, noisy, clean)
        lambda_, clock = self._clock(variance, low, high)
        shares = torch.arange(n - 1, 0, -1, dtype=torch.float64) / (n + 2)
        inner = schedule.time(-2 * _interpolate(clock[-1] * shares, clock, lambda_))
        return grids.given((1.0, *inner.tolist(), 0.0))

    def compile(self, schedule: Schedule, nodes: grids.Times, statistics: Statistics | None) -> Any:
        basis, mean, variance = self._axes(statistics)
        stages = tuple(self._stages(schedule, nodes, mean, variance))
        return Plan(schedule, nodes[0], stages, self.origin, basis)

    def _axes(self, statistics: Statistics | None) -> tuple[Basis | None, Tensor, Tensor]:
        """The axes of the statistics, and mean and variances along them.

        Variances below a hundredth of their mean are raised to it: axes that the data at hand do
        not span may hold variance that was not seen.
        """
        if statistics is None:
            raise ValueError(f"{self.name} needs the data's statistics: ef.Statistics.from_data")
        basis = statistics.axes
        if basis is None:
            raise ValueError(
                f"{self.name} needs the variance along every axis, these statistics are of low "
                'rank: Statistics.from_data(kind="exact") or, for images, kind="cosine"'
            )
        mean = basis.forward(statistics.mean[None].double())[0]
        variance = statistics.variance.double().reshape(basis.shape)
        least = 0.01 * float(variance.mean()) or 1.0  # of a point mass any variance is exact
        return basis, mean, variance.clamp(min=least)

    def _stages(
        self, schedule: Schedule, nodes: grids.Times, mean: Tensor, variance: Tensor
    ) -> Iterator[Stage]:
        ends = Levels.of(schedule, nodes)
        lambda_ = [-value for value in ends.lambda_]
        first = lambda_[0]
        inside = nodes[0] in (0.0, 1.0)  # where a denoiser says nothing, or must not be asked
        if inside:
            first = self._first(variance, lambda_[0], lambda_[1], len(nodes) - 1)
        time = schedule.time(-2 * first).item() if inside else nodes[0]
        now = Levels.of(schedule, (time, *nodes[1:-1]))
        calls = torch.tensor([first, *lambda_[1:-1]], dtype=torch.float64)
        spread = [
            (a**2 * variance + s**2).sqrt() for a, s in zip(now.alpha, now.sigma, strict=True)
        ]

        def row(values: dict[str, Any]) -> dict[str, Any]:
            some = {name: v for name, v in values.items() if bool(torch.as_tensor(v).any())}
            return some if mean.ndim else {name: float(v) for name, v in some.items()}

        for k, time in enumerate(now.times):
            weights = self._weights(variance, calls, k, lambda_[0], lambda_[k + 1])
            slope = now.alpha[k] * variance / spread[k] ** 2
            centre = now.alpha[k] * mean
            residual = {"D": torch.ones_like(mean), "X": -slope, "1": slope * centre - mean}
            end = (ends.alpha[k + 1] ** 2 * variance + ends.sigma[k + 1] ** 2).sqrt()
            state = {name: end * weights[-1] * value for name, value in residual.items()}
            state["X"] = state["X"] + end / spread[k]
            state["1"] = state["1"] + ends.alpha[k + 1] * mean - end / spread[k] * centre
            past = reversed(weights[:-1])
            state |= {f"x{j}": end * weight for j, weight in enumerate(past, 1)}
            kept = [residual, *({f"x{j}": 1.0} for j in range(1, min(k + 1, self.history - 1)))]
            kept = [*kept, *({} for _ in range(self.history))][: self.history - 1]
            query: dict[str, Any] = {"x0": 1.0}
            if inside and not k:
                start = (ends.alpha[0] ** 2 * variance + ends.sigma[0] ** 2).sqrt()
                gain = spread[0] / start
                query = {"x0": gain, "1": centre - gain * ends.alpha[0] * mean}
            yield Stage(time, row(query), tuple(map(row, (state, *kept))), nodes[k + 1])

    def _weights(
        self, variance: Tensor, calls: Tensor, k: int, start: float, end: float
    ) -> list[Tensor]:
        """Of the residuals at the last calls up to k, the oldest first, in w at the end of step k:
        `-∫ E[r | residuals] / sqrt(L + s²) dlambda` over the step."""
        known = calls[max(0, k + 1 - self.history) : k + 1]
        now = float(calls[k])
        pieces = [_panels(now, min(max(end, now - FAR), now + FAR))]
        if k == 0:
            pieces.append(_panels(min(max(start, now - FAR), now + FAR), now))
        lambda_, dlambda = (torch.cat(part) for part in zip(*pieces, strict=True))
        basis = self._interpolant(known, lambda_)
        variance, shape = variance.flatten(), variance.shape
        square = torch.exp(2 * lambda_)[:, None]
        density = dlambda[:, None] * torch.exp(lambda_)[:, None] / (variance + square)
        scale = torch.sqrt(variance * torch.exp(-2 * known)[:, None] + 1)
        return [weight.reshape(shape) for weight in -(basis @ density) * scale]

    def _interpolant(self, known: Tensor, at: Tensor) -> Tensor:
        """(known, at): the weights of values at `known` in the interpolant at `at`.

        On points that are close together the process' mean tends to the polynomial through them.
        """
        span = float((known[-1] - known[0]).abs())
        if span < 0.2 * self.length and len(known) > 1:
            powers = torch.arange(len(known))[:, None]
            values, wanted = ((x - known[-1]) / span for x in (known, at))
            return torch.linalg.solve(values**powers, wanted**powers)
        return torch.linalg.solve(
            matern(known[:, None] - known, self.length), matern(known[:, None] - at, self.length)
        )

    def _first(self, variance: Tensor, start: float, end: float, steps: int) -> float:
        """lambda of the first call: two thirds into the first step, as the clock goes."""
        high, low = self._range(variance, steps, max(start, end), min(start, end))
        lambda_, clock = self._clock(variance, low, high)
        a, b = (clock[-1], clock[0]) if start > end else (clock[0], clock[-1])
        return float(_interpolate((a + 2 * b) / 3, clock, lambda_))

    @staticmethod
    def _range(variance: Tensor, steps: int, high: float, low: float) -> tuple[float, float]:
        """Ends of the clock, finite: they widen with the number of steps."""
        wide = 3 + math.log(steps)
        top = 0.5 * math.log(variance.max()) + wide
        bottom = 0.5 * math.log(variance.mean()) - wide
        if low > -math.inf:
            top = max(top, low + 1)
        return min(high, top), max(low, min(bottom, min(high, top) - 1))

    def _clock(self, variance: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The integral of the nodes' density from `low`, at 2,000 values of lambda."""
        lambda_ = torch.linspace(low, high, 2000, dtype=torch.float64)
        axes = variance.flatten()
        u = lambda_[:, None] - (self.reach * axes.sqrt()).log()
        density = (
            axes / axes.sum() * torch.exp(u / 2) / (1 + torch.exp(2 * u)) ** (self.decay / 2)
        ).sum(1)
        return lambda_, torch.cat(
            [density.new_zeros(1), torch.cumulative_trapezoid(density, lambda_)]
        )


def matern(distance: Tensor, length: float | Tensor) -> Tensor:
    """The Matérn 7/2 covariance of a process of variance 1."""
    a = math.sqrt(7) / length * distance.abs()
    return (1 + a + 0.4 * a**2 + a**3 / 15) * torch.exp(-a)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys), xs increasing, at x."""
    i = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    return ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1])


def _panels(a: float, b: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights from a to b: 8-point rules on panels of up to 3 e-folds."""
    from numpy.polynomial.legendre import leggauss

    x, weights = (torch.from_numpy(part) for part in leggauss(8))
    edges = torch.linspace(a, b, 1 + max(1, math.ceil(abs(b - a) / 3)), dtype=torch.float64)
    half, middle = edges.diff()[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * x).flatten(), (half * weights).flatten()


@dataclass(frozen=True)
class Auto(Solver):
    """With statistics of every axis the first solver, without the second."""

    informed: Solver
    plain: Solver

    def _chosen(self, statistics: Statistics | None) -> Solver:
        return self.plain if statistics is None or statistics.axes is None else self.informed

    def about_mean(self, statistics: Statistics | None) -> bool:
        return self._chosen(statistics).about_mean(statistics)

    def nodes(self, schedule: Schedule, steps: int, statistics: Statistics | None) -> grids.Times:
        return self._chosen(statistics).nodes(schedule, steps, statistics)

    def compile(self, schedule: Schedule, nodes: grids.Times, statistics: Statistics | None) -> Any:
        return self._chosen(statistics).compile(schedule, nodes, statistics)
