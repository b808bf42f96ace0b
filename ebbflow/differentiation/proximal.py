"""Proximal operators prox(x) = argmin_z g(z) + |z - x|²/2, with exact derivatives.

`scale` multiplies g and may require a derivative; a proximal gradient step of size η uses
η · scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebbflow.differentiation.projections import l1_ball

Weight = Tensor | float


def none(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = 0: the identity."""
    return x


def lasso(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = scale Σ|z|: soft thresholding."""
    return x.sign() * torch.relu(x.abs() - scale)


def nonnegative_lasso(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = scale Σ z over z >= 0."""
    return torch.relu(x - scale)


def ridge(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = scale |z|²/2."""
    return x / (1 + scale)


def elastic_net(x: Tensor, l1: Weight = 1.0, l2: Weight = 1.0) -> Tensor:
    """g = l1 Σ|z| + l2 |z|²/2."""
    return lasso(x, l1) / (1 + l2)


def group_lasso(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = scale |z|, the last axis being one group: block soft thresholding."""
    weight = torch.as_tensor(scale, dtype=x.dtype, device=x.device).unsqueeze(-1)
    square = (x * x).sum(-1, keepdim=True)
    alive = square > weight * weight
    length = torch.where(alive, square, 1.0).sqrt()
    return torch.where(alive, x * (1 - weight / length), 0.0)


def max_norm(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = scale max|z|, from the projection on its dual ball (Moreau's decomposition)."""
    return x - l1_ball(x, scale)


def logistic(x: Tensor, scale: Weight = 1.0) -> Tensor:
    """g = scale Σ log(1 + exp(z)), the root of z - x + scale σ(z)."""
    from ebbflow.differentiation.implicit import root

    def condition(z: Tensor, x: Tensor, scale: Weight) -> Tensor:
        return z - x + scale * torch.sigmoid(z)

    return root(condition, x.detach(), x, scale)
