"""The continuous adjoint equation, solved backwards with the forward solve's error control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ebbflow.differentiation import methods
from ebbflow.differentiation.batched_steps import put
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


class Snapshots:
    """At most `most` states of a solve, about evenly spaced in time.

    The adjoint solve is set back to them: where f contracts at a rate r it magnifies errors by
    e^(r t) between two of them, instead of over the whole span.
    """

    def __init__(
        self,
        y0: Tensor,
        times: list[float] | Tensor,
        grid: tuple[float, ...] | None = None,
        most: int = 8,
    ) -> None:
        self.y, self.t, self.grid, self.most, self.count = y0, times[0], grid, most, 0
        # Beside each its place in time, over which the mean of a batch stands.
        self.kept: list[tuple[float, Time, Tensor]] = []

    def __call__(self, passage: Passage, step: Step) -> None:
        """Look at an accepted step."""
        self.count += 1
        if passage.moved is None:
            self.t = self.grid[self.count] if self.grid else passage.t + passage.h
            self.y = step.state[0]
            if passage.outputs:
                # An output at the end of the step is kept anyway.
                return
        else:
            assert isinstance(passage.t, Tensor) and isinstance(self.t, Tensor)
            rows, moved = passage.rows, passage.moved
            self.t = put(self.t, rows, moved, passage.t + passage.h)
            self.y = put(self.y, rows, moved, step.state[0])
        self.kept.append((float(torch.as_tensor(self.t).mean()), self.t, self.y))
        if len(self.kept) > self.most:
            # The one between the nearest neighbours goes.
            gaps = [abs(b[0] - a[0]) for a, b in zip(self.kept, self.kept[2:], strict=False)]
            del self.kept[1 + gaps.index(min(gaps))]

    def merged(
        self, times: list[float] | Tensor, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[float] | Tensor, Sequence[Tensor], Sequence[Tensor | None]]:
        """Outputs and snapshots in the order of their times; snapshots have no cotangents."""
        if not self.kept:
            return times, outputs, cotangents
        states = [*outputs, *(y for _, _, y in self.kept)]
        if isinstance(times, Tensor):
            sign = torch.sign(times[-1] - times[0])
            every = torch.stack([*times, *(t for _, t, _ in self.kept if isinstance(t, Tensor))])
            order = torch.argsort(every * sign, dim=0, stable=True)
            # A last step ends where it was meant to, up to rounding.
            every = torch.minimum(every.gather(0, order) * sign, times[-1] * sign) * sign
            places = order.reshape(*order.shape, *(1,) * (states[0].ndim - 1))
            pulls = [*cotangents, *[torch.zeros_like(cotangents[0])] * len(self.kept)]
            places = places.expand(-1, *states[0].shape)
            both = torch.stack(states).gather(0, places), torch.stack(pulls).gather(0, places)
            return every, [*both[0]], [*both[1]]
        sign = 1.0 if times[-1] > times[0] else -1.0
        every = [*times, *(t for _, t, _ in self.kept)]
        order = sorted(range(len(every)), key=lambda i: sign * float(every[i]))
        pulls = [*cotangents, *[None] * len(self.kept)]
        return (
            [float(every[i]) for i in order],
            [states[i] for i in order],
            [pulls[i] for i in order],
        )


def backsolve(
    method: Method,
    field: Field,
    times: list[float] | Tensor,
    control: Control,
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of y0 and of the parameters by solving (y, a) from the last time to the first.

    At each of the times y is reset to the forward solution and its cotangent joins a. The
    parameters' gradient `∫ aᵀ ∂f/∂θ dt` is the method's own quadrature over accepted steps: it
    needs no state, and no share in the error norm ("Hey, that's not an ODE", Kidger et al. 2021).
    Raises RuntimeError where the backward solve does not arrive, or arrives elsewhere.
    """
    batch_dims = field.structure.batch_dims
    if not isinstance(method, RungeKutta):
        method = methods.dopri5 if control.grid is None else methods.heun
    augmented = Augmented(field, outputs[0], batch_dims)
    gradients: list[Tensor | None] = [None] * len(parameters)

    # The longest step of the last part begins the next one.
    longest: Time | None = None

    def quadrature(passage: Passage, step: Step) -> None:
        nonlocal longest
        if longest is None:
            longest = abs(passage.h)
        elif isinstance(longest, Tensor):
            longest = torch.maximum(longest, cast(Tensor, passage.h).abs())
        else:
            longest = max(longest, abs(cast(float, passage.h)))
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

    a = torch.zeros_like(outputs[-1]) if cotangents[-1] is None else cotangents[-1]
    for k in range(len(outputs) - 1, 0, -1):
        if isinstance(times, Tensor):
            span = torch.stack([times[k], times[k - 1]])
        else:
            span = [times[k], times[k - 1]]
        if bool(torch.as_tensor(span[0] != span[1]).any()):
            grid = _segment(control.grid, times, k)
            part = replace(control, grid=grid, first_step=None, record=False)
            if isinstance(longest, float):
                part = replace(part, first_step=longest)
            longest = None
            z = augmented.join(outputs[k], a)
            with torch.no_grad():
                run = march(method, augmented, span, z, part, quadrature)
            if bool((torch.as_tensor(run.status) != DONE).any()):
                raise RuntimeError(
                    f"the adjoint equation did not reach t = {span[1]} from {span[0]} in "
                    f"{part.max_steps} steps: f contracts too strongly to be solved backwards; use "
                    "gradient='checkpoint' or 'reversible'"
                )
            y, a = augmented.halves(run.outputs[-1])
            lost = (y - outputs[k - 1]).norm()
            size = torch.hypot(outputs[k - 1].norm(), outputs[k].norm())
            if not bool(lost <= size):
                raise RuntimeError(
                    f"the adjoint equation lost the solution on its way from t = {span[0]} to "
                    f"{span[1]}, where it came back {float(lost):.1g} beside it: f contracts too "
                    "strongly to be solved backwards; use gradient='checkpoint' or 'reversible'"
                )
        pull = cotangents[k - 1]
        a = a if pull is None else a + pull
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
