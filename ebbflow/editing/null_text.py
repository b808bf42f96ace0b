"""Null-text inversion: one learned null condition a step, so that guidance returns the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow import solvers
from ebbflow.denoiser import Denoiser
from ebbflow.guidance import ClassifierFree
from ebbflow.inversion import invert
from ebbflow.sampling import trajectory


@dataclass(frozen=True, eq=False)
class NullText:
    """What `null_text` returns.

    x1: the state at the first of `times`, which decrease; nulls: the null conditions of each step;
    losses: mean square distance to the pivot after each step; pivot: the last state of the pivot.
    """

    denoiser: Denoiser
    scale: float
    x1: Tensor
    times: tuple[float, ...]
    nulls: tuple[Mapping[str, Tensor], ...]
    losses: tuple[float, ...]
    pivot: Tensor
    condition: Mapping[str, Any]

    def sample(self, **condition: Any) -> Tensor:
        """The end of guided DDIM with these nulls; conditions replace those of the inversion."""
        given = {**self.condition, **condition}
        x = self.x1
        with torch.no_grad():
            for k, null in enumerate(self.nulls):
                guided = ClassifierFree(self.denoiser, self.scale, null)
                x = _step(guided, self.times[k : k + 2], x, given)
        return x


def null_text(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    scale: float,
    null: Mapping[str, Tensor],
    steps: int = 50,
    iterations: int = 10,
    rate: float = 1e-2,
    tolerance: float = 1e-5,
    **condition: Any,
) -> NullText:
    """Null conditions with which guidance of this scale follows the inversion of x0.

    The pivot z*_k is the inversion without guidance. From its end, for each step of DDIM,

        min over null_k of mean |z*_{k+1} - DDIM(z_k, D_null + scale (D_condition - D_null))|²

    by Adam with the rate `rate (1 - step / 100)`, warm-started from the step before, stopped below
    `tolerance (1 + 2 step)`; then the guided step is made with it.
    Null-text Inversion for Editing Real Images using Guided Diffusion Models, algorithm 1.

    Args:
        null: the null condition by name, floating-point, in the shape of a batch of conditions. For
            the networks of this package: weights of the labels, rows of `torch.eye(classes + 1)`.
        condition: the data's own; its tensors have the shape of the null's.

    The end is `alpha(t) x0` at the first node, half a step from the data. Raises ValueError for a
    null that cannot be differentiated.
    """
    for name, value in null.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"null {name!r} must be a floating-point tensor, got {value!r:.40}: a class has no "
                "gradient; give labels as weights, rows of torch.eye(classes + 1)"
            )
    if scale == 1:
        raise ValueError("scale is 1: guidance of scale 1 asks for no null, there is none to learn")
    if iterations < 1 or steps < 2:
        raise ValueError(f"iterations {iterations} and steps {steps}: give at least 1 and 2")
    start = invert(denoiser, x0, method="reversed", steps=steps, **condition)
    first = _first(denoiser, x0, start.times[0])
    points = trajectory(
        denoiser, x0.shape, solver="ddim", times=start.times, x_init=first, **condition
    )
    pivots = [first, *(point.state for point in points)][::-1]
    times = start.times[::-1]
    x, nulls, losses = pivots[0], [], []
    current = {name: value.detach().clone() for name, value in null.items()}
    for k, pivot in enumerate(pivots[1:]):
        current = {n: v.detach().clone().requires_grad_() for n, v in current.items()}
        adam = torch.optim.Adam(current.values(), rate * max(1 - k / 100, 0.01))
        nodes = times[k : k + 2]
        for _ in range(iterations):
            with torch.enable_grad():
                guided = ClassifierFree(denoiser, scale, current)
                loss = (_step(guided, nodes, x, condition) - pivot).square().mean()
                grads = torch.autograd.grad(loss, list(current.values()), allow_unused=True)
            if loss.item() < tolerance * (1 + 2 * k):
                break
            for value, grad in zip(current.values(), grads, strict=True):
                value.grad = grad
            adam.step()
        current = {name: value.detach() for name, value in current.items()}
        with torch.no_grad():
            x = _step(ClassifierFree(denoiser, scale, current), nodes, x, condition)
        nulls.append(current)
        losses.append((x - pivot).square().mean().item())
    return NullText(
        denoiser, scale, pivots[0], times, tuple(nulls), tuple(losses), pivots[-1], condition
    )


def _first(denoiser: Denoiser, x0: Tensor, t: float) -> Tensor:
    alpha = denoiser.schedule.alpha(torch.tensor([t, 0.0], dtype=torch.float64))
    return x0 * float(alpha[0] / alpha[1])


def _step(
    denoiser: Denoiser, nodes: tuple[float, ...], x: Tensor, condition: Mapping[str, Any]
) -> Tensor:
    plan = solvers.get("ddim").plan(denoiser.schedule, times=nodes)
    return plan.run(denoiser, x, **condition)
