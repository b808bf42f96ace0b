"""Small networks that ship with the library; they know nothing of diffusion.

Every network is called `net(x, time, label=None)` with `time` a float tensor (B,), and keeps its
constructor arguments, as JSON values, in `.config`, from which it can be built again.
"""

from __future__ import annotations

from torch import nn

from ebbflow.networks.embedding import Conditioning, FourierFeatures
from ebbflow.networks.mlp import MLP
from ebbflow.networks.unet import UNet

__all__ = ["MLP", "Conditioning", "FourierFeatures", "UNet", "count_parameters", "known"]


def known() -> dict[str, type[nn.Module]]:
    """Return the networks that a saved model may name, by class name."""
    return {"MLP": MLP, "UNet": UNet}


def count_parameters(net: nn.Module) -> int:
    """Return the number of trainable scalars of a network."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
