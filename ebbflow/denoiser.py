"""The denoiser contract: `denoiser(x_t, t, **condition) -> E[x_0 | x_t]`.

Networks predict different things and take different clocks. Both are adapted here, in one table
each, so that no method ever branches on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebbflow.finite import readable
from ebbflow.schedules import Betas, Schedule, TimeLike, along, as_time

if TYPE_CHECKING:
    from ebbflow.statistics import Statistics

Frozen = Callable[..., Tensor]
"""A denoiser at one time: `frozen(x, **condition)`."""

Row = tuple[Tensor, Tensor, Tensor]


def _v(schedule: Schedule, t: Tensor, sigma_data: float | None) -> Row:
    return -schedule.sigma(t), schedule.alpha(t), torch.ones_like(t)


def _velocity(schedule: Schedule, t: Tensor, sigma_data: float | None) -> Row:
    r, s = schedule.alpha_prime(t), schedule.sigma_prime(t)
    # d sigma / dt is infinite at the data end of variance-preserving schedules: divide by it.
    steep = torch.isinf(s)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    return torch.where(steep, zero, r), torch.where(steep, one, s), torch.where(steep, zero, one)


def _edm(schedule: Schedule, t: Tensor, sigma_data: float | None) -> Row:
    assert sigma_data is not None
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    scale = torch.sqrt((alpha * sigma_data) ** 2 + sigma**2)
    return sigma / (sigma_data * scale), -alpha * sigma_data / scale, torch.ones_like(t)


def _constant(r: float, s: float) -> Callable[[Schedule, Tensor, float | None], Row]:
    return lambda schedule, t, sigma_data: (
        torch.full_like(t, r),
        torch.full_like(t, s),
        torch.ones_like(t),
    )


PREDICTIONS: Mapping[str, Callable[[Schedule, Tensor, float | None], Row]] = {
    "x0": _constant(1.0, 0.0),
    "noise": _constant(0.0, 1.0),
    "v": _v,
    "score": lambda schedule, t, _: (
        torch.zeros_like(t),
        torch.full_like(t, -1.0),
        schedule.sigma(t),
    ),
    "velocity": _velocity,
    "edm": _edm,
}
"""THE conversion table: F with `scale F = r x_0 + s eps`; each entry gives (r, s, scale).

Together with `x_t = alpha x_0 + sigma eps`, two rows determine each other (`convert`).
"v" is `alpha eps - sigma x_0` (Progressive Distillation for Fast Sampling of Diffusion Models,
appendix D); "velocity" is `dx_t/dt`; "edm" is the preconditioned network output F of Elucidating
the Design Space of Diffusion-Based Generative Models, equation 7, written for any alpha and sigma.
"""

CLOCKS: Mapping[str, Callable[[Schedule, Tensor], Tensor]] = {
    "t": lambda schedule, t: t,
    "angle": lambda schedule, t: torch.atan2(schedule.sigma(t), schedule.alpha(t)),
    "log_snr": lambda schedule, t: schedule.log_snr(t),
    "sigma": lambda schedule, t: schedule.sigma(t) / schedule.alpha(t),
    "quarter_log_sigma": lambda schedule, t: -schedule.log_snr(t) / 8,
    "step": lambda schedule, t: _step(schedule, t),
}
"""What a network may be told as time. "angle" is bounded and the same for every schedule; "sigma"
is sigma/alpha; "quarter_log_sigma" is EDM's c_noise; "step" the (fractional) index of `Betas`,
between -1 and 0 for times before the first index."""


def _step(schedule: Schedule, t: Tensor) -> Tensor:
    assert isinstance(schedule, Betas)
    position = t * len(schedule.betas) - 1
    nearest = position.round()
    return torch.where((position - nearest).abs() < 1e-6, nearest, position)


def convert(
    source: str, target: str, schedule: Schedule, t: Tensor, sigma_data: float | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b), float64, with `target = a x_t + b source`.

    Raises ValueError where the conversion is 0/0 (no signal, or no noise, at t), naming the
    predictions from which `target` can be had there.
    """
    if source == target:
        return torch.zeros_like(t), torch.ones_like(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    r, s, scale = PREDICTIONS[source](schedule, t, sigma_data)
    r_target, s_target, scale_target = PREDICTIONS[target](schedule, t, sigma_data)
    determinant = (alpha * s - sigma * r) * scale_target
    if readable(determinant) and bool((determinant == 0).any()):
        bad = t[determinant == 0].flatten()[0]
        alpha, sigma = schedule.alpha(bad), schedule.sigma(bad)
        works = []
        for other in PREDICTIONS:
            if other != "edm" or sigma_data is not None:
                r, s, _ = PREDICTIONS[other](schedule, bad, sigma_data)
                solvable = (alpha * s - sigma * r) * scale_target.min() != 0
                works += [other] if other == target or solvable else []
        raise ValueError(
            f"{target!r} cannot be had from a {source!r} prediction at t = {bad.item():g}, where "
            f"alpha = {alpha.item():g} and sigma = {sigma.item():g} (0/0); "
            f"predictions that work there: {', '.join(works)}"
        )
    a = (r_target * s - s_target * r) / determinant
    b = (alpha * s_target - sigma * r_target) * scale / determinant
    return a, b


def input_scale(prediction: str, schedule: Schedule, t: Tensor, sigma_data: float | None) -> Tensor:
    """c_in: EDM's networks see an input of unit variance, the others x_t itself."""
    if prediction != "edm":
        return torch.ones_like(t)
    assert sigma_data is not None
    return torch.rsqrt((schedule.alpha(t) * sigma_data) ** 2 + schedule.sigma(t) ** 2)


class Denoiser(nn.Module):
    """A network or function seen as `E[x_0 | x_t]`.

    Args:
        net: called as `net(x, time, **condition)` with x (B, *shape) and time (B,), float32 or
            wider; returns its prediction in the shape of x.
        schedule: the forward process on which it was trained.
        prediction: what it returns, a key of `PREDICTIONS`.
        shape: of one sample, or None for any.
        statistics: mean and covariance of the law that it describes, or None.
        time: what it is told as time, a key of `CLOCKS`.
        sigma_data: the data's standard deviation; needed by, and only by, prediction "edm".

    Denoisers made from other denoisers (guidance, posteriors) derive from `Wrapper`.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: Schedule,
        prediction: str = "x0",
        shape: tuple[int, ...] | None = None,
        statistics: Statistics | None = None,
        time: str = "t",
        sigma_data: float | None = None,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"net must be callable as net(x, t), got {type(net).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be one of ef.schedules, such as VP(), got {schedule!r}")
        require_known("prediction", prediction, PREDICTIONS)
        require_known("time", time, CLOCKS)
        if (prediction == "edm") != (sigma_data is not None):
            raise ValueError(
                f"prediction {prediction!r} with sigma_data={sigma_data}: 'edm' needs the data's "
                "standard deviation, such as 0.5, and the others take none"
            )
        if sigma_data is not None and not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        if time == "step" and not isinstance(schedule, Betas):
            raise ValueError(f"time='step' needs a Betas schedule, got {type(schedule).__name__}")
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.shape = None if shape is None else tuple(shape)
        self.statistics = statistics
        self.time = time
        self.sigma_data = sigma_data

    def passes(self, t: float) -> int:
        """Passes of the network that one call at time t costs."""
        return 1

    def mean(self, x: Tensor, **condition: Any) -> Tensor | None:
        """The mean of the data under the condition, which is what is predicted of pure noise.

        (B, *shape) or (1, *shape), in x's dtype and on its device; None where it is not known.
        """
        return None if self.statistics is None else self.statistics.means(x, **condition)

    def coefficients(self, t: TimeLike) -> tuple[Tensor, Tensor, Tensor]:
        """(p, q, c_in) in float64 with `x_0 = p x_t + q F`, `F = net(c_in x_t, …)`.

        `1/q²` weights the error of x_0 as the network's own: equation 8 of Elucidating the Design
        Space of Diffusion-Based Generative Models.
        """
        t = as_time(t)
        p, q = convert(self.prediction, "x0", self.schedule, t, self.sigma_data)
        return p, q, input_scale(self.prediction, self.schedule, t, self.sigma_data)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is a batch of samples of this denoiser."""
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"state of shape {tuple(x.shape)}: this denoiser takes (batch, *{self.shape})"
            )

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        """The denoiser at one time, or one a sample: a function `frozen(x, **condition)`.

        Everything that depends on time alone is computed here, once, in float64; `x` gives the
        batch size, the dtype and the device only.
        """
        if not isinstance(t, Tensor):
            return self.prepare((float(t),), x, target)[0]
        self.check_input(x)
        t = as_time(t)
        along(t, x)
        weights = convert(self.prediction, target, self.schedule, t, self.sigma_data)
        values = (*weights, input_scale(self.prediction, self.schedule, t, self.sigma_data))
        a, b, scale = (along(value, x).to(x.device, x.dtype) for value in values)
        call, clock_dtype = self._adapter(x)
        clock = CLOCKS[self.time](self.schedule, t).expand(len(x)).to(x.device, clock_dtype)
        return partial(call, (a, b, scale), clock)

    def prepare(self, times: tuple[float, ...], x: Tensor, target: str = "x0") -> list[Frozen]:
        """`at` for many times, ahead of a loop."""
        self.check_input(x)
        call, clock_dtype = self._adapter(x)
        what = (self.prediction, target, self.schedule, times, self.sigma_data, self.time)
        key = (*what, x.dtype, clock_dtype, len(x), x.device)
        rows = (_numbers if plain() else _numbers.__wrapped__)(*key)
        if plain() and rows[0][1]._version:  # a network has written on its clocks
            _numbers.cache_clear()
            rows = _numbers(*key)
        return [partial(call, *row) for row in rows]

    def _adapter(self, x: Tensor) -> tuple[Callable[..., Tensor], torch.dtype]:
        """`call((a, b, scale), clock, x, **condition)`, and the dtype of its clock."""
        net, dtype = self.net, x.dtype
        own = _dtype(net) or dtype
        cast = own != dtype

        def call(weights: tuple[Any, Any, Any], clock: Tensor, x: Tensor, /, **condition: Any):
            a, b, scale = weights
            inputs = x if scale is None else x * scale
            if cast:
                inputs = inputs.to(own)
            output = net(inputs, clock, **condition)
            if output.shape != x.shape:
                raise ValueError(
                    f"the network returned shape {tuple(output.shape)} for a state of shape "
                    f"{tuple(x.shape)}: they must be equal"
                )
            if output.dtype is not dtype:
                output = output.to(dtype)
            output = output if b is None else output * b
            if a is None:
                return output
            return output + a * x if isinstance(a, Tensor) else torch.add(output, x, alpha=a)

        return call, torch.promote_types(own, torch.float32)

    def forward(self, x: Tensor, t: TimeLike, **condition: Any) -> Tensor:
        """`E[x_0 | x_t]`, shape (B, *shape), at times () or (B,)."""
        return self.at(t, x)(x, **condition)

    def noise(self, x: Tensor, t: TimeLike, **condition: Any) -> Tensor:
        """`E[eps | x_t]`."""
        return self.at(t, x, "noise")(x, **condition)

    def score(self, x: Tensor, t: TimeLike, **condition: Any) -> Tensor:
        """`grad log p_t(x_t) = -E[eps | x_t] / sigma`."""
        return self.at(t, x, "score")(x, **condition)

    def velocity(self, x: Tensor, t: TimeLike, **condition: Any) -> Tensor:
        """`dx_t/dt` of the probability-flow ODE, `alpha' E[x_0 | x_t] + sigma' E[eps | x_t]`."""
        return self.at(t, x, "velocity")(x, **condition)

    def v(self, x: Tensor, t: TimeLike, **condition: Any) -> Tensor:
        """`alpha E[eps | x_t] - sigma E[x_0 | x_t]`."""
        return self.at(t, x, "v")(x, **condition)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; `ef.load(folder)` reads them back."""
        from ebbflow.storage import save

        save(self, folder)


def require_known(what: str, value: str, known: Mapping[str, Any]) -> None:
    """Raise ValueError naming the nearest known value unless `value` is one."""
    if not isinstance(value, str) or value not in known:
        near = get_close_matches(str(value), list(known), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {what} {value!r}; {hint}known: {', '.join(known)}")


def _dtype(net: Any) -> torch.dtype | None:
    if not isinstance(net, nn.Module):
        return None
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), None)


def plain() -> bool:
    """Whether a tensor made now is one to keep: inside a transform of torch.func it would belong to
    the transform, inside torch.compile to the graph."""
    level = torch._C._functorch.maybe_current_level()  # pyright: ignore
    return level is None and not torch.compiler.is_compiling()


@torch.inference_mode(False)
def factor(value: float, dtype: torch.dtype) -> Tensor | float | None:
    """`value` in the form by which torch multiplies fastest, or None for one.

    A tensor without dimensions takes half the time that a Python number takes, to the same bits.
    """
    if value == 1.0:
        return None
    return torch.tensor(value, dtype=dtype, device="cpu") if plain() else value


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _numbers(
    source: str,
    target: str,
    schedule: Schedule,
    times: tuple[float, ...],
    sigma_data: float | None,
    clock: str,
    dtype: torch.dtype,
    clock_dtype: torch.dtype,
    batch: int,
    device: torch.device,
) -> list[tuple[tuple[Any, Any, Any], Tensor]]:
    """(a, b, input scale), None where there is nothing to do, and the clock at each time."""
    t = as_time(torch.tensor(times, dtype=torch.float64))
    a, b = convert(source, target, schedule, t, sigma_data)
    scale = input_scale(source, schedule, t, sigma_data)
    clocks = CLOCKS[clock](schedule, t).to(device, clock_dtype).unsqueeze(1).expand(-1, batch)
    rows = zip(a.tolist(), b.tolist(), scale.tolist(), clocks.unbind(), strict=True)
    return [((a or None, factor(b, dtype), factor(c, dtype)), told) for a, b, c, told in rows]


class Wrapper(Denoiser):
    """Base of denoisers made from another one: override `at`, and `passes` where it costs more.

    The wrapped law is another one, so the statistics are dropped unless the subclass sets them.
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner, inner.schedule, shape=inner.shape)

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        raise NotImplementedError(f"{type(self).__name__} must define at(t, x, target)")

    def prepare(self, times: tuple[float, ...], x: Tensor, target: str = "x0") -> list[Frozen]:
        return [self.at(t, x, target) for t in times]
