"""The continuous adjoint equation, solved backwards with the forward solve's error control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ebbflow.differentiation import methods
from ebbflow.differentiation.fields import Field, Structure, Time
from ebbflow.differentiation.march import DONE, Control, Passage, march
from ebbflow.differentiation.methods import Method, RungeKutta, Step


class Augmented(Field):
    """`d(y, a)/dt = (f, -aᵀ ∂f/∂y)` on y and its cotangent a, side by side."""

    def __init__(self, inner: Field, y: Tensor, batch_dims: int) -> None:
        self.inner, self.shape = inner, y.shape[batch_dims:]
        packed = y.flatten(batch_dims)
        super().__init__(inner.f, Structure(torch.cat([packed, packed], -1), batch_dims))
        self.compact = inner.compact

    def halves(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """y and a of one or more samples."""
        y, a = z.chunk(2, dim=-1)
        return y.reshape(*z.shape[:-1], *self.shape), a.reshape(*z.shape[:-1], *self.shape)

    def join(self, y: Tensor, a: Tensor) -> Tensor:
        """The inverse of `halves`."""
        lead = y.ndim - len(self.shape)
        return torch.cat([y.flatten(lead), a.flatten(lead)], -1)

    def __call__(self, t: Time, y: Tensor) -> Tensor:
        self.inner.rows = self.rows
        x, a = self.halves(y)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.inner(t, x)
            pull = None
            if value.requires_grad:
                (pull,) = torch.autograd.grad(value, x, a, allow_unused=True)
        return self.join(value.detach(), torch.zeros_like(a) if pull is None else -pull)


def backsolve(
    method: Method,
    field: Field,
    times: list[float] | Tensor,
    control: Control,
    outputs: Tensor,
    cotangents: Tensor,
    parameters: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of y0 and of the parameters by solving (y, a) from the last time to the first.

    At each output time y is reset to the forward solution and its cotangent joins a. The
    parameters' gradient `∫ aᵀ ∂f/∂θ dt` is the method's own quadrature over accepted steps: it
    needs no state, and no share in the error norm ("Hey, that's not an ODE", Kidger et al. 2021).
    Raises RuntimeError where the backward solve does not arrive.
    """
    batch_dims = field.structure.batch_dims
    if not isinstance(method, RungeKutta):
        method = methods.dopri5 if control.grid is None else methods.heun
    augmented = Augmented(field, outputs[0], batch_dims)
    gradients: list[Tensor | None] = [None] * len(parameters)

    def quadrature(passage: Passage, step: Step) -> None:
        for (t, z), b in zip(step.nodes, method.tableau.b, strict=True):
            if not b or not parameters:
                continue
            y, a = augmented.halves(z)
            weight = a * augmented.inner.weight(-b * passage.h, a)
            if passage.moved is not None:
                mask = passage.moved.reshape(-1, *(1,) * (a.ndim - 1))
                weight = torch.where(mask, weight, 0.0)
            with torch.enable_grad():
                value = field(t, y.detach())
                if not value.requires_grad:
                    continue
                found = torch.autograd.grad(value, parameters, weight, allow_unused=True)
            for i, g in enumerate(found):
                if g is not None:
                    old = gradients[i]
                    gradients[i] = g if old is None else old + g

    a = cotangents[-1]
    for k in range(len(outputs) - 1, 0, -1):
        if isinstance(times, Tensor):
            span = torch.stack([times[k], times[k - 1]])
        else:
            span = [times[k], times[k - 1]]
        if bool(torch.as_tensor(span[0] != span[1]).any()):
            grid = _segment(control.grid, times, k)
            part = replace(control, grid=grid, first_step=None, record=False)
            z = augmented.join(outputs[k], a)
            with torch.no_grad():
                run = march(method, augmented, span, z, part, quadrature)
            if bool((torch.as_tensor(run.status) != DONE).any()):
                raise RuntimeError(
                    f"the adjoint equation did not reach t = {span[1]} from {span[0]} in "
                    f"{part.max_steps} steps: f contracts too strongly to be solved backwards; use "
                    "gradient='checkpoint' or 'reversible'"
                )
            a = augmented.halves(run.outputs[-1])[1]
        a = a + cotangents[k - 1]
    return [a, *gradients]


def _segment(
    grid: tuple[float, ...] | None, times: list[float] | Tensor, k: int
) -> tuple[float, ...] | None:
    """The nodes between outputs k and k - 1, in that order (as fractions with a batch axis)."""
    if grid is None:
        return None
    if isinstance(times, Tensor):
        return tuple(k - place for place in reversed(grid) if k - 1 <= place <= k)
    first, last = grid.index(times[k - 1]), grid.index(times[k])
    return tuple(reversed(grid[first : last + 1]))
