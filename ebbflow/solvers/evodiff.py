"""EVODiff: steps whose weights are fitted to each sample's last predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebbflow.solvers.channels import share
from ebbflow.solvers.stepping import Model, Stepping, Walk, first_order, levels


class Past(NamedTuple):
    """Where the walk ends; the prediction at this node and the one before, and that node."""

    end: float
    now: Tensor | None = None
    before: Tensor | None = None
    time: float = math.nan


@dataclass(frozen=True)
class EVODiff(Stepping):
    """A step in `alpha/sigma` with two fitted differences of predictions.

        x_E = (sigma'/sigma) x + sigma' h m_0,   h = alpha'/sigma' - alpha/sigma
        x_p = x_E + sigma' h D_1 / (2 r_i),   D_1 = m_0 - r_1 m_1,   m_t = D(x_p, s)
        x'  = x_E + sigma' h B / (2 zeta),   B = (1 - eta) r D_2 - (eta/r) D_1,  D_2 = m_t - r_2 m_0

    m_1 is the prediction at the node before, r the last step in log(alpha/sigma) over this one;
    r_1, r_2, r_i, eta and zeta follow from inner products of predictions, one each sample and
    channel. m_t is the next m_0: one evaluation a step. The first step, the one after
    alpha = 0, and the last are x_E. The fitted weights do not tend to those of a second-order
    method: order 1. Where the paper has times and noise levels, here are angles atan(sigma/alpha)
    and sigma/alpha, the same for every schedule.
    EVODiff: Entropy-aware Variance Optimized Diffusion Inference, algorithm 1.
    """

    def initial(self, model: Model, x: Tensor, walk: Walk) -> Past:
        return Past(walk.times[-1])

    def step(self, model: Model, x: Tensor, t: float, s: float, state: Past) -> Any:
        schedule, last = model.schedule, s == state.end
        m0, m1 = model(x, t) if state.now is None else state.now, state.before
        euler = first_order(schedule, x, m0, t, s)
        if last or m1 is None or not schedule.alpha(state.time).item():
            return euler, m0, Past(state.end, None if last else model(euler, s), m0, t)
        places = [levels(schedule, time) for time in (state.time, t, s)]
        k1, k0, k = (sigma / alpha if alpha else math.inf for alpha, sigma in places)
        half, r = places[2][1] * (1 / k - 1 / k0) / 2, math.log(k1 / k0) / math.log(k0 / k)
        base, w = math.sqrt(k * k1) / k0, 0.5 * (1 - (2 / math.pi * math.atan(k)) ** 2)
        r1 = (1 - w) * base + w * share(m0, m1)
        d1 = m0 - r1 * m1
        ri = (torch.sigmoid(0.25 * r1.abs()) * r).clamp(0.25 * r, 1.5 * r)
        mt = model(euler + half / ri * d1, s)
        past, new = d1 / r, r * (mt - ((1 - w) * base + w * share(mt, m0)) * m0)
        eta = 0.5 * torch.sigmoid((0.5 * share(new + past, new - past)).abs())
        b = (1 - eta) * new - eta * past
        zeta = torch.sigmoid((share(half / ri * (d1 - b), d1) / (2 * half)).abs() - 0.5)
        return euler + half / zeta * b, m0, Past(state.end, mt, m0, t)


evodiff = EVODiff("evodiff", 1, 2, "EVODiff: Entropy-aware Variance Optimized Diffusion Inference")
