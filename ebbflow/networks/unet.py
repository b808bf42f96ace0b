"""A small U-Net for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ebbflow.networks.embedding import Conditioning, zeroed


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm with groups of at least 4 channels, at most 32 groups, that divide evenly."""
    groups = max(g for g in range(1, min(32, max(channels // 4, 1)) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


class _Residual(nn.Module):
    """Residual block with scale and shift from the embedding; zero contribution at the start.

    Source: "Diffusion Models Beat GANs on Image Synthesis", section 3 (adaptive group norm);
    "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2.
    """

    def __init__(self, channels_in: int, channels_out: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = _norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = _norm(channels_out)
        self.conv_out = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.modulation(vector)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_in(functional.silu(self.norm_in(x)))
        h = torch.addcmul(shift, self.norm_out(h), scale + 1)
        return self.skip(x) + self.conv_out(functional.silu(h))


class _Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection that starts at zero."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.heads = max(channels // head, 1)
        if channels % self.heads:
            raise ValueError(f"{channels} channels do not split into heads of {head}.")
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).view(b, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        h = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(b, c, height, width))


class _Stage(nn.Module):
    """A residual block, followed by attention where it is asked for."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, head: int) -> None:
        super().__init__()
        self.residual = _Residual(channels_in, channels_out, embedding)
        self.attention = _Attention(channels_out, head) if head else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.attention(self.residual(x, vector))


class UNet(nn.Module):
    """A network for images: (B, C, H, W), (B,), label (B,) or None -> (B, C, H, W).

    Level l works at `size / patch / 2**l` pixels with `width * multipliers[l]` channels and
    `blocks` residual blocks on the way down and up; levels whose pixels are in `attention` attend.
    `patch` moves squares of patch x patch pixels into channels first, which makes the top level
    patch**2 times cheaper. Other image sizes work when patch * 2**(levels - 1) divides them.
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (8,),
        classes: int = 0,
        patch: int = 1,
        embedding: int = 0,
        head: int = 64,
        frequencies: tuple[float, float] = (0.5, 64.0),
    ) -> None:
        super().__init__()
        embedding = embedding or 4 * width
        self.config = {
            "channels": channels,
            "size": size,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "classes": classes,
            "patch": patch,
            "embedding": embedding,
            "head": head,
            "frequencies": list(frequencies),
        }
        self.channels = channels
        self.patch = patch
        self.divisor = patch * 2 ** (len(multipliers) - 1)
        if size % self.divisor:
            raise ValueError(
                f"size is {size}; patch {patch} and {len(multipliers)} levels need a multiple of "
                f"{self.divisor}. Use fewer multipliers, a smaller patch or another size."
            )
        pixels = [size // patch // 2**level for level in range(len(multipliers))]
        if unknown := sorted(set(attention) - set(pixels)):
            raise ValueError(f"attention at {unknown} pixels, but the levels have {pixels} pixels.")
        widths = [width * multiplier for multiplier in multipliers]
        heads = [head if p in attention else 0 for p in pixels]
        low, high = frequencies
        self.conditioning = Conditioning(embedding, classes, (low, high))
        self.conv_in = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        current = widths[0]
        for level_width, level_head in zip(widths, heads, strict=True):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(_Stage(current, level_width, embedding, level_head))
                current = level_width
            self.down.append(level)
        self.middle = nn.ModuleList(
            (_Stage(current, current, embedding, head), _Stage(current, current, embedding, 0))
        )
        self.up = nn.ModuleList()
        for level_width, level_head in zip(reversed(widths), reversed(heads), strict=True):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(_Stage(current + level_width, level_width, embedding, level_head))
                current = level_width
            self.up.append(level)
        self.norm = _norm(current)
        self.conv_out = zeroed(nn.Conv2d(current, channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        self._check(x)
        vector = self.conditioning(time, label)
        h = functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        h = self.conv_in(h)
        skips = []
        for number, level in enumerate(self.down):
            h = functional.avg_pool2d(h, 2) if number else h
            for stage in level.children():
                h = stage(h, vector)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, vector)
        for number, level in enumerate(self.up):
            h = functional.interpolate(h, scale_factor=2, mode="nearest") if number else h
            for stage in level.children():
                h = stage(torch.cat((h, skips.pop()), dim=1), vector)
        h = self.conv_out(functional.silu(self.norm(h)))
        return functional.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network takes (B, {self.channels}, H, W)."
            )
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(
                f"x has {x.shape[3]}x{x.shape[2]} pixels; both sides must be multiples of "
                f"{self.divisor}."
            )
