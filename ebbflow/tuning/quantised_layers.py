"""Layers with integer weights and rounded inputs; they know nothing of diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ebbflow.networks.unet import _Attention

CANDIDATES = 100
KEPT = 1 << 15  # numbers of one call that the search for a range looks at

_PRODUCTS: dict[type[nn.Module], Any] = {
    nn.Linear: functional.linear,
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def check_bits(bits: int) -> int:
    """`bits` itself; raises ValueError unless it is an integer from 2 to 16."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 2 to 16, got {bits!r}")
    return bits


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale D, zero z) of the codes 0 … 2^bits - 1 that span [low, high] and hold zero exactly."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale)


def codes(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """`q = clamp(round(x / D) + z, low, high)`, in x's dtype."""
    return torch.clamp(torch.round(x / scale) + zero, low, high)


def rounded(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`(q - z) D`: what x becomes; within D/2 of x where x is in the range."""
    return (codes(x, scale, zero, 0, 2**bits - 1) - zero) * scale


def search_range(x: Tensor, low: Tensor, high: Tensor, bits: int, power: float | None) -> Tensor:
    """The share f of [low, high] whose codes give the least `mean |x - x̂|^power`; one for None.

    Of 100 shares up to the whole range, which makes it at least as good as the range itself.
    """
    if power is None:
        return torch.ones_like(low)
    best, chosen = torch.full_like(low, torch.inf), torch.ones_like(low)
    for k in range(CANDIDATES, 0, -1):
        share = k / CANDIDATES
        error = (x - rounded(x, *affine(share * low, share * high, bits), bits)).abs()
        error = error.pow(power).mean()
        best, chosen = torch.where(error < best, error, best), chosen.where(error >= best, share)
    return chosen


def integer_weights(weight: Tensor, bits: int, power: float | None) -> tuple[Tensor, Tensor]:
    """Symmetric codes (out, …), int8 up to 8 bits, and a scale (out,) for each output channel.

    Its grid search shrinks the range of each channel on its own, as `search_range` does.
    """
    flat, top = weight.detach().flatten(1), 2 ** (bits - 1) - 1
    whole = flat.abs().amax(1, keepdim=True) / top
    whole = torch.where(whole > 0, whole, torch.ones_like(whole))
    zero = torch.zeros_like(whole)
    best, scale = torch.full_like(whole, torch.inf), whole
    for k in range(CANDIDATES if power is not None else 0, 0, -1):
        tried = whole * (k / CANDIDATES)
        error = (flat - codes(flat, tried, zero, -top, top) * tried).abs()
        error = error.pow(power or 1.0).mean(1, keepdim=True)
        best, scale = torch.where(error < best, error, best), scale.where(error >= best, tried)
    stored = codes(flat, scale, zero, -top, top).reshape(weight.shape)
    return stored.to(torch.int8 if bits <= 8 else torch.int16), scale[:, 0]


class Observer(nn.Module):
    """Passes tensors on and remembers their range and some of their values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.ranges: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten()
        self.ranges.append(torch.stack(flat.aminmax()))
        self.seen.append(flat[:: max(1, -(-len(flat) // KEPT))])
        return x

    def quantiser(self, bits: int, power: float | None) -> Quantiser:
        """For the values seen; raises ValueError if there were none."""
        if not self.ranges:
            raise ValueError("a layer was never called on the calibration set: name it in skip=")
        ranges = torch.stack(self.ranges)
        low, high = ranges[:, 0].min().clamp(max=0), ranges[:, 1].max().clamp(min=0)
        share = search_range(torch.cat(self.seen), low, high, bits, power)
        quantiser = Quantiser(bits)
        quantiser.scale, quantiser.zero = affine(share * low, share * high, bits)
        return quantiser


class Quantiser(nn.Module):
    """Rounds a tensor to 2^bits levels of one range, `(q - z) D`."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x, self.scale.to(x.dtype), self.zero.to(x.dtype), self.bits)


class QuantisedLayer(nn.Module):
    """A linear or convolution layer: integer weights per output channel, inputs per tensor.

    It computes `layer(x̂, ŵ)` in the dtype of x. With `integer`, linear layers of at most 8 bits
    multiply the integers themselves (`torch._int_mm`) and scale the exact sums.
    """

    def __init__(
        self, layer: nn.Module, input: nn.Module, bits: int, power: float | None, integer: bool
    ) -> None:
        super().__init__()
        own: Any = layer
        self.input = input
        self.integer = integer and isinstance(layer, nn.Linear) and bits <= 8
        self.integers: Tensor
        self.scale: Tensor
        integers, scale = integer_weights(own.weight, check_bits(bits), power)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.bias = own.bias
        for name in own.__constants__:  # networks look at the sizes of their layers
            setattr(self, name, getattr(own, name))
        self.product = _PRODUCTS[type(layer)]
        if not isinstance(layer, nn.Linear):
            how = ("stride", "padding", "dilation", "groups")
            self.product = partial(self.product, **{name: getattr(own, name) for name in how})

    @property
    def weight(self) -> Tensor:
        """The rounded weights, in the dtype of their scale."""
        shape = (-1, *(1,) * (self.integers.ndim - 1))
        return self.integers.to(self.scale.dtype) * self.scale.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.integer and isinstance(self.input, Quantiser) and self.input.bits <= 8:
            return self._integers(x, self.input)
        return self.product(self.input(x), self.weight.to(x.dtype), self.bias)

    def _integers(self, x: Tensor, input: Quantiser) -> Tensor:
        scale, zero = input.scale.to(x.dtype), input.zero.to(x.dtype)
        flat = x.flatten(0, -2)
        # Codes 0 … 255 do not fit int8: subtract 128 and give it back through the weights' sums.
        signed = (codes(flat, scale, zero, 0, 2**input.bits - 1) - 128).to(torch.int8)
        sums = torch._int_mm(signed, self.integers.T)  # pyright: ignore
        sums = sums.to(x.dtype) + (128 - zero) * self.integers.sum(1).to(x.dtype)
        out = sums * (scale * self.scale.to(x.dtype))
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1)


class QuantisedAttention(nn.Module):
    """The library's own self-attention with the inputs of both of its products rounded."""

    def __init__(self, attention: _Attention, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.heads = attention.heads
        self.norm, self.qkv, self.out = attention.norm, attention.qkv, attention.out
        self.query, self.key = parts["query"], parts["key"]
        self.shares, self.value = parts["shares"], parts["value"]

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).view(b, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        scores = self.query(q) @ self.key(k).transpose(-1, -2) / q.shape[-1] ** 0.5
        h = self.shares(scores.softmax(-1)) @ self.value(v)
        return x + self.out(h.transpose(2, 3).reshape(b, c, height, width))


PARTS = ("query", "key", "shares", "value")


def quantisable(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the layers that can be quantised: exact types, zero padding."""
    for name, module in net.named_modules():
        if type(module) in _PRODUCTS and getattr(module, "padding_mode", "zeros") == "zeros":
            yield name, module


def attentions(net: nn.Module) -> list[str]:
    """Names of the attention modules whose products can be quantised."""
    return [name for name, module in net.named_modules() if isinstance(module, _Attention)]


def replace(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
