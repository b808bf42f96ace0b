"""The vector that tells a network the time and the label."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def zeroed(layer: nn.Module) -> nn.Module:
    """Return the layer with all its parameters set to zero: at the start it adds nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class FourierFeatures(nn.Module):
    """Sines and cosines of a scalar at geometrically spaced frequencies: (B,) -> (B, features).

    `frequencies` is the lowest and highest one, in radians per unit of the input. An input in
    [0, pi/2] is told apart at its ends to about 1/highest.

    Source: "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
    Domains", section 4 (deterministic frequencies instead of random ones).
    """

    def __init__(self, features: int, frequencies: tuple[float, float]) -> None:
        super().__init__()
        low, high = frequencies
        if features < 2 or features % 2:
            raise ValueError(f"features is {features}; it must be even and at least 2.")
        if not 0 < low <= high:
            raise ValueError(f"frequencies are {frequencies}; give 0 < lowest <= highest.")
        exponents = torch.linspace(math.log(low), math.log(high), features // 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = x.float()[:, None] * self.frequencies.float()
        return math.sqrt(2) * torch.cat((angle.sin(), angle.cos()), dim=1)


class Conditioning(nn.Module):
    """Embed a time (B,) and, with `classes` > 0, a label into one vector (B, width).

    Labels are integers (B,), of which `classes` means "no label", as does None; or weights of their
    embeddings, floating (B, classes + 1), so that a condition can be mixed, or learned: a row of
    the identity is a class.
    """

    def __init__(
        self, width: int, classes: int, frequencies: tuple[float, float], features: int = 64
    ) -> None:
        super().__init__()
        self.classes = classes
        self.fourier = FourierFeatures(features, frequencies)
        self.time_in = nn.Linear(features, width)
        self.time_out = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, time: Tensor, label: Tensor | None) -> Tensor:
        features = self.fourier(time).to(self.time_in.weight.dtype)
        vector = self.time_out(nn.functional.silu(self.time_in(features)))
        if self.label is None:
            if label is not None:
                raise ValueError("This network has no classes; call it without a label.")
        else:
            if label is None:
                label = torch.full(time.shape, self.classes, device=time.device)
            soft = label.is_floating_point()
            if label.shape != ((*time.shape, self.classes + 1) if soft else time.shape):
                raise ValueError(
                    f"label has shape {tuple(label.shape)}; it needs one class a sample, "
                    f"{tuple(time.shape)}, or floating weights {(*time.shape, self.classes + 1)}."
                )
            weight = self.label.weight
            vector = vector + (label.to(weight.dtype) @ weight if soft else self.label(label))
        return nn.functional.silu(vector)
