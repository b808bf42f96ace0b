"""A residual multilayer perceptron for vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebbflow.networks.embedding import Conditioning, zeroed


class _Block(nn.Module):
    """x + W2 silu((1 + scale) norm(W1 silu(norm(x))) + shift), zero at the start."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.linear_in = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.linear_out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.modulation(vector).chunk(2, dim=-1)
        h = self.linear_in(nn.functional.silu(self.norm_in(x)))
        h = torch.addcmul(shift, self.norm_out(h), scale + 1)
        return x + self.linear_out(nn.functional.silu(h))


class MLP(nn.Module):
    """A network for vectors: (B, features), (B,), label (B,) or None -> (B, features)."""

    def __init__(
        self,
        features: int,
        width: int = 128,
        blocks: int = 3,
        classes: int = 0,
        frequencies: tuple[float, float] = (0.5, 64.0),
    ) -> None:
        super().__init__()
        self.config = {
            "features": features,
            "width": width,
            "blocks": blocks,
            "classes": classes,
            "frequencies": list(frequencies),
        }
        low, high = frequencies
        self.conditioning = Conditioning(width, classes, (low, high))
        self.linear_in = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.linear_out = zeroed(nn.Linear(width, features))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        features = self.linear_in.in_features
        if x.ndim != 2 or x.shape[1] != features:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {features}).")
        vector = self.conditioning(time, label)
        h = self.linear_in(x)
        for block in self.blocks:
            h = block(h, vector)
        return self.linear_out(nn.functional.silu(self.norm(h)))
