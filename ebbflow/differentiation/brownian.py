"""Brownian motion from a counter: any time, in any order, without memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Philox-4x32-10 (Parallel Random Numbers: As Easy as 1, 2, 3, Salmon et al. 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
# Halvings below an octave: float64 times inside [2^(k-1), 2^k] are exact after 52 of them.
DEPTH = 52


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold 32-bit words; shapes broadcast."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps to int64's bits: both halves are read by shifts.
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((q >> 32) & _LOW) ^ b ^ k0,
            q & _LOW,
            ((p >> 32) & _LOW) ^ d ^ k1,
            p & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [a, b, c, d]


def normals(seeds: Tensor, nodes: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Standard normals (nodes, seeds, size) in float64, each from (seed, node, place) alone.

    A node is two integers: below 2^60 within its octave, and the octave. Two values a draw
    (Box–Muller on 52-bit uniforms).
    """
    device = seeds.device
    index = torch.tensor([n for n, _ in nodes], dtype=torch.int64, device=device)[:, None, None]
    octave = torch.tensor([o for _, o in nodes], dtype=torch.int64, device=device)[:, None, None]
    place = torch.arange((size + 1) // 2, device=device)
    seed = seeds[:, None]
    zero = torch.zeros_like(index + seed + place)
    words = philox(
        [index & _LOW, (index >> 32) & _LOW, place, octave & _LOW],
        [(seed & _LOW) + zero, (seed >> 32) & _LOW],
    )
    # (0, 1) of 52 bits: never 0, whose logarithm is infinite.
    u = ((words[0] << 20 | words[1] >> 12).double() + 0.5) * 2.0**-52
    v = (words[2] << 20 | words[3] >> 12).double() * 2.0**-52
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pair.flatten(-2)[..., :size]


class Brownian:
    """A Brownian path `W` with W(0) = 0, one number for every entry of `shape`.

    `W(t)` is its value, `W(s, t)` its increment W(t) - W(s), the same for the same seed whatever
    was asked before. The path is a sum of Lévy's hat functions, `W(t) = Σ_n hat_n(t) Z_n`, over the
    dyadic tree of [0, 1], [1, 2], [2, 4], …, each Z_n drawn from (seed, node) by a counter; so the
    law is exact at every float64 time (linear below 2^-52, two-sided for negative times). A value
    costs at most 53 + log2 t normals of `shape`, drawn at once; only the last two are kept.

    `seed` is an integer in [0, 2^63), or one for each entry of the first axis: that sample's path
    then depends on its own seed only. Values are drawn in float64 and rounded to `dtype`.
    Raises ValueError for other seeds and for times of 2^900 or more or not finite.
    Paper: On Neural Differential Equations (Kidger 2022), section 5.5: Brownian reconstruction.
    """

    def __init__(
        self,
        seed: int | Sequence[int] | Tensor,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        many = not isinstance(seed, int)
        values = [int(s) for s in seed] if not isinstance(seed, int) else [seed]
        if any(not 0 <= s < 2**63 for s in values):
            raise ValueError(f"a seed must be an integer in [0, 2^63), got {seed!r}")
        if many and (not self.shape or self.shape[0] != len(values)):
            raise ValueError(
                f"{len(values)} seeds need a shape whose first axis is {len(values)}, got "
                f"{tuple(self.shape)}"
            )
        self.seeds = torch.tensor(values, dtype=torch.int64, device=device)
        self.size = self.shape.numel() // (len(values) if many else 1)
        # An increment's end is the next one's start.
        self._last: list[tuple[float, Tensor]] = []

    def __call__(self, s: float | Tensor, t: float | Tensor | None = None) -> Tensor:
        if t is None:
            return self._value(float(s)).to(self.dtype)
        return (self._value(float(t)) - self._value(float(s))).to(self.dtype)

    @torch.no_grad()
    def _value(self, t: float) -> Tensor:
        for time, value in self._last:
            if time == t:
                return value
        nodes, weights = hats(t)
        if nodes:
            z = normals(self.seeds, nodes, self.size)
            w = torch.tensor(weights, dtype=torch.float64, device=z.device)
            value = torch.tensordot(w, z, 1).reshape(self.shape)
        else:
            value = torch.zeros(self.shape, dtype=torch.float64, device=self.seeds.device)
        self._last = [*self._last[-1:], (t, value)]
        return value


def hats(t: float) -> tuple[list[tuple[int, int]], list[float]]:
    """The nodes of the tree that reach t, and the values of their hat functions there.

    Node (0, k) is the increment over octave k ([0, 1], then [2^(k-1), 2^k]); (2^d + i, k) is the
    middle of the octave's i-th interval after d halvings, with height √length / 2.
    """
    if not abs(t) < 2.0**900:
        raise ValueError(f"the time of a Brownian path must be finite, below 2^900, got {t}")
    nodes: list[tuple[int, int]] = []
    weights: list[float] = []
    # Octaves of negative times are numbered from 2^20: another, independent path.
    octave, left, right = (1 << 20 if t < 0 else 0), 0.0, 1.0
    t = abs(t)
    while t >= right:
        nodes.append((0, octave))
        weights.append(math.sqrt(right - left))
        octave, left, right = octave + 1, right, 2 * right
    length = right - left
    # The fraction of the octave as an integer of 52 bits, exact but for t below 1.
    place = (t - left) / length
    if place:
        nodes.append((0, octave))
        weights.append(math.sqrt(length) * place)
    for depth in range(DEPTH):
        scaled = math.ldexp(place, depth)
        index = math.floor(scaled)
        inside = scaled - index
        if not inside:
            break
        nodes.append(((1 << depth) + index, octave))
        height = 0.5 * math.sqrt(math.ldexp(length, -depth))
        weights.append(height * (1 - abs(2 * inside - 1)))
    return nodes, weights
