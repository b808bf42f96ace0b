"""FlowTurbo's velocity refiner: late velocities hardly change, so a small network says by how much.

Everything here lives on the straight path: `y = x/(alpha + sigma) = (1 - tau) x_0 + tau eps`, with
`tau = sigma/(alpha + sigma)` and the velocity `v = dy/dtau = eps - D`, the same for every schedule.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow.denoiser import Denoiser
from ebbflow.progress import bar
from ebbflow.schedules import along
from ebbflow.solvers.stepping import cut
from ebbflow.solvers.straight import span
from ebbflow.tuning.cost import operations

SMALLEST = 0.005
"""The least tau of training: at tau = 0 there is no noise, and the network has no velocity."""

logger = logging.getLogger("ebbflow")


class Beside(nn.Module):
    """A network of one input as one of two: it sees y and v side by side, along the first axis of a
    sample, and the half of its output that stands where y does is the answer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, y: Tensor, v: Tensor, tau: Tensor, **condition: Any) -> Tensor:
        return self.body(torch.cat((y, v), 1), tau, **condition)[:, : y.shape[1]]


def small_network(shape: Sequence[int], width: int = 64) -> nn.Module:
    """A refiner's network for samples (d,) or (C, H, W): one block, whose answer is 0 at first."""
    from ebbflow.networks import MLP, UNet

    if len(shape) == 1:
        return Beside(MLP(2 * shape[0], width, 1))
    if len(shape) == 3 and shape[1] == shape[2]:
        return Beside(UNet(2 * shape[0], shape[1], width, (1,), 1, ()))
    raise ValueError(
        f"there is no small network for samples of shape {tuple(shape)}: (d,) and (C, H, H) have "
        "one; pass network=, called as network(y, v, tau, **condition)"
    )


class Refiner(nn.Module):
    """`v(y', tau') = v + r(y', v, tau')`, for a velocity v known a little before tau'.

    Args:
        network: r, called as `network(y', v, tau', **condition)` with y' and v (B, *shape), in
            units of `scale`, and tau' (B,) in [0, 1]; it returns (B, *shape).
        scale: of states and velocities, positive.
        remaining: share of the mean square of `v(y', tau') - v` that r leaves, on data that it was
            not trained with: 0 is exact, 1 no better than to keep v.
    """

    def __init__(self, network: nn.Module, scale: float = 1.0, remaining: float = math.nan) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.network, self.remaining = network, remaining
        self.scale: Tensor  # a buffer, so that it is saved with the weights
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float64))

    def forward(self, y: Tensor, v: Tensor, tau: float | Tensor, **condition: Any) -> Tensor:
        """The velocity at y (B, *shape), tau () or (B,), from a velocity v before it."""
        own = next((p.dtype for p in self.network.parameters()), y.dtype)
        clock = torch.as_tensor(tau, dtype=torch.float64, device=y.device).expand(len(y))
        clock = clock.to(torch.promote_types(own, torch.float32))
        inputs = (z.to(own) / self.scale for z in (y, v))
        change = self.network(*inputs, clock, **condition)
        if change.shape != y.shape:
            raise ValueError(
                f"the refiner's network returned shape {tuple(change.shape)} for a state of shape "
                f"{tuple(y.shape)}: they must be equal"
            )
        return v + self.scale * change.to(y.dtype)


def cost_share(
    refiner: Refiner, denoiser: Denoiser, shape: Sequence[int], **condition: Any
) -> float:
    """Multiplications of one call of the refiner over those of one call of the denoiser.

    shape: (B, *shape). Counted by torch in matrix products and convolutions, which oracles lack.
    Raises ValueError where the denoiser has none.
    """
    x = torch.zeros(tuple(shape))
    whole = operations(lambda: denoiser(x, 0.5, **condition))
    if not whole:
        raise ValueError("the denoiser multiplies no matrices: compare costs by other means")
    return operations(lambda: refiner(x, x, 0.5, **condition)) / whole


def velocity(denoiser: Denoiser, y: Tensor, tau: Tensor, **condition: Any) -> Tensor:
    """`v = (y - D)/tau` at y (B, *shape) and tau (B,), inside (0, 1)."""
    tau = tau.double()
    t = denoiser.schedule.time(2 * torch.log((1 - tau) / tau))
    size = denoiser.schedule.alpha(t) + denoiser.schedule.sigma(t)
    clean = denoiser(y * along(size, y).to(y.dtype), t, **condition)
    return (y - clean) / along(tau, y).to(y.dtype)


@dataclass(frozen=True)
class _Draws:
    """Pairs of states along the flow from rows first to last of the data, and their velocities."""

    denoiser: Denoiser
    data: Tensor
    width: float
    condition: dict[str, Any]
    generator: torch.Generator
    first: int
    last: int

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """y' , v before, tau' and v', and the condition: `y' = y + (tau' - tau) v(y, tau)`."""
        rows = torch.randint(self.first, self.last, (count,), generator=self.generator)
        u = torch.rand(2, count, dtype=torch.float64, generator=self.generator)
        x0 = self.data[rows]
        shape = x0.shape
        eps = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        high, low = span(self.denoiser.schedule)
        low, high = max(low, SMALLEST), min(high, 1 - SMALLEST)
        tau = low + (high - low) * u[0]
        after = (tau - self.width * u[1]).clamp(min=low)
        share, part = along(tau, x0), along(after - tau, x0).to(x0.dtype)
        y = ((1 - share) * x0 + share * eps.to(x0.device)).to(x0.dtype)
        condition = {name: cut(c, rows, len(self.data)) for name, c in self.condition.items()}
        before = velocity(self.denoiser, y, tau, **condition)
        moved = y + part * before
        return moved, before, after, velocity(self.denoiser, moved, after, **condition), condition


def train_refiner(
    denoiser: Denoiser,
    data: Tensor,
    network: nn.Module | None = None,
    *,
    steps: int = 2000,
    batch: int = 256,
    learning_rate: float = 2e-3,
    width: float = 0.12,
    seed: int = 0,
    budget_seconds: float | None = None,
    progress: bool = False,
    **condition: Any,
) -> Refiner:
    """Train r to minimise `|v(y, tau) + r(y', v(y, tau), tau') - v(y', tau')|²`.

        y = (1 - tau) x_0 + tau eps,   y' = y + (tau' - tau) v(y, tau),   tau - tau' ~ U(0, width)

    Two calls of the denoiser a step, without gradients; Adam, whose rate falls to 0 as a cosine.

    Args:
        data: x_0, (N, *shape), on the denoiser's device; a tenth of it is kept for `remaining`.
        network: r, `network(y, v, tau, **condition)`; `small_network` unless given.
        width: the largest step in tau, in (0, 1); the paper's 0.12.
        budget_seconds: stop after this time; the result then depends on the machine.
        condition: passed to both networks; tensors whose first axis is N are cut by sample.

    Raises ValueError for data that do not fit and FloatingPointError for a loss that is not finite.
    FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner, equation 7.
    """
    _check(denoiser, data, steps, batch, width, budget_seconds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = small_network(data.shape[1:]) if network is None else network
    scale = math.sqrt(data.double().square().mean().item() + 1)
    refiner = Refiner(network.to(data.device), scale)
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, len(data) // 10)

    draws = partial(_Draws, denoiser, data, width, condition, generator)
    training, held_out = draws(kept, len(data)), draws(0, kept)
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    began, done = time.monotonic(), 0.0
    refiner.train()
    with bar("training the refiner", steps, progress) as advance:
        for step in range(steps):
            if budget_seconds is not None:
                done = (time.monotonic() - began) / budget_seconds
            done = max(done, step / steps)
            if done >= 1:
                logger.info("the refiner's budget ended after %d of %d steps", step, steps)
                break
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            with torch.no_grad():
                y, before, tau, after, given = training.batch(batch)
            with torch.enable_grad():
                loss = (refiner(y, before, tau, **given) - after).square().mean()
                optimiser.zero_grad()
                loss.backward()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the refiner's loss is {loss.item()} at step {step + 1}")
            optimiser.step()
            advance()
    refiner.eval()
    with torch.no_grad():
        y, before, tau, after, given = held_out.batch(4 * batch)
        left = (refiner(y, before, tau, **given) - after).square().mean()
        refiner.remaining = (left / (before - after).square().mean()).item()
    logger.info("the refiner leaves %.1f%% of the velocities' change", 100 * refiner.remaining)
    return refiner


def _check(
    denoiser: Denoiser, data: Tensor, steps: int, batch: int, width: float, budget: float | None
) -> None:
    if data.ndim < 2 or len(data) < 2 or not data.is_floating_point():
        raise ValueError(
            f"data is {data.dtype} of shape {tuple(data.shape)}: give floats (N, *shape), N >= 2"
        )
    if denoiser.shape is not None and tuple(data.shape[1:]) != denoiser.shape:
        raise ValueError(
            f"data of shape {tuple(data.shape)}: this denoiser takes (N, *{denoiser.shape})"
        )
    if not bool(torch.isfinite(data).all()):
        raise ValueError("data holds NaN or infinite values")
    if steps < 1 or batch < 1 or not 0 < width < 1 or not (budget is None or budget > 0):
        raise ValueError(
            f"steps {steps} and batch {batch} must be at least 1, width {width} in (0, 1) and "
            f"budget_seconds {budget} positive"
        )
