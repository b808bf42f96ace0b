"""Classifier two-sample test."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebbflow.metrics._vectors import pair


class TwoSampleTest(NamedTuple):
    """Held-out accuracy (1/2 for equal laws), its one-sided p-value, and how many were held out."""

    accuracy: float
    p_value: float
    held_out: int


def classifier_two_sample_test(
    x: Tensor, y: Tensor, *, hidden: int = 64, steps: int = 300, seed: int = 0
) -> TwoSampleTest:
    """Train a small network to tell sets (n, d) and (m, d) apart and test it on the held-out half.

    Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", §3. The larger set is thinned to
    the size of the smaller, and half of each is held out; `hidden=0` is logistic regression. The
    p-value is the binomial probability of at least as many hits by guessing.
    """
    x, y = pair(x, y, least=4)
    size = min(len(x), len(y))
    half = size // 2
    generator = torch.Generator().manual_seed(seed)
    sets = [s[torch.randperm(len(s), generator=generator)[:size]] for s in (x, y)]
    held_out = torch.cat([s[:half] for s in sets])
    training = torch.cat([s[half:] for s in sets])
    centre, spread = training.mean(0), training.std(0)
    spread = torch.where(spread > 0, spread, 1.0)
    network = _fit(((training - centre) / spread).float(), hidden, steps, seed)
    with torch.no_grad():
        guesses = network(((held_out - centre) / spread).float())[:, 0] > 0
    hits = int((~guesses[:half]).sum() + guesses[half:].sum())
    return TwoSampleTest(hits / (2 * half), _tail(hits, 2 * half), 2 * half)


def _fit(x: Tensor, hidden: int, steps: int, seed: int) -> nn.Sequential:
    """A network that is positive on the second half of the rows of `x`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(x.shape[1], hidden), nn.SiLU()] if hidden else []
        network = nn.Sequential(*layers, nn.Linear(hidden or x.shape[1], 1)).to(x.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    target = (torch.arange(len(x), device=x.device) >= len(x) // 2)[:, None].to(x.dtype)
    with torch.enable_grad():
        for _ in range(steps):
            loss = nn.functional.binary_cross_entropy_with_logits(network(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def _tail(hits: int, trials: int) -> float:
    """P(at least `hits` of `trials` fair coins)."""
    k = torch.arange(hits, trials + 1, dtype=torch.float64)
    log_choose = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    return min(1.0, float((log_choose - trials * math.log(2.0)).logsumexp(0).exp()))
