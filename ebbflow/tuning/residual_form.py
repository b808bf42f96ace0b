"""Any deterministic plan written in residuals: there its times and coefficients may move.

Along each axis of mean m and variance L, with `S² = alpha² L + sigma²`, `s = sigma/alpha`,

    w_k = (X_k - alpha_k m) / S_k          rho_k = D_k - m - alpha_k L / S_k² (X_k - alpha_k m)
    w_k = g_k w(X_0) + sum_{j<k} C_kj rho_j + kappa_k

for the queries X_0 … X_{n-1} and the last state X_n. The flow of the Gaussian N(m, L) is
`w = constant`, so g is near 1, kappa near 0, and C carries the rest; all three have no unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ebbflow.bases import Basis
from ebbflow.plan import Plan, Row, Stage
from ebbflow.schedules import Betas, Schedule
from ebbflow.tuning.quadrature import FAR, quadrature

TIE = 1e-9  # times closer than this are one time
NONE = 1e-12  # a fall of log s that is none


@dataclass(frozen=True)
class Axes:
    """Coordinates with a mean and a positive variance each, all of the basis' shape, float64."""

    basis: Basis
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Parameters:
    """What is learned; float64 leaves.

    top: log s of the first call; gaps (n - 1,): logarithms of the falls of log s from call to
    call; gain (n + 1,): added to g; matrix (2, n + 1, n): corrections of C.
    """

    top: Tensor
    gaps: Tensor
    gain: Tensor
    matrix: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def copy(self) -> Parameters:
        return Parameters(**{name: v.detach().clone() for name, v in self.tensors().items()})


@dataclass(frozen=True)
class ResidualForm:
    """A family of plans around one, `plan(parameters)`.

    The coefficients C are those of the first plan, plus what the quadrature of a Gaussian-process
    model of rho changes when times move, plus the learned matrix.
    """

    schedule: Schedule
    axes: Axes
    start: float
    end: float
    gain: Tensor
    shift: Tensor
    offset: Tensor
    first: Parameters
    high: float
    low: float
    centred: bool = False

    @staticmethod
    def of(plan: Plan, axes: Axes) -> ResidualForm:
        """The family around a plan.

        Raises ValueError for a plan that draws noise, runs towards noise or calls back in time.
        """
        times = [stage.time for stage in plan.stages]
        if plan.stochastic:
            raise ValueError(f"{_name(plan)} draws noise: tune a deterministic solver")
        if any(b > a for a, b in pairwise(times)) or plan.times[-1] > times[0]:
            raise ValueError(f"{_name(plan)} calls back towards noise: tune another solver")
        schedule, L, m = plan.schedule, axes.variance, axes.mean
        n = plan.nfe
        high, low = limits(schedule, L)
        high = min(high, float(_levels(schedule, [plan.start])[0]))
        lambda_ = _levels(schedule, times).clamp(max=high)
        low = min(low, float(lambda_[-1]))
        rows = plan.dense()
        shape = L.shape

        def per_axis(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[: x.ndim - (plan.basis is not None)], *shape)

        if plan.basis is not None:
            a = per_axis(torch.cat([rows.a, rows.node_a[-1:]]))
            B = per_axis(torch.cat([rows.B, rows.node_B[-1:]]))
            c = per_axis(torch.cat([rows.constant, rows.node_constant[-1:]]))
        else:
            ones = torch.ones_like(L)
            a, B, c = (
                torch.cat([x, y[-1:]])[(...,) + (None,) * L.ndim] * ones
                for x, y in (
                    (rows.a, rows.node_a),
                    (rows.B, rows.node_B),
                    (rows.constant, rows.node_constant),
                )
            )
        own = torch.tensor([*times, plan.times[-1]], dtype=torch.float64)
        alpha, sigma = schedule.alpha(own), schedule.sigma(own)
        alpha, sigma = (x[(...,) + (None,) * L.ndim] for x in (alpha, sigma))
        S = (alpha**2 * L + sigma**2).sqrt()
        alpha_start = schedule.alpha(plan.start)
        S_start = (alpha_start**2 * L + schedule.sigma(plan.start) ** 2).sqrt()
        slope = alpha * L / S
        gain, shift, C = [], [], torch.zeros(n + 1, n, *shape, dtype=torch.float64)
        for k in range(n + 1):
            g, s = a[k] * S_start, a[k] * alpha_start * m + c[k] - alpha[k] * m
            row = B[k].clone()
            for j in range(k):
                pull = B[k, j] * slope[j]
                g = g + pull * gain[j]
                s = s + B[k, j] * m + pull * shift[j]
                row = row + pull * C[j]
            gain.append(g / S[k])
            shift.append(s / S[k])
            C[k] = row / S[k]
        first = Parameters(
            lambda_[0],
            torch.log((-torch.diff(lambda_)).clamp(min=NONE)),
            torch.zeros(n + 1, dtype=torch.float64),
            torch.zeros(2, n + 1, n, dtype=torch.float64),
        )
        form = ResidualForm(
            schedule,
            axes,
            plan.start,
            plan.times[-1],
            torch.stack(gain),
            torch.stack(shift),
            C,
            first,
            high,
            low,
            plan.centred,
        )
        return replace(form, offset=C - form._quadrature(form.levels(first)))

    @property
    def nfe(self) -> int:
        return len(self.first.gaps) + 1

    @property
    def kinds(self) -> int:
        """How many of the two `features` differ: where all axes are alike, one is enough."""
        return 1 if self.axes.variance.ndim == 0 else 2

    def levels(self, parameters: Parameters) -> Tensor:
        """(n,): log s of the calls, not increasing, where the model may be asked."""
        falls = torch.cumsum(torch.cat([torch.zeros(1).double(), parameters.gaps.exp()]), 0)
        return (parameters.top - falls).clamp(self.low, self.high)

    def times(self, parameters: Parameters) -> Tensor:
        """(n,): of the calls."""
        return self.schedule.time(-2 * self.levels(parameters))

    def features(self, lambda_: Tensor) -> Tensor:
        """(2, n, *axes): what the learned matrix multiplies, for calls at log s."""
        L = self.axes.variance
        total = L + torch.exp(2 * lambda_)[(...,) + (None,) * L.ndim]
        return torch.stack([total.rsqrt(), L * total**-1.5])

    def gains(self, parameters: Parameters) -> Tensor:
        """g (n + 1, *axes)."""
        return self.gain + parameters.gain[(...,) + (None,) * self.axes.variance.ndim]

    def coefficients(self, parameters: Parameters) -> Tensor:
        """C (n + 1, n, *axes), strictly lower triangular in its first two axes."""
        lambda_ = self.levels(parameters)
        weights = torch.tril(parameters.matrix, -1)[(...,) + (None,) * self.axes.variance.ndim]
        learned = (weights * self.features(lambda_)[:, None]).sum(0)
        return self.offset + self._quadrature(lambda_) + learned

    def _quadrature(self, lambda_: Tensor) -> Tensor:
        L = self.axes.variance
        ends = _levels(self.schedule, [self.start, self.end])
        C = quadrature(lambda_, ends, L.flatten())
        return C.reshape(*C.shape[:2], *L.shape)

    def plan(self, parameters: Parameters) -> Plan:
        """The plan at these parameters; where all axes are alike its coefficients are numbers."""
        stages = tuple(self._stages(parameters))
        if self.axes.basis.shape:
            return Plan(self.schedule, self.start, stages, {}, self.axes.basis, self.centred)

        def numbers(row: Row) -> Row:
            return {name: float(value) for name, value in row.items() if bool(value)}

        plain = (
            Stage(stage.time, numbers(stage.query), tuple(map(numbers, stage.update)), stage.node)
            for stage in stages
        )
        return Plan(self.schedule, self.start, tuple(plain), centred=self.centred)

    def _stages(self, parameters: Parameters) -> Iterator[Stage]:
        L, m, n = self.axes.variance, self.axes.mean, self.nfe
        times = self.times(parameters)
        C = self.coefficients(parameters)
        all_times = torch.cat([times, times.new_tensor([self.end])])
        alpha, sigma = (
            f(all_times)[(...,) + (None,) * L.ndim]
            for f in (self.schedule.alpha, self.schedule.sigma)
        )
        S = (alpha**2 * L + sigma**2).sqrt()
        slope = alpha * L / S**2
        alpha_start = self.schedule.alpha(self.start)
        S_start = (alpha_start**2 * L + self.schedule.sigma(self.start) ** 2).sqrt()
        gains = self.gains(parameters)
        gain = S[0] / S_start * gains[0]
        query: dict[str, Any] = {
            "x0": gain,
            "1": alpha[0] * m + S[0] * self.shift[0] - gain * alpha_start * m,
        }
        numbers = times.tolist()
        for k in range(n):
            ratio = gains[k + 1] / gains[k]
            weights = S[k + 1] * (C[k + 1] - ratio * C[k])
            on_x = S[k + 1] / S[k] * ratio
            constant = S[k + 1] * (self.shift[k + 1] - ratio * self.shift[k])
            constant = constant + alpha[k + 1] * m - on_x * alpha[k] * m
            residual = {
                "D": torch.ones_like(L),
                "X": -slope[k],
                "1": (slope[k] * alpha[k] - 1) * m,
            }
            state = {name: weights[k] * value for name, value in residual.items()}
            state["X"] = state["X"] + on_x
            state["1"] = state["1"] + constant
            state |= {f"x{j + 1}": weights[j] for j in range(k)}
            last = k == n - 1
            kept: list[Row] = [{f"x{j + 1}": 1.0} for j in range(k)] if not last else []
            kept = [*kept, *([residual] if not last else [])]
            kept = [*kept, *({} for _ in range(n - 1 - len(kept)))]
            # A second call at one time belongs to the same step: no node lies in between.
            inner = not last and self.end + TIE < numbers[k + 1] < numbers[k] - TIE
            node = self.end if last else numbers[k + 1] if inner else None
            yield Stage(numbers[k], query, (state, *kept), node)
            query = {"x0": 1.0}


def limits(schedule: Schedule, variance: Tensor) -> tuple[float, float]:
    """The highest and the lowest log s at which a model may be asked."""
    first = 1 / len(schedule.betas) if isinstance(schedule, Betas) else 0.0
    top, bottom = _levels(schedule, [1.0, first]).tolist()
    high = 0.5 * math.log(float(variance.max())) + 0.5 * FAR
    low = 0.5 * math.log(float(variance.mean())) - 0.75 * FAR
    return min(top, high), max(bottom, low)


def _levels(schedule: Schedule, times: list[float]) -> Tensor:
    return -schedule.log_snr(torch.tensor(times, dtype=torch.float64)) / 2


def _name(plan: Plan) -> str:
    return str(plan.origin.get("solver", "the plan"))
