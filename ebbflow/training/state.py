"""All that a training run carries from step to step: weights, Adam's moments, two averages."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ebbflow.training.averages import PowerAverage
from ebbflow.training.config import Config, learning_rate

WIDTHS = (0.05, 0.10)
"""Widths sigma_rel of the averages that every run keeps."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class State:
    """The network's weights, with Adam and two power function averages of them."""

    def __init__(self, net: nn.Module, config: Config) -> None:
        self.net = net
        self.config = config
        self.parameters = dict(net.named_parameters())
        self.optimizer = torch.optim.Adam(
            net.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2)
        )
        self.averages = [PowerAverage(width, net.parameters()) for width in WIDTHS]

    def update(self, step: int) -> Tensor:
        """Take step 1, 2, ... along the gradients, and return their norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages:
            average.update(self.net.parameters(), step)
        return norm.detach()

    @torch.no_grad()
    def averaged(self) -> nn.Module:
        """A copy of the network with the shorter average as its weights."""
        net = copy.deepcopy(self.net).eval()
        for own, averaged in zip(net.parameters(), self.averages[0].tensors, strict=True):
            own.copy_(averaged)
        return net

    def average_tensors(self) -> dict[str, Tensor]:
        """The averages, named `0.05/...` and `0.1/...`."""
        return {
            f"{average.sigma_rel}/{name}": tensor
            for average in self.averages
            for name, tensor in zip(self.parameters, average.tensors, strict=True)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name; Adam's moments are zero before the first step."""
        tensors = {f"net/{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            for moment in MOMENTS:
                value = moments.get(moment, torch.zeros_like(parameter))
                tensors[f"adam/{moment}/{name}"] = value
        return tensors | self.average_tensors()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Become the state after `step` that `tensors()` described."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"net/{name}"])
            moments = {
                moment: torch.empty_like(parameter).copy_(tensors[f"adam/{moment}/{name}"])
                for moment in MOMENTS
            }
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        for name, average in self.average_tensors().items():
            average.copy_(tensors[name])
