"""Models by name: in the package, in a folder, or known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ebbflow.denoiser import Denoiser
    from ebbflow.plan import Plan

ORACLE = "oracle"


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a model in the package or in a folder; empty for the oracle.

    Under `details` it may have `class_names`, `training_command`, `data`, `license`, and `sampling`
    with the `solver`, `steps` and `guidance` that suit the model.
    """
    if name == ORACLE:
        return {}
    path = _folder(name) / "config.json"
    if not path.is_file():  # `open_model` says what is wrong
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def _folder(name: str) -> Path:
    from ebbflow.folders import BUNDLED
    from ebbflow.storage import bundled

    return BUNDLED / name if name in bundled() else Path(name)


def plan_of(model: str, plan: Path) -> Plan:
    """The plan in a file, or by its name the one in the model's folder."""
    from ebbflow.plan import Plan

    own = _folder(model) / f"{plan.name}.json"
    return Plan.load(own if plan.name == str(plan) and own.is_file() else plan)


def open_model(name: str, device: torch.device) -> Denoiser:
    """The denoiser called `name` on `device`, without gradients."""
    if name == ORACLE:
        return _oracle()
    from ebbflow.storage import load

    return load(name).to(device).requires_grad_(False)


def classes_of(denoiser: Denoiser) -> int:
    """How many classes the network knows; 0 for one without a label."""
    return int(getattr(denoiser.net, "config", {}).get("classes", 0))


def check_classes(model: str, denoiser: Denoiser, asked: Sequence[int]) -> tuple[int, ...]:
    """The classes asked for, or all; raises ValueError for one that the model does not have."""
    known = classes_of(denoiser)
    for label in asked:
        if not 0 <= label < known:
            has = f"has the classes 0 to {known - 1}" if known else "has no classes"
            raise ValueError(f"class {label}: the model {model!r} {has}")
    return tuple(asked) or tuple(range(known))


def guidance_of(model: str, plan: Plan | None = None) -> float:
    """The scale of guidance that suits a model, or for which a plan was tuned."""
    if plan is not None and "model" in plan.origin:
        wrappers = plan.origin["model"].get("wrappers", [])
        return float(next((w["scale"] for w in wrappers if "scale" in w), 1.0))
    sampling = config_of(model).get("details", {}).get("sampling", {})
    return float(sampling.get("guidance", 1.0))


def guided(
    model: str, device: torch.device, asked: Sequence[int], guidance: float
) -> tuple[Denoiser, tuple[int, ...]]:
    """The denoiser with classifier-free guidance of this scale, 1 is none, and its classes.

    Raises ValueError for classes or guidance that the model does not have.
    """
    denoiser = open_model(model, device)
    classes = check_classes(model, denoiser, asked)
    if guidance == 1.0:
        return denoiser, classes
    known = classes_of(denoiser)
    if not known:
        raise ValueError(f"guidance {guidance:g} needs a model with classes; give 1, or none")
    from ebbflow.guidance import ClassifierFree

    return ClassifierFree(denoiser, guidance, null={"label": known}), classes


def _oracle() -> Denoiser:
    """Eight Gaussians in the plane, on a circle, each stretched along it, the k-th of weight k."""
    import torch

    from ebbflow.oracles import GaussianMixture
    from ebbflow.schedules import Cosine

    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    radial = torch.stack([angles.cos(), angles.sin()], 1)
    along = torch.stack([-angles.sin(), angles.cos()], 1)
    covariances = 0.002 * torch.einsum("ki,kj->kij", radial, radial)
    covariances += 0.02 * torch.einsum("ki,kj->kij", along, along)
    weights = torch.arange(1, 9, dtype=torch.float64)
    return GaussianMixture(0.8 * radial, covariances, weights).denoiser(Cosine())
