"""How far a learned score is from a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.likelihood.traces import Pull, spheres

STREAM = 27


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


def noisy(denoiser: Denoiser, x0: Tensor, t: float, seed: int, draw: int) -> Tensor:
    """A sample of `x_t` for each x0; `draw` tells draws of the same seed apart."""
    eps = noise.normal(seed, range(len(x0)), draw, x0.shape[1:], x0.dtype, stream=STREAM)
    return denoiser.schedule.add_noise(x0, t, eps.to(x0.device))


def asymmetry(
    denoiser: Denoiser,
    x0: Tensor,
    t: float,
    *,
    probes: int = 4,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
) -> Estimate:
    """`|J - Jᵀ| / |J|` in Frobenius norms over forward samples, J the Jacobian of the score.

    0 for a gradient, √2 for a matrix of independent entries, 2 where J is antisymmetric. From
    `E (wᵀ J v - vᵀ J w)² = |J - Jᵀ|²` over all pairs of `probes` directions, so that backward
    passes are all it takes; the standard error is of the scatter over samples. The noise
    prediction, a multiple of the score, gives the same ratio.
    Are We Really Learning the Score Function? Reinterpreting Diffusion Models Through Wasserstein
    Gradient Flow Matching, differential test.
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, pairs are compared, got {probes}")
    z = spheres(seed, 0, len(x0), probes, x0.shape[1:]).to(x0.device)
    with torch.enable_grad():
        point = noisy(denoiser, x0, t, seed, 0).detach().requires_grad_()
        output = denoiser.at(t, point, "noise")(point, **dict(condition or {}))
        pulled = Pull(output, point, False).each(z).detach().double().flatten(2)
    products = torch.einsum("pbd,qbd->bpq", pulled, z.double().flatten(2))
    upper = torch.triu_indices(probes, probes, 1)
    apart = (products - products.mT)[:, upper[0], upper[1]].square().mean(1)
    whole = pulled.square().sum(2).mean(0)
    ratio = (apart.sum() / whole.sum()).item()
    scatter = (apart - ratio * whole).square().sum().sqrt().item() / whole.sum().item()
    return Estimate(math.sqrt(ratio), 0.5 * scatter / math.sqrt(ratio) if ratio > 0 else 0.0)


def circulation(
    denoiser: Denoiser,
    x0: Tensor,
    t: float,
    *,
    nodes: int = 9,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
) -> Estimate:
    """`rms ∮ s dx / mean ∮ |s| |dx|` around triangles of three noisy copies of each sample.

    0 for a gradient: two ways from one point to another then take the same work. Each side is
    integrated by the rule of Clenshaw and Curtis with an odd number of nodes; what stands for the
    error is how far the rule with half as many is from it, since sides, not the draw, limit it.
    The same paper, integral test.
    """
    if nodes < 5 or nodes % 4 != 1:
        raise ValueError(f"nodes must be 5, 9, 13, …, the rule and its half, got {nodes}")
    corners = [noisy(denoiser, x0, t, seed, draw) for draw in (0, 1, 2)]
    places, weights = clenshaw_curtis(nodes)
    coarse = clenshaw_curtis(nodes // 2 + 1)[1]
    total, rough, length = (torch.zeros(len(x0), dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for k in range(3):
            start, side = corners[k], corners[(k + 1) % 3] - corners[k]
            work = []
            for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
                x = start + place * side
                s = denoiser.at(t, x, "noise")(x, **dict(condition or {}))
                s, along_side = s.double().flatten(1), side.double().flatten(1)
                work.append((s * along_side).sum(1).cpu())
                length += weight * (s.norm(dim=1) * along_side.norm(dim=1)).cpu()
            total += torch.stack(work, 1) @ weights
            rough += torch.stack(work[::2], 1) @ coarse
    scale = length.mean()
    found = total.square().mean().sqrt() / scale
    return Estimate(found.item(), ((total - rough).square().mean().sqrt() / scale).item())


def clenshaw_curtis(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (count,) on [0, 1], exact for polynomials of degree count - 1.

    The nodes of the rule with half as many intervals are every other one of these.
    """
    n = count - 1
    angle = torch.arange(count, dtype=torch.float64) * math.pi / n
    places = (1 - torch.cos(angle)) / 2
    order = torch.arange(0, n + 1, 2, dtype=torch.float64)
    share = torch.where((order == 0) | (order == n), 0.5, 1.0) / (1 - order**2)
    weights = 2 / n * (torch.cos(angle[:, None] * order) @ share)
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    return places, weights
