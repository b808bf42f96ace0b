"""Denoisers on disk: a network's folder with the facts of a denoiser in its `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow import folders, schedules
from ebbflow.denoiser import Denoiser
from ebbflow.files import as_list
from ebbflow.statistics import Statistics

FORMAT = "ebbflow-denoiser"
FACTS = ("schedule", "prediction", "time", "sigma_data", "shape", "details")


def bundled() -> list[str]:
    """Names of the models inside the package, for `load`."""
    return folders.bundled(FORMAT)


def save(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write a denoiser's network, schedule and facts; each file appears whole or not at all.

    dtype: of the stored weights, such as torch.float16; their own unless given.
    details: JSON values for a reader (training command, class names).
    """
    config = {
        "format": FORMAT,
        "version": 1,
        "schedule": denoiser.schedule.config(),
        "prediction": denoiser.prediction,
        "time": denoiser.time,
        "sigma_data": denoiser.sigma_data,
        "shape": None if denoiser.shape is None else list(denoiser.shape),
        "details": dict(details or {}),
    }
    known = {} if denoiser.statistics is None else denoiser.statistics.tensors()
    # Single precision is far finer than any estimate of statistics.
    tensors = {f"statistics.{name}": value.float() for name, value in known.items()}
    folders.write(denoiser.net, folder, config, tensors, dtype)


def load(model: str | Path, net: Callable[..., Tensor] | None = None) -> Denoiser:
    """A denoiser from a folder, or one of the models in the package by its name.

    net: an empty network of the saved one's kind, for kinds that the library does not know; its
    weights are filled in. Weights are read as float32 from safetensors; nothing is unpickled.
    Raises ValueError for missing, unknown or contradictory content, FileNotFoundError for no model.
    """
    keys = ("format", "version", "network", *FACTS)
    module, config, tensors = folders.read(model, FORMAT, keys, net)
    shape = config["shape"]
    if shape is not None and not all(type(n) is int and n > 0 for n in as_list(shape, "shape")):
        raise ValueError(f"{model}: shape {shape!r:.40} is no list of positive integers")
    known = {k.removeprefix("statistics."): v for k, v in tensors.items()}
    return Denoiser(
        module,
        schedules.from_config(config["schedule"]),
        config["prediction"],
        shape,
        Statistics.from_tensors(known) if known else None,
        config["time"],
        config["sigma_data"],
    )
