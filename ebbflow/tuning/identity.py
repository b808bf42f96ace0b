"""Which model a tuned plan belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ebbflow.denoiser import Denoiser


def identity(denoiser: Denoiser) -> dict[str, Any]:
    """What tells a model from others, as JSON values.

    The prediction, clock and shape of the network inside, how many parameters it has and the first
    16 digits of the SHA-256 of their bytes, and the wrappers around it with their numbers.
    """
    wrappers = []
    while isinstance(denoiser.net, Denoiser):
        own = {name: v for name, v in vars(denoiser).items() if type(v) in (int, float, str)}
        wrappers.append({"wrapper": type(denoiser).__name__} | _public(own))
        denoiser = denoiser.net
    values = list(denoiser.state_dict().items())
    digest = hashlib.sha256()
    for name, value in values:
        digest.update(name.encode())
        plain = value.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return {
        "prediction": denoiser.prediction,
        "time": denoiser.time,
        "shape": None if denoiser.shape is None else list(denoiser.shape),
        "parameters": sum(value.numel() for _, value in values),
        "weights": digest.hexdigest()[:16] if values else None,
        "wrappers": wrappers,
    }


def _public(values: dict[str, Any]) -> dict[str, Any]:
    # What an nn.Module and every Denoiser have of their own says nothing.
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in ("prediction", "time", "sigma_data")
    }
