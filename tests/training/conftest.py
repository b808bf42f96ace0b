"""A run that takes a second: 8x8 pictures of three classes and a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ebbflow.data import Images
from ebbflow.denoiser import Denoiser
from ebbflow.networks import UNet
from ebbflow.schedules import Cosine
from ebbflow.training import Config, train


def pictures(count: int = 24) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 3, ("a", "b", "c"))


def small_denoiser() -> Denoiser:
    torch.manual_seed(0)
    net = UNet(1, 8, width=8, multipliers=(1, 1), blocks=1, attention=(4,), classes=3, embedding=16)
    return Denoiser(net, Cosine(), "edm", (1, 8, 8), time="angle", sigma_data=0.6)


CONFIG = Config(
    images=80, batch=8, warmup=2, decay_start=4, checkpoint_every=3, log_every=2, validate_every=0
)


@pytest.fixture
def config() -> Config:
    return CONFIG


@pytest.fixture
def images() -> Images:
    return pictures()


@pytest.fixture
def denoiser() -> Denoiser:
    return small_denoiser()


@pytest.fixture
def run() -> Callable[..., dict[str, torch.Tensor]]:
    """Train a fresh small network in a folder and return its final weights."""

    def run(
        folder: Path, options: dict[str, Any] | None = None, **arguments: Any
    ) -> dict[str, torch.Tensor]:
        denoiser = arguments.pop("denoiser", None) or small_denoiser()
        data = arguments.pop("images", None) or pictures()
        config = replace(CONFIG, **(options or {}))
        train(denoiser, data, config, folder, device="cpu", **arguments)
        net: Any = denoiser.net
        return net.state_dict()

    return run
