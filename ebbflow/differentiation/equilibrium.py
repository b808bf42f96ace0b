"""Layers without a depth: the fixed point of a network, and the ODE that leads to one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebbflow.differentiation.iterations import Anderson
from ebbflow.differentiation.methods import Method
from ebbflow.differentiation.ode import Gradient, odeint

log = logging.getLogger("ebbflow")


@dataclass(frozen=True)
class Equilibrium:
    """What `equilibrium` returns.

    z (B, …); `residual`, |f(z) - z| / (1 + |z|) of each sample, (B,); evaluations of f forwards.
    """

    z: Tensor
    residual: Tensor
    evaluations: int


def equilibrium(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    tolerance: float = 1e-5,
    max_evaluations: int = 50,
    memory: int = 5,
) -> Equilibrium:
    """The fixed point `z = f(z)` of each sample, with the implicit function's gradient.

    Both solves are Anderson's acceleration over the last `memory` iterates. Backwards,
    `u = (∂f/∂z)ᵀ u + z̄` gives `θ̄ = (∂f/∂θ)ᵀ u` for whatever f reads: two evaluations' memory,
    however many were needed; z0 has no gradient. A solve that stops short of `tolerance` (relative)
    logs a warning and is in `residual`.
    Paper: Deep Equilibrium Models (Bai, Kolter, Koltun 2019), theorem 1.
    """
    if not tolerance > 0 or max_evaluations < 2 or memory < 1:
        raise ValueError(
            "tolerance must be positive, max_evaluations at least 2, memory at least 1, got "
            f"{tolerance}, {max_evaluations} and {memory}"
        )
    z, residual, count = _anderson(f, z0.detach(), tolerance, max_evaluations, memory)
    _report("equilibrium", residual, tolerance, count)
    if torch.is_grad_enabled():
        fixed = z
        # One evaluation whose graph leads to the parameters, one to solve with.
        z = f(fixed)
        if z.requires_grad:

            def solved(cotangent: Tensor) -> Tensor:
                with torch.enable_grad():
                    x = fixed.detach().requires_grad_()
                    value = f(x)

                def pull(u: Tensor) -> Tensor:
                    return torch.autograd.grad(value, x, u, retain_graph=True)[0] + cotangent

                if not value.requires_grad:
                    return cotangent
                u, left, count = _anderson(pull, cotangent, tolerance, max_evaluations, memory)
                _report("its gradient", left, tolerance, count)
                return u

            z.register_hook(solved)
    return Equilibrium(z, residual, count)


def _report(what: str, residual: Tensor, tolerance: float, count: int) -> None:
    worst = float(residual.max())
    if not worst <= tolerance:
        log.warning(
            "%s: %d evaluations left a relative residual of %.1e, asked for %.1e: a field with "
            "smaller Jacobian, more max_evaluations or a larger tolerance",
            *(what, count, worst, tolerance),
        )


@torch.no_grad()
def _anderson(
    f: Callable[[Tensor], Tensor], z: Tensor, tolerance: float, most: int, memory: int
) -> tuple[Tensor, Tensor, int]:
    """The fixed point of each sample, its relative residual (B,), and the evaluations."""
    solver = Anderson(tolerance, most - 1, memory)
    x, status = solver(lambda x: f(x.view_as(z)).flatten(1), z.flatten(1))
    return x.view_as(z), status.residual, status.iterations + 1


class HomotopyODE(nn.Module):
    """A layer `x -> z(1)` of `dz/dt = field(z, x)`, which learns the way to an equilibrium itself.

    Along a homotopy from an easy equation to `f(z, x) = z` the solution obeys an ODE; here its
    right-hand side is the network, x enters every evaluation, and no equation is solved. All
    samples start at one point, the running mean of the answers z(1) (which minimises the mean
    square of the way that is left), so that the better it is, the fewer steps are taken.

    Args:
        field: `field(z, x)` of z's shape.
        shape: of one z.
        rtol, atol, gradient, method: of `odeint`. "checkpoint" is exact for every method; with
            "alf", "reversible" takes less memory; "adjoint" needs a field that contracts little.
        momentum: of the running mean, updated in training mode; 0 keeps the start at zero.

    Paper: Two Sides of The Same Coin: Bridging Deep Equilibrium Models and Neural ODEs via Homotopy
    Continuation (Ding et al. 2023), section 4.
    """

    start: Tensor

    def __init__(
        self,
        field: nn.Module,
        shape: Sequence[int],
        rtol: float = 1e-3,
        atol: float = 1e-3,
        gradient: Gradient = "checkpoint",
        momentum: float = 0.1,
        method: str | Method = "dopri5",
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.field, self.rtol, self.atol = field, rtol, atol
        self.gradient: Gradient = gradient
        self.momentum, self.method = momentum, method
        self.register_buffer("start", torch.zeros(*shape))
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        z0 = self.start.expand(x.shape[0], *self.start.shape).clone()
        field = self.field

        def slope(t: Tensor, z: Tensor) -> Tensor:
            return field(z, x)

        run = odeint(
            slope,
            z0,
            [0.0, 1.0],
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            gradient=self.gradient,
            full=True,
        )
        z, self.evaluations = run.ys[-1], int(run.evaluations)
        if self.training and self.momentum:
            with torch.no_grad():
                self.start.lerp_(z.mean(0), self.momentum)
        return z
