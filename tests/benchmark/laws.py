"""A Gaussian, whose paths are known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebbflow.benchmark.measure import Case
from ebbflow.benchmark.problems import Problem, of_law
from ebbflow.oracles import GaussianMixture

MEAN = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64)
VARIANCES = torch.tensor([0.02, 0.3, 1.1], dtype=torch.float64)


def gaussian(setting: str = "vp") -> Problem:
    law = GaussianMixture(MEAN[None], VARIANCES.diag()[None], torch.ones(1))
    return of_law("gaussian", setting, law)


def exact(case: Case, ratio: float) -> Tensor:
    """y = x/alpha at sigma/alpha = `ratio`: w = (y - m) / sqrt(L + ratio²) never changes."""
    if math.isinf(case.top):
        w = case.noise
    else:
        w = (case.top * case.noise - MEAN) / torch.sqrt(VARIANCES + case.top**2)
    return MEAN + w * torch.sqrt(VARIANCES + ratio**2)
