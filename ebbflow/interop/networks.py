"""Networks that others trained, as denoisers: which call to write for which convention.

Most conventions are arguments of `ef.Denoiser`; the functions below are the rest.

| the network | the denoiser |
|---|---|
| `net(x, i) -> eps`, i in 0 … T-1 | `Denoiser(net, Betas(betas), "noise", time="step")` |
| the same, int64 only | `Denoiser(whole_steps(net), Betas(betas), "noise", time="step")` |
| `net(x, sigma) -> x_0`, sigma/alpha | `Denoiser(net, VE(0.002, 80.0), time="sigma")` |
| `net(x, log_snr) -> v` | `Denoiser(net, schedule, "v", time="log_snr")` |
| `net(x, t) -> dx/dt`, t from data (0) to noise (1) | `Denoiser(net, Linear(), "velocity")` |
| `net(x, t) -> dx/dt`, t from noise (0) to data (1) | `from_noise(net)` |
| `net(x, sigma, class_labels) -> D(x; sigma)`, EDM's | `edm(net)` |
| its raw F | `Denoiser(net, VE(), "edm", time="quarter_log_sigma", sigma_data=0.5)` |
| `model(y, sigma, **extra) -> x_0`, k-diffusion's | `k_diffusion(model, schedule)` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow.denoiser import Denoiser
from ebbflow.schedules import VE, Linear, Schedule


class _Called(nn.Module):
    """A network called by a rule; its weights are the network's own."""

    def __init__(self, net: Callable[..., Tensor], rule: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net
        self.rule = rule

    def forward(self, x: Tensor, clock: Tensor, **condition: Any) -> Tensor:
        return self.rule(self.net, x, clock, **condition)


def edm(
    net: Callable[..., Tensor],
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    shape: tuple[int, ...] | None = None,
) -> Denoiser:
    """A preconditioned network of EDM, `net(x, sigma, class_labels) -> D(x; sigma)`.

    The condition is `label`: classes (B,) of integers, turned into the one-hot rows that the
    network takes (`net.label_dim` of them), or such rows (B, label_dim) themselves; without it the
    network is called without classes. sigma is (B,). Elucidating the Design Space of
    Diffusion-Based Generative Models.
    """
    return Denoiser(_Called(net, _edm), VE(sigma_min, sigma_max), shape=shape, time="sigma")


def _edm(net: Any, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    if label is not None and label.ndim == 1:
        label = _one_hot(net, label).to(sigma)
    return net(x, sigma, label)


def _one_hot(net: Any, label: Tensor) -> Tensor:
    count = getattr(net, "label_dim", None)
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"label {tuple(label.shape)}: the network states no label_dim; give one-hot rows"
        )
    if not bool(((label >= 0) & (label < count)).all()):
        raise ValueError(f"label {label.tolist()!r:.60}: the network knows 0 … {count - 1}")
    return nn.functional.one_hot(label.long(), count)


def k_diffusion(
    model: Callable[..., Tensor], schedule: Schedule, shape: tuple[int, ...] | None = None
) -> Denoiser:
    """A callable of k-diffusion, `model(y, sigma, **extra) -> denoised`, on any process.

    Its state is `y = x_t / alpha` at noise level sigma/alpha, (B,); on a variance-exploding
    schedule y is x_t. `k_diffusion.external` wraps discrete networks into such callables: their
    process is `Betas(betas)`. extra: passed as the condition.
    """

    def rule(model: Any, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        if isinstance(schedule, VE):
            return model(x, sigma, **extra)
        t = schedule.time(-2 * torch.log(sigma.double()))
        alpha = schedule.alpha(t).to(x).reshape(-1, *(1,) * (x.ndim - 1))
        return model(x / alpha, sigma, **extra)

    return Denoiser(_Called(model, rule), schedule, shape=shape, time="sigma")


def whole_steps(net: Callable[..., Tensor]) -> nn.Module:
    """A network of a discrete chain that takes int64 steps: it is told the nearest one.

    `ef.Denoiser(whole_steps(net), Betas(betas), "noise", time="step")`; steps before the first
    index are told as 0.
    """

    def rule(net: Any, x: Tensor, clock: Tensor, **condition: Any) -> Tensor:
        return net(x, clock.round().long().clamp(min=0), **condition)

    return _Called(net, rule)


def from_noise(net: Callable[..., Tensor], shape: tuple[int, ...] | None = None) -> Denoiser:
    """A flow whose time runs from noise (0) to data (1): `net(x, t) -> dx/dt = x_0 - eps`."""

    def rule(net: Any, x: Tensor, clock: Tensor, **condition: Any) -> Tensor:
        return -net(x, 1 - clock, **condition)

    return Denoiser(_Called(net, rule), Linear(), "velocity", shape)
