"""A lower bound of the log-likelihood from denoising errors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.likelihood.angle import SIGNAL_LEFT, AngleFlow, log_prior, prior_precision

STREAM = 22


def elbo(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    samples: int = 64,
    seed: int = 0,
    first_index: int = 0,
    floor: float = 1e-3,
    end: float = 1.0,
    **condition: Any,
) -> tuple[Tensor, Tensor]:
    """The evidence lower bound in nats of each x0 (B, *shape) and its standard error, (B,) float64.

        log p(x_0) >= - KL(q(x_1 | x_0) || prior) - 1/2 ∫ SNR E|x_0 - D(x_t)|² dlog_snr
                      + E log N(x_0; D(x_floor), (sigma/alpha)²)

    The integral runs over log-SNR from `end` to sigma/alpha = `floor`, in samples/2 equal strata
    with two draws each, from whose differences the standard error is had without bias. It bounds
    the law of the reverse SDE, not of the flow; both are the data's, and the bound is sharp up to
    the floor, where the denoiser is exact. Differentiable; no backward passes of its own.

    Args: as in `log_likelihood`; samples: denoiser calls, even; a quarter more are for the last
        term. Raises ValueError for arguments out of range.
    Variational Diffusion Models, equations 12 to 18.
    """
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 8 or samples % 2:
        raise ValueError(f"samples must be an even integer of at least 8, got {samples!r}")
    denoiser.check_input(x0)
    flow = AngleFlow.of(denoiser, x0, floor, end)
    last = min(flow.last, math.pi / 2 - SIGNAL_LEFT)
    high, low = (-2 * math.log(math.tan(angle)) for angle in (flow.first, last))
    indices = range(first_index, first_index + len(x0))
    d = x0[0].numel()

    def error(log_snr: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Half of `SNR |x_0 - D(x_t)|²` and of `|eps|²` of each sample, (B,)."""
        eps = noise.normal(seed, indices, draw, x0.shape[1:], torch.float64, stream=STREAM)
        eps = eps.to(x0.device)
        t = denoiser.schedule.time(log_snr)
        x_t = denoiser.schedule.add_noise(x0.double(), t, eps).to(flow.dtype)
        gap = (x0.double() - denoiser(x_t, t, **condition)).square().flatten(1).sum(1)
        ratio = torch.exp(log_snr).to(gap.device)
        return 0.5 * ratio * gap, 0.5 * eps.square().flatten(1).sum(1)

    strata = samples // 2
    width = (high - low) / strata
    uniform = noise.normal(seed, indices, 0, (samples,), torch.float64, stream=STREAM + 1)
    places = torch.special.ndtr(uniform)
    terms = []
    for draw in range(samples):
        log_snr = low + width * (draw // 2 + places[:, draw])
        terms.append(error(log_snr, draw)[0] * width)
    pairs = torch.stack(terms).unflatten(0, (strata, 2))
    integral = pairs.mean(1).sum(0)
    variance = ((pairs[:, 0] - pairs[:, 1]).detach() / 2).square().sum(0)

    ends = []
    for draw in range(samples // 4):
        gap, size = error(torch.full((len(x0),), high, dtype=torch.float64), samples + draw)
        ends.append(gap - size + d / 2)  # |eps|² has the mean d and nearly the same value
    closing = torch.stack(ends)
    variance = variance + closing.detach().var(0) / len(ends)
    decoder = closing.mean(0) + d / 2 * (math.log(2 * math.pi) - high)
    value = -_divergence(flow, last, x0, condition) - integral - decoder
    return value, variance.sqrt()


def _divergence(flow: AngleFlow, last: float, x0: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """`KL(N(cos x_0, sin²) || prior)` at the noise end, (B,)."""
    d = x0[0].numel()
    sine = math.sin(last)
    centre = math.cos(last) * x0.double()
    spread = 0.5 * sine**2 * prior_precision(flow, last, len(x0), condition)
    entropy = d / 2 * math.log(2 * math.pi * math.e * sine**2)
    return spread.to(centre.device) - log_prior(flow, centre, condition, last) - entropy
