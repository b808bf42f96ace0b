"""A law less its mean, in which plans may be written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ebbflow.denoiser import Denoiser, Frozen, Wrapper, convert
from ebbflow.schedules import Schedule, TimeLike, along, as_time


class Centred(Wrapper):
    """The denoiser of `x_0 - m`: `D'(x, t) = D(x + alpha(t) m, t) - m`.

    m is the mean that the inner denoiser knows of the data under each sample's condition.
    """

    def passes(self, t: float) -> int:
        return self.net.passes(t)  # pyright: ignore

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        inner: Any = self.net
        frozen = inner.at(t, x, target)
        t = as_time(t)
        alpha = self.schedule.alpha(t)
        a, b = convert("x0", target, self.schedule, t)  # target = a x_t + b x_0
        shift, gone = (along(c, x).to(x) for c in (alpha, a * alpha + b))

        def centred(x: Tensor, **condition: Any) -> Tensor:
            mean = require_mean(inner, x, condition)
            return frozen(x + shift * mean, **condition) - gone * mean

        return centred


def centre(
    denoiser: Denoiser, start: tuple[Tensor, ...], t: float, condition: Mapping[str, Any]
) -> tuple[Centred, tuple[Tensor, ...], Tensor]:
    """The denoiser and states at time t about the mean, and the mean."""
    mean = require_mean(denoiser, start[0], condition)
    shift = denoiser.schedule.alpha(t).item() * mean
    return Centred(denoiser), tuple(x - shift for x in start), mean


def restore(x: Tensor | None, mean: Tensor | None, schedule: Schedule, t: float | None) -> Any:
    """The state at time t that is x about the mean; x itself if there is none of them."""
    if x is None or mean is None or t is None:
        return x
    return x + schedule.alpha(t).item() * mean


def require_mean(denoiser: Denoiser, x: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """The mean of the data of each sample; raises ValueError where the denoiser knows none."""
    mean = denoiser.mean(x, **condition)
    if mean is None:
        raise ValueError(
            "the plan is centred on the mean of the data under each condition, which this "
            "denoiser does not know: give it statistics=ef.Statistics.from_data(samples, labels)"
        )
    return mean
