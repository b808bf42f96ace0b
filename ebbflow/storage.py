"""Models on disk: `config.json` and `model.safetensors`, the layout that the Hub mixin uses.

Nothing in these files names code to import: networks are known by name, or passed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow import networks, schedules
from ebbflow.denoiser import Denoiser
from ebbflow.files import as_list, exact_keys, read_json, replacing, write_text
from ebbflow.statistics import Statistics

FORMAT = "ebbflow-denoiser"
KEYS = (
    "format",
    "version",
    "schedule",
    "prediction",
    "time",
    "sigma_data",
    "shape",
    "network",
    "details",
)
BUNDLED = Path(__file__).parent / "models"


def bundled() -> list[str]:
    """Names of the models inside the package, for `load`."""
    folders = sorted(path.parent for path in BUNDLED.glob("*/config.json"))
    return [f.name for f in folders if read_json(f / "config.json").get("format") == FORMAT]


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
    from safetensors.torch import save as to_bytes

    net = denoiser.net
    if not isinstance(net, nn.Module):
        raise ValueError(f"only networks (nn.Module) are saved, this is a {type(net).__name__}")
    known = networks.known().get(type(net).__name__)
    network = {"name": type(net).__name__, "config": getattr(net, "config", None)}
    if known is not type(net):
        network["config"] = None
    config = {
        "format": FORMAT,
        "version": 1,
        "schedule": denoiser.schedule.config(),
        "prediction": denoiser.prediction,
        "time": denoiser.time,
        "sigma_data": denoiser.sigma_data,
        "shape": None if denoiser.shape is None else list(denoiser.shape),
        "network": network,
        "details": dict(details or {}),
    }

    def stored(value: Tensor) -> Tensor:
        value = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # tied weights
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    tensors = {f"net.{name}": stored(value) for name, value in net.state_dict().items()}
    if denoiser.statistics is not None:
        # Single precision is far finer than any estimate of statistics.
        for name, value in denoiser.statistics.tensors().items():
            tensors[f"statistics.{name}"] = value.float()
    folder = Path(folder)
    with replacing(folder / "model.safetensors") as temporary:
        temporary.write_bytes(to_bytes(tensors))
    write_text(folder / "config.json", json.dumps(config, indent=1))


def load(model: str | Path, net: Callable[..., Tensor] | None = None) -> Denoiser:
    """A denoiser from a folder, or one of the models in the package by its name.

    net: an empty network of the saved one's kind, for kinds that the library does not know; its
    weights are filled in. Weights are read as float32 from safetensors; nothing is unpickled.
    Raises ValueError for missing, unknown or contradictory content, FileNotFoundError for no model.
    """
    folder = BUNDLED / model if str(model) in bundled() else Path(model)
    if not (folder / "config.json").is_file():
        near = get_close_matches(str(model), bundled(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"no model at {str(model)!r}: neither a folder with config.json nor one of "
            f"{bundled()}{hint}"
        )
    path = folder / "config.json"
    config = read_json(path)
    if (config.get("format"), config.get("version")) != (FORMAT, 1):
        raise ValueError(
            f"{path}: format {config.get('format')!r}, version {config.get('version')!r}; "
            f"this release reads {FORMAT!r}, version 1"
        )
    exact_keys(config, KEYS, str(path))
    shape = config["shape"]
    if shape is not None and not all(type(n) is int and n > 0 for n in as_list(shape, "shape")):
        raise ValueError(f"{path}: shape {shape!r:.40} is no list of positive integers")
    tensors = _tensors(folder / "model.safetensors")
    weights = {k[4:]: v for k, v in tensors.items() if k.startswith("net.")}
    module = _network(config["network"], weights, folder) if net is None else net
    if not isinstance(module, nn.Module):
        raise ValueError(f"net must be an nn.Module to take weights, got {type(module).__name__}")
    _check_fit(module, weights, folder)
    module.load_state_dict(weights)
    module.eval()
    stored = {k[11:]: v for k, v in tensors.items() if k.startswith("statistics.")}
    return Denoiser(
        module,
        schedules.from_config(config["schedule"]),
        config["prediction"],
        shape,
        Statistics.from_tensors(stored) if stored else None,
        config["time"],
        config["sigma_data"],
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the model's weights")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}): fetch or save the model again; "
            "pickled checkpoints are never read"
        ) from error


def _network(config: Any, weights: Mapping[str, Tensor], folder: Path) -> nn.Module:
    known = networks.known()
    name = config.get("name") if isinstance(config, dict) else None
    arguments = config.get("config") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in known or arguments is None:
        raise ValueError(
            f"the network {name!r} is not one of {sorted(known)}: pass an instance, "
            "ef.load(folder, net=…)"
        )
    try:
        with torch.device("meta"):  # its shapes are checked before any memory is taken
            _check_fit(known[name](**arguments), weights, folder)
        return known[name](**arguments)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"network {name} of {arguments!r:.80}: {error}") from error


def _check_fit(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder}: the weights do not fit the network; missing {missing[:3]}, "
            f"unknown {unknown[:3]} ({len(missing)} and {len(unknown)} in all)"
        )
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, the network needs "
                f"{tuple(value.shape)}"
            )
