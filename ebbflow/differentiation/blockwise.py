"""BSVRB: many stochastic inner problems, a few of them touched a step, variance reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ebbflow.differentiation.derivatives import pullback


class Blocks(Protocol):
    """min over x of (1/m) Σ_i f_i(x, y_i),  y_i = argmin g_i(x, ·) strongly convex."""

    @property
    def count(self) -> int:
        """m."""
        ...

    def sample(self, blocks: Tensor, generator: torch.Generator) -> Any:
        """A minibatch for the blocks (I,), to be given to both functions; None if exact."""
        ...

    def outer(self, blocks: Tensor, x: Tensor, y: Tensor, sample: Any) -> Tensor:
        """f_i(x, y_i) for the blocks (I,), y (I, d) -> (I,)."""
        ...

    def inner(self, blocks: Tensor, x: Tensor, y: Tensor, sample: Any) -> Tensor:
        """g_i(x, y_i), likewise."""
        ...


@dataclass(frozen=True)
class BSVRB:
    """Steps and averaging weights.

    Steps are of a pass over all blocks: one of I blocks out of m takes I/m of each, which is what
    keeps the correction γ ~ m/I from overshooting.

    Args:
        eta, tau: steps of x and of the y_i.
        alpha, beta: of the blocks' trackers and of the outer gradient's; 1 is no memory.
        blocks: I, how many are sampled a step.
        convexity: μ, a lower bound of the curvature of every g_i, for version 1.
        version: 1 tracks d × d Hessians, 2 the solutions of their systems by products alone.
        tau_v: step of those solutions, for version 2. They follow the y_i, which follow x: where
            eta times the curvature of the outer problem is not well below tau and tau_v times μ,
            x circles, or seems to stand still.
        radius: of the ball that they stay in.
        decay: q, in [0, 1/2]: steps fall as (1 + passes)^-q and beta as its square. Without it x
            ends in a neighbourhood of the answer. alpha stays: trackers must forget their errors.
    """

    eta: float = 0.05
    tau: float = 0.2
    alpha: float = 0.5
    beta: float = 0.5
    blocks: int = 1
    convexity: float = 1e-2
    version: int = 1
    tau_v: float = 0.2
    radius: float = 1e3
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"version {self.version} must be 1 or 2")
        if not 0 <= self.decay <= 0.5:
            raise ValueError(f"decay {self.decay} must be in [0, 0.5]")
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in (0, 1]")


class Progress(NamedTuple):
    """x, the y_i (m, d), and the outer gradient's estimate z, after a step."""

    x: Tensor
    y: Tensor
    z: Tensor


class Derivatives(NamedTuple):
    """What one sample gives at one point: ∇ₓf, ∇ᵧf, ∇ᵧg (I, ·) and products with g's Hessians."""

    f_x: Tensor
    f_y: Tensor
    g_y: Tensor
    cross: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]


def derivatives(problem: Blocks, blocks: Tensor, x: Tensor, y: Tensor, sample: Any) -> Derivatives:
    """`cross(v)` is (1/I) Σ_i ∂²ₓᵧg_i v_i, of the shape of x, `hessian(v)` ∂²ᵧᵧg_i v_i."""

    def gradient(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        value, pull = pullback(lambda x, y: function(blocks, x, y, sample).sum(), x, y)
        return pull(torch.ones_like(value))

    f_x, f_y = gradient(problem.outer, x, y)
    g_y, pull = pullback(lambda x, y: gradient(problem.inner, x, y)[1], x, y)
    size = len(blocks)
    return Derivatives(f_x / size, f_y, g_y, lambda v: pull(v)[0] / size, lambda v: pull(v)[1])


@torch.no_grad()
def bsvrb(
    problem: Blocks,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    seed: int = 0,
    settings: BSVRB | None = None,
    on_step: Callable[[int, Progress], None] | None = None,
) -> Progress:
    """`steps` steps from x and y (m, d).

        u_i <- (1-α) u_i + α h_i(w_t) + γ (h_i(w_t) - h_i(w_{t-1})),  γ = (m-I)/(I(1-α)) + (1-α)

    tracks each sampled block's h_i (gradient and Hessian, or system's residual), the outer
    gradient by z <- (1-β)(z - G(w_{t-1})) + G(w_t), both terms on one sample.

    Raises:
        FloatingPointError: a step was not finite: the steps are too long.

    Blockwise Stochastic Variance-Reduced Methods with Parallel Speedup for Multi-Block Bilevel
    Optimization, algorithms 1 and 2.
    """
    how = BSVRB() if settings is None else settings
    m, size = problem.count, how.blocks
    if not 1 <= size <= m or len(y) != m:
        raise ValueError(f"blocks {size} must be in 1..{m}, and y {tuple(y.shape)} of {m} rows")
    generator = torch.Generator().manual_seed(seed)
    gamma = (m - size) / (size * (1 - how.alpha)) + 1 - how.alpha if how.alpha < 1 else 0.0
    every, part = torch.arange(m), size / m

    def hessians(d: Derivatives) -> Tensor:
        eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        return torch.vmap(lambda row: d.hessian(row.expand_as(d.g_y)))(eye).movedim(0, -2)

    def track(u: Tensor, now: Tensor, before: Tensor, blocks: Tensor) -> Tensor:
        new = u.clone()
        new[blocks] = (1 - how.alpha) * u[blocks] + how.alpha * now + gamma * (now - before)
        return new

    first = derivatives(problem, every, x, y, problem.sample(every, generator))
    s, v = first.g_y, torch.zeros_like(y)
    second = hessians(first) if how.version == 1 else -first.f_y
    x_old, y_old, v_old, second_old = x, y, v, second

    def direction(d: Derivatives, blocks: Tensor, v: Tensor, second: Tensor) -> Tensor:
        if how.version == 2:
            return d.f_x - d.cross(v[blocks])
        h = second[blocks]
        values, vectors = torch.linalg.eigh((h + h.mT) / 2)
        values = values.clamp_min(how.convexity)
        solved = vectors @ ((vectors.mT @ d.f_y.unsqueeze(-1)) / values.unsqueeze(-1))
        return d.f_x - d.cross(solved.squeeze(-1))

    # On all blocks: what one block has too much of, small weights would not forget.
    z = direction(first, every, v, second)
    for k in range(steps):
        fall = (1 + k * part) ** -how.decay
        eta, tau, tau_v = (part * fall * step for step in (how.eta, how.tau, how.tau_v))
        beta = how.beta * fall**2
        blocks = torch.randperm(m, generator=generator)[:size]
        sample = problem.sample(blocks, generator)
        now = derivatives(problem, blocks, x, y[blocks], sample)
        old = derivatives(problem, blocks, x_old, y_old[blocks], sample)
        s = track(s, now.g_y, old.g_y, blocks)
        if how.version == 1:
            new_second, new_v = track(second, hessians(now), hessians(old), blocks), v
        else:
            residual = now.hessian(v[blocks]) - now.f_y
            residual_old = old.hessian(v_old[blocks]) - old.f_y
            new_second = track(second, residual, residual_old, blocks)
            step = v - tau_v * new_second
            length = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
            new_v = step * (how.radius / length.clamp_min(how.radius))
        g = direction(now, blocks, v, new_second)
        g_old = direction(old, blocks, v_old, second_old if how.version == 1 else new_second)
        z = (1 - beta) * (z - g_old) + g
        x_old, y_old, v_old, second_old = x, y, v, new_second
        # All blocks move along what is tracked of them; γ counts on w changing every step.
        y = y - tau * s
        x, v, second = x - eta * z, new_v, new_second
        if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
            raise FloatingPointError(
                f"step {k} is not finite: shorten eta {how.eta}, tau {how.tau}, tau_v {how.tau_v}"
            )
        if on_step is not None:
            on_step(k, Progress(x, y, z))
    return Progress(x, y, z)
