"""The inverse of a causal convolution, a diagonal of pixels at a time.

    x_p = Σ_Δ W_Δ y_{p-Δ},  Δ >= 0 in both axes,   so   y_p = W_0⁻¹ (x_p - Σ_{Δ≠0} W_Δ y_{p-Δ})

Pixels with the same i + j do not need each other: H + W - 1 sequential steps, forward and
backward, instead of H · W. The cotangent solves the transposed system, the same inverse on
flipped images:  x̄ = λ,  λ_p = W_0⁻ᵀ (ȳ_p - Σ W_Δᵀ λ_{p+Δ}),  W̄_Δ = -Σ_p λ_p y_{p-Δ}ᵀ.
Parallel Backpropagation for Inverse of a Convolution with Application to Normalizing Flows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ebbflow.differentiation.derivatives import tangent_rule
from ebbflow.differentiation.status import NotSolved, Status


def causal_convolution(y: Tensor, weight: Tensor) -> Tensor:
    """x_p = Σ W_Δ y_{p-Δ}: y (B, C, H, W), weight (C, C, k, l) whose last tap [-1, -1] is W_0."""
    k, m = weight.shape[-2:]
    return functional.conv2d(functional.pad(y, (m - 1, 0, k - 1, 0)), weight)


def inverse_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """The y with causal_convolution(y, weight) = x, differentiable in both, to any order.

    x (B, C, H, W), weight (C, C, k, l). The recursion grows exponentially where Σ_{Δ≠0} |W_Δ| is
    well above the least singular value of W_0.

    Raises:
        NotSolved: W_0 is singular, or the recursion grew until it lost x.
    """
    c = weight.shape[0]
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != c or x.shape[1] != c:
        raise ValueError(
            f"x {tuple(x.shape)} must be (B, C, H, W) and weight {tuple(weight.shape)} "
            "(C, C, k, l) with the same C"
        )
    y = _Inverse.apply(x, weight)
    assert isinstance(y, Tensor)
    return y


def log_determinant(weight: Tensor, height: int, width: int) -> Tensor:
    """log |det ∂y/∂x| of `inverse_convolution` on one image: -H W log |det W_0|."""
    return -height * width * torch.linalg.slogdet(weight[:, :, -1, -1])[1]


def sequential_steps(height: int, width: int) -> int:
    """How many steps of the recursion wait for each other."""
    return height + width - 1


def _solve(x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """The recursion on the sheared image, whose column d holds the pixels with i + j = d."""
    b, c, height, width = x.shape
    k, m = weight.shape[-2:]
    steps = sequential_steps(height, width)
    current, fail = torch.linalg.inv_ex(weight[:, :, -1, -1])
    if bool(fail.any()):
        residual = torch.ones(1)
        status = Status("inverse convolution", residual, 0.0, 0, residual > 2, "W_0 is singular")
        raise NotSolved(status)
    taps = [(i, j) for i in range(k) for j in range(m) if (i, j) != (0, 0)]
    # (C, taps · C), in the order of the windows below.
    mixing = torch.cat([weight[:, :, k - 1 - i, m - 1 - j] for i, j in taps], 1) if taps else None
    top, left = k - 1, k + m - 2
    sheared = x.new_zeros(b, c, height + top, steps + left)
    rows = torch.arange(height, device=x.device)
    done = 0
    for d in range(steps):
        done += 1
        first, last = max(0, d - width + 1), min(d, height - 1) + 1
        right = x[:, :, rows[first:last], d - rows[first:last]]
        if mixing is not None:
            past = [
                sheared[:, :, top + first - i : top + last - i, left + d - i - j] for i, j in taps
            ]
            right = right - torch.einsum("oc,bcr->bor", mixing, torch.cat(past, 1))
        sheared[:, :, top + first : top + last, left + d] = torch.einsum(
            "oc,bcr->bor", current, right
        )
    i, j = rows.unsqueeze(1), torch.arange(width, device=x.device).unsqueeze(0)
    return sheared[:, :, top + i, left + i + j], done


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        y, steps = _solve(x, weight)
        size = torch.linalg.vector_norm(x)
        residual = torch.linalg.vector_norm(causal_convolution(y, weight) - x)
        residual = residual / torch.where(size > 0, size, 1.0)
        goal = torch.finfo(x.dtype).eps ** 0.5
        if not bool(residual <= goal):
            reason = "the recursion grows: shrink the taps other than W_0"
            good = residual <= goal
            raise NotSolved(Status("inverse convolution", residual, goal, steps, good, reason))
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        y, weight = ctx.saved_tensors
        flipped = inverse_convolution(cotangents[0].flip(-2, -1), weight.transpose(0, 1))
        adjoint = flipped.flip(-2, -1)
        k, m = weight.shape[-2:]
        padded = functional.pad(y, (m - 1, 0, k - 1, 0)).transpose(0, 1)
        gradient = functional.conv2d(padded, adjoint.transpose(0, 1)).transpose(0, 1)
        return adjoint, -gradient

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dx, dw = tangents
        with tangent_rule(*ctx.saved_tensors) as (y, weight):
            right = torch.zeros_like(y) if dx is None else dx
            right = right if dw is None else right - causal_convolution(y, dw)
            return inverse_convolution(right, weight)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        size = info.batch_size
        x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if in_dims[1] is None:
            y = inverse_convolution(x.flatten(0, 1), weight)
            return y.unflatten(0, x.shape[:2]), 0
        pairs = zip(x, weight.movedim(in_dims[1], 0), strict=True)
        return torch.stack([inverse_convolution(a, w) for a, w in pairs]), 0
