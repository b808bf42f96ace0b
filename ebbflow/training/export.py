"""From a training run to a model that `ef.load` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ebbflow.denoiser import Denoiser
from ebbflow.storage import load, save
from ebbflow.training.averages import reconstruct
from ebbflow.training.state import WIDTHS


def average(run: str | Path, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """Weights averaged with width `sigma_rel` up to a snapshot's step, by default the last one."""
    paths = {int(path.stem[5:]): path for path in Path(run).glob("averages/step-*.safetensors")}
    last = max(paths, default=0) if step is None else step
    if last not in paths:
        raise ValueError(f"{run} has no snapshot of step {last}; it has {sorted(paths) or 'none'}.")
    snapshots = [(at, width) for at in sorted(paths) if at <= last for width in WIDTHS]
    shares = reconstruct(snapshots, last, sigma_rel).tolist()
    total: dict[str, Tensor] = {}
    for (at, width), share in zip(snapshots, shares, strict=True):
        prefix = f"{width}/"
        with safetensors.safe_open(paths[at], "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.startswith(prefix):
                    part = file.get_tensor(key).double() * share
                    name = key.removeprefix(prefix)
                    total[name] = total[name] + part if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}


def export(
    run: str | Path,
    folder: str | Path,
    *,
    sigma_rel: float = 0.05,
    step: int | None = None,
    half: bool = True,
    net: nn.Module | None = None,
    details: Mapping[str, Any] | None = None,
) -> Denoiser:
    """Write the model of a run, finished or not, to `folder`, and return it.

    Args:
        run: folder of the run; it must hold a snapshot.
        folder: where config.json and model.safetensors go.
        sigma_rel: width of the average of the weights relative to the training time.
        step: of the snapshot at which the average ends, by default the last.
        half: store float16.
        net: an untrained network, where it is none of `ebbflow.networks`.
        details: facts added to those that the run was given.
    """
    model = Path(run) / "model"
    denoiser = load(model, net=net)
    module = denoiser.net
    assert isinstance(module, nn.Module)
    module.load_state_dict(average(run, sigma_rel, step))
    facts = json.loads((model / "config.json").read_text(encoding="utf-8"))["details"]
    facts |= {"sigma_rel": sigma_rel, **(details or {})}
    save(denoiser, folder, dtype=torch.float16 if half else None, details=facts)
    return denoiser
