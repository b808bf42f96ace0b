"""Traces of a Jacobian: exact, by Hutchinson's probes, or with a sketch of its range."""

from __future__ import annotations

import torch
from torch import Tensor

from ebbflow import noise

STREAM = 21


def spheres(seed: int, first_index: int, batch: int, count: int, shape: torch.Size) -> Tensor:
    """Probes (count, B, *shape), uniform on the sphere of radius √d, one draw a sample index.

    As unbiased as signs, exact on multiples of the identity, and never equal by chance, so that
    their scatter is an honest error also in two dimensions.
    """
    indices = range(first_index, first_index + batch)
    z = noise.normal(seed, indices, 0, (count, *shape), torch.float64, stream=STREAM)
    size = z.flatten(2).norm(dim=2).reshape(batch, count, *(1,) * len(shape))
    return (shape.numel() ** 0.5 * z / size).transpose(0, 1).contiguous()


class Pull:
    """`Jᵀ z` of `slope` (n, *shape) as a function of `point` (n, *shape), each sample its own."""

    def __init__(self, slope: Tensor, point: Tensor, record: bool) -> None:
        self.slope, self.point, self.record = slope, point, record

    def __call__(self, z: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(
            self.slope, self.point, z.to(self.slope), retain_graph=True, create_graph=self.record
        )
        return out

    def each(self, zs: Tensor) -> Tensor:
        return torch.stack([self(z) for z in zs])


def exact(pull: Pull) -> Tensor:
    """(n, 1): d backward passes."""
    total = torch.zeros(len(pull.point), dtype=pull.point.dtype, device=pull.point.device)
    unit = torch.zeros_like(pull.point).flatten(1)
    for i in range(unit.shape[1]):
        z = unit.index_fill(1, torch.tensor([i], device=unit.device), 1.0)
        total = total + pull(z.reshape(pull.point.shape)).flatten(1)[:, i]
    return total[:, None]


def hutchinson(pull: Pull, probes: Tensor) -> Tensor:
    """(n, K) from probes (K, n, *shape), each unbiased: `zᵀ J z`."""
    return (probes.to(pull.point) * pull.each(probes)).flatten(2).sum(2).T


def hutch_plus_plus(pull: Pull, probes: Tensor) -> Tensor:
    """(n, K) from 2 K probes: the trace on the range of a sketch, the rest by probes.

    `tr(Qᵀ J Q) + rᵀ J r`, Q an orthonormal basis of `(J - c)ᵀ S` for the first K probes S and c
    their mean quotient, r the part of another probe off Q, scaled to the sphere of radius
    √(d - K), so that multiples of the identity stay exact. Given S the K values are independent
    and unbiased.
    Gradients hold Q, of which the expectation does not depend.
    Hutch++: Optimal Stochastic Trace Estimation, algorithm 1.
    """
    sketch, rest = (part.flatten(2).to(pull.point) for part in probes.chunk(2))  # (K, n, d)
    shape = (len(sketch), *pull.point.shape)
    image = pull.each(sketch.reshape(shape)).flatten(2).detach()
    c = (sketch * image).sum(2).mean(0) / sketch.shape[2]
    basis = torch.linalg.qr((image - c[:, None] * sketch).permute(1, 2, 0))[0]  # (n, d, K)
    columns = basis.permute(2, 0, 1)
    inside = (columns * pull.each(columns.reshape(shape)).flatten(2)).sum((0, 2))
    rest = rest - torch.einsum("ndk,nek,pne->pnd", basis, basis, rest)
    left = rest.shape[2] - basis.shape[2]
    rest = rest * (left**0.5 / rest.norm(dim=2, keepdim=True))
    return (inside + (rest * pull.each(rest.reshape(shape)).flatten(2)).sum(2)).T
