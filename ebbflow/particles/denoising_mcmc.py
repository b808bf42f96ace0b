"""Denoising Langevin Gibbs: chains over data and noise level, and short solves from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow import grids, noise, solvers
from ebbflow.denoiser import Denoiser
from ebbflow.oracles import GaussianMixture
from ebbflow.sampling import sample
from ebbflow.schedules import Schedule, along
from ebbflow.solvers import Solver
from ebbflow.solvers.stepping import cut

LevelLogits = Callable[[Tensor], Tensor]
"""`level_logits(y) -> (B, levels)`: log p(level | y) up to a constant, `y = x_0 + r eps`."""


class Emission(NamedTuple):
    """One sample a chain, (B, *shape), and what it was solved from: `state` y, at times (B,)."""

    samples: Tensor
    state: Tensor
    times: Tensor


def denoising_mcmc(
    denoiser: Denoiser,
    y_init: Tensor,
    *,
    times: Sequence[float],
    level_logits: LevelLogits,
    emissions: int,
    step: float = 0.5,
    skip: int = 10,
    lowest: bool = True,
    solver: str | Solver = "auto",
    steps: int = 5,
    seed: int = 0,
    **condition: Any,
) -> Iterator[Emission]:
    """Yield `emissions` batches of samples of B chains on `p(y, level) = p(level) p(y | level)`.

        y     <- y + (h/2) grad log p(y | level) + sqrt(h) Z,   h = min(step, r²)
        level ~  p(level | y)                                   y = x_t / alpha, r = sigma / alpha

    After every `skip` such moves, y is solved down to data from its level, in `steps` steps. Chains
    cross between modes at high levels and are close to the data at low ones. One call a move and
    about `steps` a sample; the levels differ by chain, so a solve is made for each that occurs.
    A constant step, the paper's, explodes at levels with r² far below it: hence the minimum.

    Args:
        y_init: (B, *shape); starts at the level that it is given by its logits.
        times: of the levels (L,), each with signal and noise.
        level_logits: of a classifier, or `exact_levels` of an oracle.
        lowest: emit the state of lowest level since the last emission (the paper's rule, cheap to
            solve but no exact draw of the chain's law) rather than the present one.
        solver: deterministic. condition: for the denoiser; tensors over the chains are cut.

    Raises ValueError for a stochastic solver, levels without signal or noise, or wrong shapes.
    Denoising MCMC for Accelerating Diffusion-Based Generative Models, algorithm 1 (DLG).
    """
    solver = solvers.get(solver) if isinstance(solver, str) else solver
    if solver.stochastic:
        raise ValueError(f"{solver.name} is stochastic: solve with a deterministic one, as ddim")
    if skip < 1 or emissions < 1 or not step > 0:
        raise ValueError(f"skip {skip}, emissions {emissions} >= 1 and step {step} > 0 are needed")
    schedule, indices = denoiser.schedule, range(len(y_init))
    grid = torch.tensor(tuple(times), dtype=torch.float64)
    alphas, ratios = schedule.alpha(grid), _ratios(schedule, grid)
    y, moves = y_init, 0
    level = _draw(level_logits(y), len(grid), seed, moves)
    for _ in range(emissions):
        best, best_level = y, level
        for i in range(skip):
            moves += 1
            r, alpha, t = ratios[level], alphas[level], grid[level]
            with torch.no_grad():
                x0 = denoiser.at(t, y)(y * along(alpha, y).to(y), **condition)
            h = torch.minimum(torch.full_like(r, step), r**2)
            z = noise.normal(seed, indices, moves, y.shape[1:], y.dtype, y.device, stream=3)
            y = y + along(h / (2 * r**2), y).to(y) * (x0 - y) + along(h.sqrt(), y).to(y) * z
            level = _draw(level_logits(y), len(grid), seed, moves)
            better = (ratios[level] < ratios[best_level]) | torch.tensor(i == 0 or not lowest)
            best = torch.where(along(better, y).to(y.device), y, best)
            best_level = torch.where(better, level, best_level)
        samples = torch.empty_like(best)
        for j in best_level.unique().tolist():
            rows = best_level == j
            nodes = _down(schedule, float(grid[j]), steps)
            own = {name: cut(value, rows, len(rows)) for name, value in condition.items()}
            x = best[rows] * alphas[j].item()
            samples[rows] = sample(
                denoiser, x.shape, solver=solver, times=nodes, x_init=x, denoise=True, **own
            ).to(samples)
        yield Emission(samples, best, grid[best_level])


def exact_levels(
    oracle: GaussianMixture, schedule: Schedule, times: Sequence[float]
) -> LevelLogits:
    """`log p(y | level)` of a mixture at these times: the exact posterior of even levels."""
    grid = torch.tensor(tuple(times), dtype=torch.float64)
    unit = torch.eye(oracle.means.shape[1], dtype=torch.float64)
    noisy = [
        GaussianMixture(oracle.means, oracle.covariances + r**2 * unit, oracle.weights)
        for r in _ratios(schedule, grid)
    ]
    return lambda y: torch.stack([law.log_prob(y) for law in noisy], 1)


def _ratios(schedule: Schedule, grid: Tensor) -> Tensor:
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    if grid.ndim != 1 or len(grid) < 1 or not bool(((alpha > 0) & (sigma > 0)).all()):
        raise ValueError(f"times {grid.tolist()}: levels need signal and noise, inside (0, 1)")
    return sigma / alpha


def _draw(logits: Tensor, levels: int, seed: int, move: int) -> Tensor:
    """A level a chain, by the inverse of its distribution function."""
    if logits.ndim != 2 or logits.shape[1] != levels:
        raise ValueError(f"level_logits gave {tuple(logits.shape)}, expected (B, {levels})")
    z = noise.normal(seed, range(len(logits)), move, (1,), torch.float64, stream=4)
    total = torch.softmax(logits.detach().double().cpu(), 1).cumsum(1)
    return torch.searchsorted(total, torch.special.ndtr(z))[:, 0].clamp(max=levels - 1)


def _down(schedule: Schedule, t: float, steps: int) -> tuple[float, ...]:
    """`steps` steps from t to 0, even in the angle atan(sigma/alpha)."""
    now, end = torch.tensor(t, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    high, low = (torch.atan2(schedule.sigma(v), schedule.alpha(v)) for v in (now, end))
    share = torch.arange(1, grids.check_steps(steps), dtype=torch.float64) / steps
    inner = schedule.time(-2 * torch.log(torch.tan(high + (low - high) * share)))
    return (t, *inner.tolist(), 0.0)
