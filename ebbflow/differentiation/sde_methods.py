"""Fixed-step methods for `dy = f dt + g dW`; each step gets its Brownian increment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation.brownian import Brownian
from ebbflow.differentiation.fields import Field, Structure

State = tuple[Tensor, ...]


class Noise:
    """Drift and diffusion on packed states, and the path between times."""

    def __init__(
        self, drift: Callable[..., Any], diffusion: Callable[..., Any], structure: Structure
    ) -> None:
        self.field = Field(drift, structure)
        self._diffusion, self._structure = diffusion, structure
        self.diagonal = True
        self.brownian: Brownian | None = None

    def drift(self, t: float, y: Tensor) -> Tensor:
        """f(t, y)."""
        return self.field(t, y)

    def diffusion(self, t: float, y: Tensor) -> Tensor:
        """g(t, y), of y's shape or with one more axis."""
        time = torch.tensor(t, dtype=self.field.real, device=y.device)
        out = self._diffusion(time, self._structure.unpack(y))
        out = out if isinstance(out, Tensor) else self._structure.pack(out)
        if out.shape != y.shape and not (
            self._structure.single
            and y.ndim
            and out.ndim == y.ndim + 1
            and out.shape[:-1] == y.shape
        ):
            shape = tuple(y.shape)
            raise ValueError(
                f"diffusion(t, y) must return y's shape {shape}, or {shape} with one more axis, "
                f"got {tuple(out.shape)}"
            )
        return out.to(y.dtype)

    def look(self, t: float, y: Tensor, method: SdeMethod) -> torch.Size:
        """The shape of the motion, from one evaluation; raises for noise a method cannot take."""
        with torch.no_grad():
            shape = self.diffusion(t, y).shape
        self.diagonal = shape == y.shape
        if method.diagonal_only and not self.diagonal:
            raise ValueError(
                f"{method.name} is for diagonal noise, and diffusion returned {tuple(shape)} for a "
                f"state of {tuple(y.shape)}: use method='euler-maruyama' or 'reversible-heun'"
            )
        return y.shape if self.diagonal else torch.Size([*y.shape[:-1], shape[-1]])

    def increment(self, t: float, s: float) -> Tensor:
        """W(s) - W(t)."""
        assert self.brownian is not None
        return self.brownian(t, s)

    def times(self, g: Tensor, dw: Tensor) -> Tensor:
        """g dW."""
        return g * dw if self.diagonal else (g @ dw.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class SdeMethod:
    """Strong order for diagonal or commutative noise, and for additive noise; weak order."""

    name: str
    strong_order: float
    additive_order: float
    weak_order: float
    stratonovich: bool = False
    diagonal_only: bool = False
    reversible: bool = False

    def start(self, noise: Noise, t: float, y: Tensor) -> State:
        """The carried state at the first time."""
        return (y,)

    def step(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        """One step from t to s."""
        raise NotImplementedError

    def undo(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        """The state at t, given the state at s."""
        raise TypeError(f"{self.name} cannot be undone; use reversible-heun")

    def change(self, noise: Noise, t: float, h: float, dw: Tensor, y: Tensor) -> Tensor:
        """`f h + g dW` at one point."""
        return noise.drift(t, y) * h + noise.times(noise.diffusion(t, y), dw)


class EulerMaruyama(SdeMethod):
    """`y' = y + f h + g dW` (Itô): strong order 1/2, 1 for additive noise; weak order 1."""

    def step(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        (y,) = state
        return (y + self.change(noise, t, s - t, dw, y),)


class Milstein(SdeMethod):
    """`y' = y + f h + g dW + ½ g ∂g/∂y (dW² - h)` (Itô, diagonal): strong and weak order 1."""

    def step(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        (y,) = state
        h = s - t
        g = noise.diffusion(t, y)
        # Only where somebody will ask for it is the correction itself recorded.
        recorded = torch.is_grad_enabled() and (y.requires_grad or g.requires_grad)
        with torch.enable_grad():
            through = recorded and y.requires_grad
            x = y if through else y.detach().requires_grad_()
            bending = g if through else noise.diffusion(t, x)
            bent = None
            if bending.requires_grad:
                # The Jacobian is diagonal, so a product from the left is one from the right.
                weight = 0.5 * (bending if recorded else bending.detach()) * (dw * dw - h)
                (bent,) = torch.autograd.grad(
                    bending, x, weight, create_graph=recorded, allow_unused=True
                )
        out = y + noise.drift(t, y) * h + g * dw
        return (out if bent is None else out + bent,)


class StrongRungeKutta(SdeMethod):
    """Milstein without a derivative (Itô, diagonal): strong and weak order 1.

    `y' = y + f h + g dW + (g(t, y + f h + g √h) - g) (dW² - h) / (2 √h)`. Numerical Solution of
    Stochastic Differential Equations, section 11.1 (Kloeden, Platen 1992).
    """

    def step(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        (y,) = state
        h = s - t
        f, g = noise.drift(t, y), noise.diffusion(t, y)
        root = math.sqrt(abs(h))
        support = noise.diffusion(t, y + f * h + g * root)
        return (y + f * h + g * dw + (support - g) * (dw * dw - h) / (2 * root),)


class StratonovichHeun(SdeMethod):
    """`ȳ = y + f h + g dW`, `y' = y + ½ (f + f̄) h + ½ (g + ḡ) dW` (Stratonovich)."""

    def step(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        (y,) = state
        first = self.change(noise, t, s - t, dw, y)
        return (y + 0.5 * (first + self.change(noise, s, s - t, dw, y + first)),)


class ReversibleHeunSde(SdeMethod):
    """Reversible Heun (Stratonovich): one evaluation of each function a step, undone exactly.

    `ẑ' = 2y - ẑ + f h + g dW`, `y' = y + ½ (f + f') h + ½ (g + g') dW`. Strong order 1/2, 1 for
    additive noise. Efficient and Accurate Gradients for Neural SDEs, Algorithms 1 and 2.
    """

    def start(self, noise: Noise, t: float, y: Tensor) -> State:
        return (y, y, noise.drift(t, y), noise.diffusion(t, y))

    def step(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        y, z, f, g = state
        h = s - t
        z1 = 2 * y - z + f * h + noise.times(g, dw)
        f1, g1 = noise.drift(s, z1), noise.diffusion(s, z1)
        return (y + 0.5 * ((f + f1) * h + noise.times(g + g1, dw)), z1, f1, g1)

    def undo(self, noise: Noise, t: float, s: float, dw: Tensor, state: State) -> State:
        y1, z1, f1, g1 = state
        h = s - t
        z = 2 * y1 - z1 - f1 * h - noise.times(g1, dw)
        f, g = noise.drift(t, z), noise.diffusion(t, z)
        return (y1 - 0.5 * ((f + f1) * h + noise.times(g + g1, dw)), z, f, g)


euler_maruyama = EulerMaruyama("euler-maruyama", 0.5, 1.0, 1.0)
milstein = Milstein("milstein", 1.0, 1.0, 1.0, diagonal_only=True)
srk = StrongRungeKutta("srk", 1.0, 1.0, 1.0, diagonal_only=True)
heun = StratonovichHeun("heun", 1.0, 1.0, 1.0, stratonovich=True)
reversible_heun = ReversibleHeunSde(
    "reversible-heun", 0.5, 1.0, 1.0, stratonovich=True, reversible=True
)

SDE_METHODS: dict[str, SdeMethod] = {
    method.name: method for method in (euler_maruyama, milstein, srk, heun, reversible_heun)
}
