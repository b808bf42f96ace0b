"""Mean-reverting diffusion, between an image and a degraded one: an ordinary process in disguise.

    dx = theta_t (mean - x) dt + scale sqrt(2 theta_t) dW
    x_t = mean + (x_0 - mean) alpha_t + scale sqrt(1 - alpha_t²) eps,   alpha_t = exp(-∫ theta)

so `y = (x - mean) / scale` is the process `y_t = alpha y_0 + sqrt(1 - alpha²) eps` of the data
`y_0 = (x_0 - mean) / scale`, variance-preserving, on which every solver runs as it is:

    denoiser = mean_reverting(net, ef.schedules.Betas(cosine_betas()), scale=50 / 255)
    restored = degraded + scale * ef.sample(denoiser, degraded.shape, mean=degraded, steps=10)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ebbflow.denoiser import Denoiser
from ebbflow.schedules import Schedule

# What a network says of x, in terms of y: (prediction - shift · mean) · scale^power.
_POWERS = {"x0": -1, "noise": 0, "v": -1, "velocity": -1, "score": 1}


class _Residual(nn.Module):
    def __init__(self, net: Callable[..., Tensor], scale: float, prediction: str) -> None:
        super().__init__()
        self.net, self.scale, self.prediction = net, scale, prediction

    def forward(self, y: Tensor, clock: Tensor, mean: Tensor, **condition: Any) -> Tensor:
        if mean.shape != y.shape:
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}, the state {tuple(y.shape)}: give one mean a "
                "sample, mean=degraded"
            )
        mean = mean.to(y.device, y.dtype)
        output = self.net(mean + self.scale * y, clock, mean=mean, **condition)
        output = output - mean if self.prediction == "x0" else output
        return output * self.scale ** _POWERS[self.prediction]


def mean_reverting(
    net: Callable[..., Tensor],
    schedule: Schedule,
    scale: float,
    prediction: str = "noise",
    time: str = "t",
) -> Denoiser:
    """A denoiser of `y = (x - mean)/scale` from a network that sees x_t and the mean.

    Args:
        net: called as `net(x, clock, mean=mean, **condition)`, x and mean of shape (B, *shape).
        schedule: of y; variance-preserving, with alpha_t as above.
        scale: the stationary deviation of x around the mean, positive.
        prediction: "noise", "x0" (of x itself), "score" (of x), "velocity" (dx/dt), or "v", which
            is `scale alpha eps - sqrt(1 - alpha²) (x_0 - mean)`.
        time: the network's clock, see `ef.Denoiser`.

    Its calls need `mean=`, one a sample. Raises ValueError for a scale that is not positive.
    MRS: A Fast Sampler for Mean Reverting Diffusion based on ODE and SDE Solvers, equation 4 and
    its solvers, which on y are those of the DPM-Solver++ family.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if prediction not in _POWERS:
        raise ValueError(f"prediction {prediction!r}: a mean-reverting network has {[*_POWERS]}")
    return Denoiser(_Residual(net, float(scale), prediction), schedule, prediction, time=time)


def cosine_betas(steps: int = 100, end: float = 0.005, offset: float = 0.008) -> tuple[float, ...]:
    """Betas of a chain whose rates theta_i follow the cosine and whose last alpha is `end`.

    `theta_i = 1 - c_i / c_0`, `c_i = cos²(pi/2 (i/n + offset) / (1 + offset))`, scaled so that
    `exp(-sum theta) = end`; `beta_i = 1 - exp(-2 theta_i)`.
    Image Restoration with Mean-Reverting Stochastic Differential Equations.
    """
    if steps < 1 or not 0 < end < 1:
        raise ValueError(f"steps {steps} must be at least 1 and end {end} lie in (0, 1)")
    n = steps + 2
    c = [math.cos(math.pi / 2 * (i / n + offset) / (1 + offset)) ** 2 for i in range(n + 1)]
    theta = [1 - value / c[0] for value in c[2:-1]]
    unit = -math.log(end) / sum(theta)
    return tuple(-math.expm1(-2 * unit * rate) for rate in theta)
