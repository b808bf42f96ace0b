"""The library's default: the Gaussian residual, with the data's statistics and without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebbflow.bases import Basis
from ebbflow.solvers.quadrature import Auto as Auto
from ebbflow.solvers.quadrature import GaussianResidual
from ebbflow.statistics import Statistics


@dataclass(frozen=True)
class UnitResidual(GaussianResidual):
    """The same with nothing known, but the mean where a denoiser knows that of each sample.

    Variance 1 in every direction, and nodes that reach further and fall off slower, since the
    data's largest deviation may be several times 1. Mean 0, about which `sample` centres the plan.
    With L = 1, r is interpolated in the angle's sine: v-prediction with an exact linear part.
    """

    reach: float = 7.5
    decay: float = 1.5

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def about_mean(self, statistics: Statistics | None) -> bool:
        return True

    def _axes(self, statistics: Statistics | None) -> tuple[Basis | None, Tensor, Tensor]:
        return None, torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


OWN = "Ebbflow's own: Gaussian-residual quadrature"
residual = GaussianResidual("gaussian-residual", 2, 2, OWN)
unit = UnitResidual("unit-residual", 2, 2, OWN)
