"""`sdeint`: stochastic differential equations along a Brownian path that a seed decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ebbflow.differentiation import gradients
from ebbflow.differentiation import parameters as owned
from ebbflow.differentiation.brownian import Brownian
from ebbflow.differentiation.fields import Structure
from ebbflow.differentiation.sde_methods import SDE_METHODS, Noise, SdeMethod, State, heun
from ebbflow.differentiation.times import output_times, step_ends

SNAPSHOTS = 8


@dataclass(frozen=True)
class SdeSolution:
    """What `sdeint(..., full=True)` returns: states, the path, evaluations of both functions."""

    ys: Any
    brownian: Brownian
    steps: int
    evaluations: int


def sdeint(
    drift: Callable[[Tensor, Any], Any],
    diffusion: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | SdeMethod = "reversible-heun",
    seed: int | Sequence[int] | Tensor = 0,
    gradient: Literal["direct", "checkpoint", "adjoint", "reversible"] = "direct",
    steps: int | None = None,
    step_size: float | None = None,
    brownian: Brownian | None = None,
    parameters: Sequence[Tensor] | None = None,
    checkpoints: int | None = None,
    full: bool = False,
) -> Any:
    """Solve `dy = f(t, y) dt + g(t, y) dW`, y(t[0]) = y0; returns y at each t, (len(t), *y0.shape).

    `diffusion` returns y's own shape (diagonal noise: an independent W for each entry), or one more
    axis (*y.shape, m): m shared motions, `g @ dW`. Nested states have diagonal noise.
    Itô: euler-maruyama, milstein and srk (these two for diagonal noise whose g_i reads y_i alone).
    Stratonovich: heun and reversible-heun. The drift is not converted between the two.

    Steps are fixed: `steps` for each interval of t, or `step_size` at most (a hundredth of the
    whole span by default). The path comes from `seed`, or one seed for each entry of the first
    axis, or is a given `brownian`: the same whatever the steps.

    Gradients as for `odeint`: "direct", "checkpoint" and (for reversible-heun) "reversible" are the
    discrete solution's own; "adjoint" solves the Stratonovich adjoint backwards along the path,
    set back to eight states on the way, exact only as the steps go to 0.
    Raises ValueError or TypeError for arguments out of range and noise that a method cannot take.
    Papers: Efficient and Accurate Gradients for Neural SDEs; On Neural Differential Equations.
    """
    if isinstance(method, str):
        if method not in SDE_METHODS:
            raise ValueError(f"method must be one of {', '.join(SDE_METHODS)}, got {method!r}")
        method = SDE_METHODS[method]
    if gradient not in ("direct", "checkpoint", "adjoint", "reversible"):
        raise ValueError(
            f"gradient must be direct, checkpoint, adjoint or reversible, got {gradient!r}"
        )
    if gradient == "reversible" and not method.reversible:
        raise ValueError(f"{method.name} cannot be undone: use method='reversible-heun'")
    if gradient == "adjoint" and not method.stratonovich:
        raise ValueError(
            f"the adjoint equation is Stratonovich's and {method.name} is Itô's: use "
            "method='reversible-heun' or 'heun', or gradient='checkpoint'"
        )
    structure = Structure(y0, 0)
    packed = structure.pack(y0)
    times = output_times(t, packed, 0)
    assert isinstance(times, list)
    if times[-1] < times[0] and not method.stratonovich:
        raise ValueError(
            f"{method.name} is Itô's, which runs forwards: t must increase, got {times}"
        )
    if steps is None and step_size is None:
        step_size = abs(times[-1] - times[0]) / 100
    grid = step_ends(times, steps, step_size)
    noise = Noise(drift, diffusion, structure)
    shape = noise.look(times[0], packed, method)
    if brownian is None:
        brownian = Brownian(seed, shape, noise.field.real, packed.device)
    elif brownian.shape != shape:
        raise ValueError(
            f"this diffusion needs a brownian of shape {tuple(shape)}, got {tuple(brownian.shape)}"
        )
    noise.brownian = brownian
    problem = SdeProblem(method, noise, times, grid, gradient, checkpoints)
    if gradient == "direct" or not torch.is_grad_enabled():
        ys = problem.solve(packed)[0]
    else:
        found = owned.collect(drift, diffusion) if parameters is None else list(parameters)
        found = owned.checked(problem.evaluate, [packed], found)
        ys = gradients.Replayed.apply(problem, packed, *found)
    assert isinstance(ys, Tensor)
    ys = structure.unpack(ys)
    if not full:
        return ys
    return SdeSolution(ys, brownian, len(grid) - 1, problem.evaluations)


class SdeProblem:
    """A solve with what its gradients need (`gradients.Problem`)."""

    def __init__(
        self,
        method: SdeMethod,
        noise: Noise,
        times: list[float],
        grid: tuple[float, ...],
        gradient: str,
        checkpoints: int | None,
    ) -> None:
        self.method, self.noise, self.grid = method, noise, grid
        self.gradient, self.checkpoints = gradient, checkpoints
        # Which output each node of the grid is; every output time is a node.
        places = {t: k for k, t in enumerate(times)}
        self.output_of = [places.get(t) for t in grid]
        # States that the adjoint is set back to, at every so many nodes.
        self.every = -(-len(grid) // SNAPSHOTS)
        self.kept: dict[int, Tensor] = {}
        self.evaluations = 0

    def solve(self, y0: Tensor) -> tuple[Tensor, State]:
        """Outputs and the last carried state."""
        state = self.start(y0)
        outputs = [y0]
        for index in range(len(self.grid) - 1):
            state, new = self.replay(index, state)
            outputs += new
            if self.gradient == "adjoint" and not (index + 1) % self.every:
                self.kept[index + 1] = state[0].detach()
        self.evaluations = self.noise.field.calls
        return torch.stack(outputs), state

    def evaluate(self, y: Tensor) -> list[Tensor]:
        return [self.noise.drift(self.grid[0], y), self.noise.diffusion(self.grid[0], y)]

    def forward(self, y0: Tensor) -> tuple[Tensor, State, int]:
        with torch.no_grad():
            outputs, end = self.solve(y0)
        return outputs, end if self.gradient == "reversible" else (), len(self.grid) - 1

    def start(self, y0: Tensor) -> State:
        return self.method.start(self.noise, self.grid[0], y0)

    def replay(self, index: int, state: State) -> tuple[State, list[Tensor]]:
        t, s = self.grid[index], self.grid[index + 1]
        state = self.method.step(self.noise, t, s, self.noise.increment(t, s), state)
        return state, [state[0]] * (self.output_of[index + 1] is not None)

    def undo(self, index: int, state: State) -> State:
        t, s = self.grid[index], self.grid[index + 1]
        return self.method.undo(self.noise, t, s, self.noise.increment(t, s), state)

    def output_indices(self, index: int) -> list[int]:
        k = self.output_of[index + 1]
        return [] if k is None else [k]

    def backward(
        self,
        cotangents: Tensor,
        y0: Tensor,
        outputs: Tensor,
        end: State,
        n: int,
        parameters: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Gradients of y0 and of the parameters."""
        if self.gradient == "adjoint":
            return self._adjoint(cotangents, outputs, parameters)
        if self.gradient == "reversible":
            return gradients.undoing(self, parameters, cotangents, None, y0, end, n)
        slots = self.checkpoints or max(1, math.isqrt(n))
        return gradients.checkpointing(self, parameters, cotangents, None, y0, n, slots)

    def _adjoint(
        self, cotangents: Tensor, outputs: Tensor, parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Heun's method on `da = -aᵀ ∂f/∂y dt - aᵀ ∂g/∂y ∘ dW` with y, backwards along the path."""
        noise, grid = self.noise, self.grid
        found: list[Tensor | None] = [None] * len(parameters)
        y, a = outputs[-1], cotangents[-1]
        for index in reversed(range(len(grid) - 1)):
            t, s = grid[index], grid[index + 1]
            dw = noise.increment(t, s)
            # From s to t: the change of y is -(f h + g dW), that of a is +aᵀ ∂(f h + g dW)/∂y.
            dy, pull, first = self._pulled(s, s - t, dw, y, a, parameters)
            dy1, pull1, second = self._pulled(t, s - t, dw, y - dy, a + pull, parameters)
            y, a = y - 0.5 * (dy + dy1), a + 0.5 * (pull + pull1)
            for i, pair in enumerate(zip(first, second, strict=True)):
                for part in pair:
                    if part is not None:
                        old = found[i]
                        found[i] = 0.5 * part if old is None else old + 0.5 * part
            k = self.output_of[index]
            y = self.kept.get(index, y)
            if k is not None:
                y, a = outputs[k], a + cotangents[k]
        return [a, *found]

    def _pulled(
        self,
        t: float,
        h: float,
        dw: Tensor,
        y: Tensor,
        a: Tensor,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            change = heun.change(self.noise, t, h, dw, x)
            if not change.requires_grad:
                return change, torch.zeros_like(a), [None] * len(parameters)
            pull, *rest = torch.autograd.grad(change, [x, *parameters], a, allow_unused=True)
        return change.detach(), torch.zeros_like(a) if pull is None else pull, rest
