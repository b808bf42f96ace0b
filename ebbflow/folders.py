"""Networks on disk: `config.json` and `model.safetensors`, the layout that the Hub mixin uses.

Nothing in these files names code to import: networks are known by name, or passed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow import networks
from ebbflow.files import exact_keys, read_json, read_tensors, write_tensors, write_text

BUNDLED = Path(__file__).parent / "models"


def bundled(kind: str) -> list[str]:
    """Names of the models of this format inside the package."""
    found = sorted(path.parent for path in BUNDLED.glob("*/config.json"))
    return [f.name for f in found if read_json(f / "config.json").get("format") == kind]


def write(
    net: Any,
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a network's weights, further tensors and facts; each file appears whole or not at all.

    dtype: of the stored weights; their own unless given.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"only networks (nn.Module) are saved, this is a {type(net).__name__}")
    name = type(net).__name__
    own = networks.known().get(name) is type(net)
    network = {"name": name, "config": getattr(net, "config", None) if own else None}

    def stored(value: Tensor) -> Tensor:
        value = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # tied weights
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    weights = {f"net.{name}": stored(value) for name, value in net.state_dict().items()}
    folder = Path(folder)
    write_tensors(folder / "model.safetensors", {**weights, **tensors})
    write_text(folder / "config.json", json.dumps({**config, "network": network}, indent=1))


def read(
    model: str | Path, kind: str, keys: Collection[str], net: Callable[..., Tensor] | None
) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    """The network, the facts `keys` and the tensors beside the weights, from a folder or a name.

    net: an empty network to fill, for kinds that the library does not know.
    Raises ValueError for missing, unknown or contradictory content, FileNotFoundError for no model.
    """
    names = bundled(kind)
    folder = BUNDLED / model if str(model) in names else Path(model)
    path = folder / "config.json"
    if not path.is_file():
        near = get_close_matches(str(model), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"no model at {str(model)!r}: neither a folder with config.json nor one of "
            f"{names}{hint}"
        )
    config = read_json(path)
    if (config.get("format"), config.get("version")) != (kind, 1):
        raise ValueError(
            f"{path}: format {config.get('format')!r}, version {config.get('version')!r}; "
            f"this release reads {kind!r}, version 1"
        )
    exact_keys(config, keys, str(path))
    tensors = read_tensors(folder / "model.safetensors")
    weights = {k[4:]: v for k, v in tensors.items() if k.startswith("net.")}
    module = _network(config["network"], weights, folder) if net is None else net
    if not isinstance(module, nn.Module):
        raise ValueError(f"net must be an nn.Module to take weights, got {type(module).__name__}")
    _check_fit(module, weights, folder)
    module.load_state_dict(weights)
    module.eval()
    return module, config, {k: v for k, v in tensors.items() if not k.startswith("net.")}


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
