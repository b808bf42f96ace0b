"""Log-likelihoods by the probability flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebbflow.denoiser import Denoiser
from ebbflow.differentiation import odeint
from ebbflow.likelihood import traces
from ebbflow.likelihood.angle import AngleFlow, log_prior, per_sample

Divergence = Literal["exact", "hutchinson", "hutch++"]
EXACT_SIZE = 32
DIVERGENCES = ("exact", "hutchinson", "hutch++")
Gradient = Literal["direct", "checkpoint", "adjoint", "reversible"]


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    divergence: Divergence | None = None,
    samples: int | None = None,
    rtol: float = 1e-6,
    seed: int = 0,
    first_index: int = 0,
    floor: float = 1e-3,
    end: float = 1.0,
    gradient: Gradient = "direct",
    max_steps: int = 2_000,
    **condition: Any,
) -> tuple[Tensor, Tensor]:
    """Log-density in nats of each x0 (B, *shape) and its standard error, both (B,) float64.

        log p_0(x_0) = log p_1(u_1) + ∫ div f dangle,    du/dangle = f(u, angle),  u_0 = x_0

    with `AngleFlow`'s f, solved from the data by a Dormand-Prince pair whose steps each sample
    chooses for itself (rtol, relative to max(1, |u|)).

    The density is that of the data themselves, on VE too: below `floor`, a sigma/alpha, or below
    the schedule's own sigma_min, the field is extended as that of a smooth density (error about
    `floor⁴ / variance²` a coordinate). Data on a surface or on a grid of levels have no density;
    the value then grows as the floor falls: dequantise first.

    The prior at `end` is the data's own Gaussian `N(alpha m, alpha² C + sigma²)` if the denoiser
    carries statistics, else `N(0, sigma²)`, for which data of zero mean and unit deviations cost
    about 0.02 nats on VP, and a mean m costs `alpha m / sigma` nats a deviation: 0.007 m on VP,
    nothing on Cosine and Linear, 0.0125 m on VE with sigma_max = 80.

    Args:
        divergence: "exact" takes d backward passes an evaluation, error 0; "hutchinson" `samples`;
            "hutch++" 3 `samples`, of which a third are the independent values (d > samples).
            Unless given, exact up to 32 coordinates, then hutchinson. Probes are fixed along the
            path and a function of (seed, first_index + place).
        samples: probes, at least 2; unless given 16, or 64 up to 32 coordinates, where few have
            long tails. The standard error is their scatter over √samples, to which the solver's
            tolerance is added in squares.
        end: the time of the prior, in (0, 1].
        gradient: how derivatives are kept, as in `odeint`, where gradients are enabled and x0, the
            condition or what the denoiser holds asks for one; "checkpoint" saves memory.
        condition: tensors whose first axis is the batch belong to the samples.
    Raises ValueError for arguments out of range, RuntimeError where a solve does not arrive.
    Score-Based Generative Modeling through Stochastic Differential Equations, equations 39 to 40.
    """
    small = x0[:1].numel() <= EXACT_SIZE
    if divergence is None:
        divergence = "exact" if small else "hutchinson"
    if samples is None:
        samples = 64 if small and divergence == "hutchinson" else 16
    _check(denoiser, x0, divergence, samples, rtol)
    flow = AngleFlow.of(denoiser, x0, floor, end)
    batch, shape = len(x0), x0.shape[1:]
    probes = None
    if divergence != "exact":
        count = samples if divergence == "hutchinson" else 2 * samples
        probes = traces.spheres(seed, first_index, batch, count, shape).to(x0.device)
    start = x0.double()
    record = torch.is_grad_enabled() and _asks(flow, start, condition)

    def field(angle: Tensor, state: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        u, here = state[0], per_sample(condition, batch, rows)
        keep = record and torch.is_grad_enabled()
        with torch.enable_grad(), _twice_differentiable(keep):
            point = u if keep and u.requires_grad else u.detach().requires_grad_()
            slope = flow(angle.reshape(-1), point, here)
            pull = traces.Pull(slope, point, keep)
            if probes is None:
                value = traces.exact(pull)
            elif divergence == "hutchinson":
                value = traces.hutchinson(pull, probes[:, rows])
            else:
                value = traces.hutch_plus_plus(pull, probes[:, rows])
        return (slope, value) if keep else (slope.detach(), value.detach())

    zero = start.new_zeros(batch, 1 if divergence == "exact" else samples)
    with torch.set_grad_enabled(record):
        solution = odeint(
            field,
            (start, zero),
            torch.tensor([0.0, flow.last], dtype=torch.float64),
            rtol=rtol,
            atol=rtol,
            batch_dims=1,
            compact=True,
            gradient=gradient,
            max_steps=max_steps,
            full=True,
        )
        late = [i for i, status in enumerate(solution.status) if status != "done"]
        if late:
            raise RuntimeError(
                f"{len(late)} of {batch} solves did not reach the prior, such as sample {late[0]} "
                f"({solution.status[late[0]]} at angle {solution.t[late[0]].item():g} of "
                f"{flow.last:g}): raise rtol={rtol:g}, floor={floor:g} or max_steps={max_steps}"
            )
        u1, collected = (part[-1] for part in solution.ys)
        value = log_prior(flow, u1, condition) + collected.mean(1)
    if divergence == "exact":
        return value, torch.zeros_like(value.detach())
    scatter = collected.detach().std(1) / math.sqrt(samples)
    solver = rtol * (1 + collected.detach().mean(1).abs())
    return value, torch.hypot(scatter, solver)


def _twice_differentiable(wanted: bool) -> AbstractContextManager[Any]:
    """Attention of plain operations: its fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()


def _asks(flow: AngleFlow, u: Tensor, condition: Mapping[str, Any]) -> bool:
    """Whether a log-likelihood has a gradient: in x0, the condition or the denoiser's tensors."""
    if u.requires_grad:
        return True
    middle = torch.full((1,), 0.5 * (flow.first + flow.last), dtype=torch.float64)
    one = per_sample(condition, len(u), torch.zeros(1, dtype=torch.long))
    return flow(middle, u[:1], one).requires_grad


def _check(denoiser: Denoiser, x0: Tensor, divergence: str, samples: int, rtol: float) -> None:
    if not x0.is_floating_point() or x0.ndim < 2 or len(x0) == 0:
        raise ValueError(
            f"x0 must be floating and (B, *shape) with B at least 1, got {x0.dtype} "
            f"{tuple(x0.shape)}: dequantise pixels first"
        )
    denoiser.check_input(x0)
    if not bool(torch.isfinite(x0).all()):
        raise ValueError("x0 holds NaN or infinite values")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    d = x0[0].numel()
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 2:
        raise ValueError(f"samples must be an integer of at least 2, got {samples!r}")
    if divergence == "hutch++" and samples >= d:
        raise ValueError(f"hutch++ with {samples} samples in {d} dimensions: use exact")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie in (0, 1), such as 1e-6, got {rtol}")
