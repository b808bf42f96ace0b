"""A predictor that learns to rank samplers, so that fewer of them have to be measured."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ebbflow.tuning.candidates import Candidate
from ebbflow.tuning.unified import ESTIMATORS


class Predictor:
    """A small network that ranks choices: the better, the lower its value.

    It sees the nodes in lambda and every choice, one slot a step, and is fitted to pairs:
    `max(0, margin - (f(worse) - f(better)))`. Fitting goes on from where it was.
    """

    def __init__(self, nfe: int, seed: int, width: int = 64) -> None:
        self.nfe = nfe
        self.seen: dict[Candidate, list[float]] = {}
        self.generator = torch.Generator().manual_seed(seed)
        sizes = (4 + nfe * _SLOT, width, width, 1)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layer = nn.Linear(a, b, device="cpu", dtype=torch.float32)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(b, a, generator=self.generator) * a**-0.5)
                layer.bias.zero_()
            layers += [layer, nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 3e-3, weight_decay=1e-2)
        self.shift, self.scale = torch.zeros(sizes[0]), torch.ones(sizes[0])

    def _inputs(self, candidates: Sequence[Candidate]) -> Tensor:
        for candidate in candidates:
            if candidate not in self.seen:
                self.seen[candidate] = features(candidate, self.nfe)
        return torch.tensor([self.seen[candidate] for candidate in candidates]).float()

    @torch.no_grad()
    def __call__(self, candidates: Sequence[Candidate]) -> Tensor:
        """(n,)"""
        if not candidates:
            return torch.zeros(0)
        return self.net((self._inputs(candidates) - self.shift) / self.scale)[:, 0]

    def fit(self, errors: Mapping[Candidate, float], steps: int = 100, batch: int = 128) -> None:
        """Learn the order of measured choices, the newest and the best among them."""
        known = list(errors)
        inputs, truth = self._inputs(known), torch.tensor([errors[c] for c in known]).double()
        self.shift, self.scale = inputs.mean(0), inputs.std(0, correction=0) + 0.1
        inputs = (inputs - self.shift) / self.scale
        with torch.enable_grad():
            for _ in range(steps):
                some = torch.randperm(len(known), generator=self.generator)[:batch]
                value, error = self.net(inputs[some])[:, 0], truth[some]
                worse = error[:, None] > error
                gap = value[:, None] - value
                loss = torch.relu(1.0 - gap)[worse].sum() / worse.sum().clamp(min=1)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()


_SLOT = 14
"""Features a step."""


def features(candidate: Candidate, nfe: int) -> list[float]:
    """(4 + nfe * 14,): a solver of its own with its parameters, or none; where each step starts and
    ends in lambda, and its choices, one-hot."""
    lambda_ = [min(max(value, -8.0), 8.0) for value in candidate.lambda_]
    found, whole = [0.0] * 4, candidate.whole
    if whole is not None:
        found = [1.0, math.log(whole.length), math.log(whole.reach), float(whole.history)]
    for k, choice in enumerate(candidate.choices):
        found += [1.0, lambda_[k], lambda_[k + 1], float(choice.prediction == "noise")]
        found += [float(choice.order == order) for order in (1, 2, 3)]
        found += [float(choice.estimator == name) for name in ESTIMATORS]
        found += [float(choice.corrector), *(float(choice.calls == calls) for calls in (2, 3))]
    return found + [0.0] * (4 + nfe * _SLOT - len(found))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b: the share of pairs in the same order less that of those in the other, ties
    aside. Nan where one of them does not vary."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    one, two = (torch.sign(v[:, None] - v).nan_to_num(0.0) for v in (x, y))
    norm = one.abs().sum() * two.abs().sum()
    return ((one * two).sum() / norm.sqrt()).item() if norm > 0 else math.nan


def held_out_correlation(errors: Mapping[Candidate, float], nfe: int, seed: int) -> float | None:
    """Kendall's tau on a random quarter of the choices of a predictor fitted to the others; None
    for fewer than 32 of them."""
    if len(errors) < 32:
        return None
    known = list(errors)
    random.Random(seed).shuffle(known)
    cut = len(known) // 4
    predictor = Predictor(nfe, seed)
    predictor.fit({c: errors[c] for c in known[cut:]}, steps=400)
    return kendall(predictor(known[:cut]).tolist(), [errors[c] for c in known[:cut]])
