"""From levels to densities: noise within a level, and bits a dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.likelihood.bound import elbo

STREAM = 24
LEVELS = 256


def place(pixels: Tensor, u: Tensor) -> Tensor:
    """Level k of a pixel and u in (0, 1) as a value: `(k + u - 1/2) / 127.5 - 1`, float64.

    Levels fill [-1 - 1/255, 1 + 1/255] without gaps, k in the middle of its own, so that rounding
    to the nearest level (`ebbflow.images.to_uint8`) undoes it.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}")
    return (pixels.double() + u - 0.5) * (2 / (LEVELS - 1)) - 1


def dequantise(pixels: Tensor, seed: int = 0, first_index: int = 0) -> Tensor:
    """Pixels (B, *shape) uint8 with uniform noise within each level, float64.

    `log P(k) >= E_u log p(place(k, u)) + d log(2/255)`: a lower bound in the mean over u.
    A Note on the Evaluation of Generative Models, section 3.1.
    """
    return place(pixels, torch.special.ndtr(_normal(pixels, seed, first_index)))


def bits_per_dimension(
    log_density: Tensor, standard_error: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Nats of a density of dequantised values as bits a dimension of the pixels, (B,) each.

    `-(log p + d log(2/255)) / (d log 2)`, d = size. For variational dequantisation the
    log-density is `log p - log q`.
    """
    bits = -(log_density / size + math.log(2 / (LEVELS - 1))) / math.log(2)
    return bits, standard_error / (size * math.log(2))


class VariationalDequantiser(nn.Module):
    """Noise within a level that is learned: `u = sigmoid(m_k + s_k n)`, n normal, for each level k.

    `log P(k) >= E_n [log p(place(k, u)) - log q(u | k)] + d log(2/255)`, sharper than with uniform
    noise where the model holds a level to be narrow, as the background of pictures is.
    Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture
    Design, section 3.1, with a table in place of a conditional flow.
    """

    def __init__(self) -> None:
        super().__init__()
        # A logistic, which would be uniform noise, in the normal closest to it.
        self.mean = nn.Parameter(torch.zeros(LEVELS, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.full((LEVELS,), math.log(1.6), dtype=torch.float64))

    def forward(self, pixels: Tensor, seed: int = 0, first_index: int = 0) -> tuple[Tensor, Tensor]:
        """Values (B, *shape) float64 and `log q(u | k)` (B,) in nats."""
        n = _normal(pixels, seed, first_index)
        k = pixels.long()
        logit = self.mean[k] + self.log_scale[k].exp() * n
        log_q = -0.5 * (n.square() + math.log(2 * math.pi)) - self.log_scale[k]
        # du/dlogit = u (1 - u)
        inside = nn.functional.logsigmoid(logit) + nn.functional.logsigmoid(-logit)
        return place(pixels, torch.sigmoid(logit)), (log_q - inside).flatten(1).sum(1)

    def fit(
        self,
        denoiser: Denoiser,
        pixels: Tensor,
        *,
        steps: int = 100,
        learning_rate: float = 0.05,
        samples: int = 8,
        batch: int = 16,
        seed: int = 0,
        **condition: Any,
    ) -> list[float]:
        """Raise the mean of `elbo - log q` by Adam; returns it in nats a sample at every step.

        pixels (N, *shape) uint8, a batch of them a step, in order, again from the first; condition
        is shared by all. The denoiser is not changed.
        """
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        found = []
        for step in range(steps):
            rows = torch.arange(step * batch, (step + 1) * batch) % len(pixels)
            values, log_q = self(pixels[rows], seed, step * batch)
            bound, _ = elbo(
                denoiser, values, samples=samples, seed=seed, first_index=step * batch, **condition
            )
            objective = (bound - log_q.to(bound.device)).mean()
            gradients = torch.autograd.grad(-objective, list(self.parameters()))
            for parameter, gradient in zip(self.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            found.append(objective.item())
        return found


def _normal(pixels: Tensor, seed: int, first_index: int) -> Tensor:
    indices = range(first_index, first_index + len(pixels))
    n = noise.normal(seed, indices, 0, pixels.shape[1:], torch.float64, stream=STREAM)
    return n.to(pixels.device)
