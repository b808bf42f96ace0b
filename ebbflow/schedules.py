"""Schedules: how a process carries data forward into noise, `x_t = alpha(t) x_0 + sigma(t) eps`.

Time runs over [0, 1] for every schedule: 0 is data, 1 is noise. A schedule is complete: it gives
alpha, sigma, their derivatives, the log signal-to-noise ratio `log_snr = log(alpha² / sigma²)` and
its inverse. All of it is computed in float64; infinite log-SNR at the ends is allowed and exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ebbflow.files import exact_keys
from ebbflow.finite import readable

TimeLike = float | Tensor


def as_time(t: TimeLike) -> Tensor:
    """`t` as a float64 tensor; raises ValueError for values outside [0, 1]."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if readable(t) and not bool(((t >= 0) & (t <= 1)).all()):
        bad = t.detach()[~((t >= 0) & (t <= 1))].flatten()[0].item()
        raise ValueError(f"time {bad:g} lies outside [0, 1]; 0 is data and 1 is noise")
    return t


def along(values: Tensor, x: Tensor) -> Tensor:
    """Reshape `values` of shape () or (B,) so that they broadcast along the first axis of `x`.

    Raises ValueError when the shape is neither () nor (B,), B the length of x's first axis.
    """
    if values.ndim == 0:
        return values
    if values.ndim != 1 or x.ndim == 0 or len(values) != len(x):
        raise ValueError(
            f"times of shape {tuple(values.shape)} do not fit a state of shape {tuple(x.shape)}: "
            "give one time, shape (), or one a sample, shape (B,)"
        )
    return values.reshape(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Schedule:
    """A forward process `x_t = alpha(t) x_0 + sigma(t) eps`.

    A subclass gives `alpha`, `sigma` and `log_snr` for float64 times of any shape, and `_invert`.
    Derivatives follow by automatic differentiation.
    """

    def alpha(self, t: TimeLike) -> Tensor:
        """Signal level, float64, in the shape of `t`."""
        raise NotImplementedError

    def sigma(self, t: TimeLike) -> Tensor:
        """Noise level, float64, in the shape of `t`."""
        raise NotImplementedError

    def log_snr(self, t: TimeLike) -> Tensor:
        """`log(alpha² / sigma²)`, decreasing in t; ±inf where sigma or alpha is zero."""
        raise NotImplementedError

    def _invert(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError

    def time(self, log_snr: TimeLike) -> Tensor:
        """The time at which the process has this log-SNR.

        Raises ValueError when no time in [0, 1] has it.
        """
        value = torch.as_tensor(log_snr, dtype=torch.float64)
        t = self._invert(value)
        slack = 1e-9  # round-off of the two transcendental maps at the ends
        if readable(t) and not bool(((t >= -slack) & (t <= 1 + slack)).all()):
            low, high = self.log_snr(1.0).item(), self.log_snr(0.0).item()
            bad = value[~((t >= -slack) & (t <= 1 + slack))].flatten()[0].item()
            raise ValueError(
                f"log-SNR {bad:g} is not reached: {type(self).__name__} spans {low:g} to {high:g}"
            )
        return torch.where(t > 1, torch.ones_like(t), torch.where(t < 0, torch.zeros_like(t), t))

    def alpha_prime(self, t: TimeLike) -> Tensor:
        """d alpha / dt."""
        return _derivative(self.alpha, as_time(t))

    def sigma_prime(self, t: TimeLike) -> Tensor:
        """d sigma / dt; infinite at t = 0 for variance-preserving schedules."""
        return _derivative(self.sigma, as_time(t))

    def add_noise(self, x0: Tensor, t: TimeLike, noise: Tensor) -> Tensor:
        """Sample of `x_t` given `x0`: `alpha(t) x0 + sigma(t) noise`.

        x0, noise: (B, *shape), equal shapes; t: () or (B,). Returns x0's dtype.
        """
        if x0.shape != noise.shape:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)}, noise {tuple(noise.shape)}: they must be equal"
            )
        t = as_time(t).to(x0.device)
        alpha = along(self.alpha(t), x0).to(x0.dtype)
        sigma = along(self.sigma(t), x0).to(x0.dtype)
        return alpha * x0 + sigma * noise

    def config(self) -> dict[str, Any]:
        """JSON values from which `from_config` makes an equal schedule."""
        return {"name": type(self).__name__, **asdict(self)}


def _derivative(function: Any, t: Tensor) -> Tensor:
    t = t.contiguous()  # dual numbers need memory of their own, which an expanded time lacks
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


def _entry(table: Tensor, index: Tensor) -> Tensor:
    return table[index[None]][0]  # an index without dimensions would be read, and vmap forbids it


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving diffusion with a linear noise rate, `beta(t)` from beta_min to beta_max.

    `alpha = exp(-B/2)`, `sigma² = 1 - alpha²`, `B(t) = beta_min t + (beta_max - beta_min) t² / 2`.
    Score-Based Generative Modeling through Stochastic Differential Equations, equation 32.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _require(
            0 < self.beta_min <= self.beta_max < math.inf,
            f"beta_min {self.beta_min}, beta_max {self.beta_max}: need 0 < beta_min <= beta_max",
        )

    def _integral(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: TimeLike) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def log_snr(self, t: TimeLike) -> Tensor:
        return -torch.log(torch.expm1(self._integral(t)))

    def _invert(self, log_snr: Tensor) -> Tensor:
        integral = torch.logaddexp(torch.zeros_like(log_snr), -log_snr)
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))


@dataclass(frozen=True)
class Cosine(Schedule):
    """`alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`: uniform in angle, exact at both ends."""

    def alpha(self, t: TimeLike) -> Tensor:
        # The sine of the complement, so that alpha(1) is exactly zero.
        return torch.sin(0.5 * math.pi * (1 - as_time(t)))

    def sigma(self, t: TimeLike) -> Tensor:
        return torch.sin(0.5 * math.pi * as_time(t))

    def log_snr(self, t: TimeLike) -> Tensor:
        return 2 * torch.log(self.alpha(t) / self.sigma(t))

    def _invert(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-0.5 * log_snr)) * (2 / math.pi)


@dataclass(frozen=True)
class VE(Schedule):
    """Variance-exploding diffusion: alpha = 1, `sigma = sigma_min (sigma_max / sigma_min)^t`.

    Score-Based Generative Modeling through Stochastic Differential Equations, equation 30.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _require(
            0 < self.sigma_min < self.sigma_max < math.inf,
            f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max}: "
            "need 0 < sigma_min < sigma_max",
        )

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: TimeLike) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** as_time(t)

    def log_snr(self, t: TimeLike) -> Tensor:
        return -2 * torch.log(self.sigma(t))

    def _invert(self, log_snr: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (-0.5 * log_snr - low) / (high - low)


@dataclass(frozen=True)
class Linear(Schedule):
    """The straight path of rectified flow: `alpha = 1 - t`, `sigma = t`.

    Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, equation 1.
    """

    def alpha(self, t: TimeLike) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: TimeLike) -> Tensor:
        return as_time(t).clone()

    def log_snr(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        return 2 * (torch.log1p(-t) - torch.log(t))

    def _invert(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)


@dataclass(frozen=True)
class Betas(Schedule):
    """A discrete chain `x_i = sqrt(1 - betas[i]) x_{i-1} + sqrt(betas[i]) eps`, i = 0 .. T-1.

    Index i lies at t = (i + 1) / T, alpha(0) = 1, and log-SNR is linear in between. Towards an
    infinite end it follows the limit of the continuous process: `sigma²/alpha²` is linear in t
    before index 0, and `alpha/sigma` linear before a final index of zero signal (beta = 1).
    Denoising Diffusion Probabilistic Models, equations 2 and 4.
    """

    betas: tuple[float, ...]

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        values = tuple(float(b) for b in betas)
        _require(len(values) > 0, "betas is empty: give at least one value")
        for i, beta in enumerate(values):
            last = 0 < i == len(values) - 1
            _require(
                0 < beta < 1 or (last and beta == 1),
                f"betas[{i}] = {beta}: every beta lies in (0, 1), the last of several may be 1",
            )
        object.__setattr__(self, "betas", values)
        keep = torch.log1p(-torch.tensor(values, dtype=torch.float64))
        log_alpha_bar = torch.cumsum(keep, 0)
        knots = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        object.__setattr__(self, "_knots", knots)

    @property
    def _table(self) -> Tensor:
        return self.__dict__["_knots"]

    def _pieces(self, t: TimeLike) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(before index 0?, falling to zero signal?, sigma²/alpha² there, alpha/sigma there,
        log-SNR elsewhere); values outside their own piece are finite and unused."""
        t = as_time(t)
        knots = self._table.to(t.device)
        steps = len(knots)
        position = t * steps  # the knots lie at positions 1 .. T
        starts = position < 1 if steps > 1 else torch.ones_like(t, dtype=torch.bool)
        left = position.detach().floor().clamp(1, max(steps - 1, 1)).long()
        low, high = _entry(knots, left - 1), _entry(knots, left.clamp(max=steps - 1))
        falls = torch.isinf(high) & ~starts
        share = position - left
        noise_to_signal = torch.exp(-knots[0]) * position
        signal_to_noise = torch.exp(0.5 * low) * (1 - torch.where(falls, share, 0 * share))
        inside = torch.lerp(low, torch.where(torch.isinf(high), low, high), share)
        return starts, falls, noise_to_signal, signal_to_noise, inside

    def log_snr(self, t: TimeLike) -> Tensor:
        starts, falls, noise, signal, inside = self._pieces(t)
        return torch.where(
            starts, -torch.log(noise), torch.where(falls, 2 * torch.log(signal), inside)
        )

    def alpha(self, t: TimeLike) -> Tensor:
        starts, falls, noise, signal, inside = self._pieces(t)
        middle = torch.sqrt(torch.sigmoid(inside))
        return torch.where(
            starts,
            torch.rsqrt(1 + noise),
            torch.where(falls, signal * torch.rsqrt(1 + signal**2), middle),
        )

    def sigma(self, t: TimeLike) -> Tensor:
        starts, falls, noise, signal, inside = self._pieces(t)
        middle = torch.sqrt(torch.sigmoid(-inside))
        return torch.where(
            starts,
            torch.sqrt(noise / (1 + noise)),
            torch.where(falls, torch.rsqrt(1 + signal**2), middle),
        )

    def _invert(self, log_snr: Tensor) -> Tensor:
        knots = self._table.to(log_snr.device)
        steps = len(knots)
        first = torch.exp(knots[0] - log_snr)
        if steps == 1:
            return first
        right = torch.searchsorted(-knots, -log_snr.contiguous()).clamp(1, steps - 1)
        low, high = _entry(knots, right - 1), _entry(knots, right)
        inside = (log_snr - low) / (torch.where(torch.isinf(high), low - 1, high) - low)
        falling = -torch.expm1(0.5 * (log_snr - low))
        share = torch.where(torch.isinf(high), falling, inside)
        return torch.where(log_snr > knots[0], first, right + share) / steps


def known() -> dict[str, type[Schedule]]:
    """Every schedule that a configuration file can name."""
    return {kind.__name__: kind for kind in (VP, Cosine, VE, Linear, Betas)}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule that `Schedule.config` described.

    Raises ValueError for an unknown name or key, naming the nearest one.
    """
    kinds = known()
    name = config.get("name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"unknown schedule {config!r:.80}; known: {', '.join(kinds)}")
    values = {key: value for key, value in config.items() if key != "name"}
    exact_keys(values, [f.name for f in fields(kinds[name])], f"schedule {name}", optional=True)
    try:
        return kinds[name](**values)
    except TypeError as error:
        raise ValueError(f"schedule {name}: {error}") from error
