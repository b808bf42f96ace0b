"""Change what a picture shows.

Examples:
  ebbflow edit shirt.png --to Dress                      a T-shirt into a dress
  ebbflow edit shirt.png --source 0 --to 3               the same, by numbers, without a guess
  ebbflow edit shirt.png --to Dress --strength 0.7       closer to the picture
  ebbflow edit shirt.png --to Dress --mask lower.png     only where the mask is white

The picture is carried to noise under its own class by an exactly invertible scheme, and back under
the other one. The folder --out gets before.png, after.png, difference.png (grey where nothing
changed) and report.json with the round-trip error. Without --source the class is the one under
which the model removes noise best.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ebbflow.cli._shared import pick_device, print_json


@dataclass(frozen=True)
class Options:
    picture: Annotated[Path, tyro.conf.Positional]
    """A picture; it is fitted to the model's size, small ones on a dark border."""
    to: str
    """The class to show: a number, or a name that the model knows."""
    source: str | None = None
    """The class that the picture shows; without it, the model's own guess."""
    model: str = "fashion-mnist"
    """A model in the package, or a folder with config.json."""
    strength: float = 0.9
    """Share of the way to noise, 0 to 1; 0 changes nothing."""
    mask: Path | None = None
    """A picture of the same size, white where the picture may change and black where not."""
    guidance: float = 4.0
    """Scale of classifier-free guidance on the way back; 1 is none."""
    method: Literal["leapfrog", "bdia", "edict", "fixed-point", "renoise"] = "leapfrog"
    """Of the inversion."""
    steps: int = 20
    """Steps each way."""
    out: Path = Path("edit")
    """The folder for the pictures and report.json."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    json: bool = False
    """Print one JSON object that says what was done."""


def run(options: Options) -> None:
    import torch

    from ebbflow import images
    from ebbflow.cli import _models
    from ebbflow.editing import classify, edit
    from ebbflow.files import write_text

    began = time.perf_counter()
    device = pick_device(options.device)
    details = _models.config_of(options.model).get("details", {})
    names = details.get("class_names", [])
    target = _class(options.to, names)
    source = None if options.source is None else _class(options.source, names)
    asked = [target] if source is None else [source, target]
    plain, _ = _models.guided(options.model, device, asked, 1.0)
    guided, _ = _models.guided(options.model, device, asked, options.guidance)
    if plain.shape is None or len(plain.shape) != 3:
        raise ValueError(f"the model {options.model!r} makes no pictures: its shape {plain.shape}")
    picture = _read(options.picture, plain.shape).to(device)
    mask = None
    if options.mask is not None:
        mask = (_read(options.mask, plain.shape).to(device) + 1) / 2
    known = [{"label": torch.tensor([k], device=device)} for k in range(_models.classes_of(plain))]
    if source is None:
        source = int(classify(plain, picture, known).argmin())
    found = edit(
        plain,
        picture,
        source=known[source],
        target=known[target],
        guided=guided,
        strength=options.strength,
        mask=mask,
        method=options.method,
        steps=options.steps,
    )
    error = 0.0 if found.inversion is None else found.inversion.round_trip_error.item()
    parts = {"before": found.before, "after": found.after, "difference": found.difference / 2}
    for name, part in parts.items():
        images.write_grid(part, options.out / f"{name}.png", columns=1, scale=1)
    report = {
        "picture": str(options.picture),
        "out": str(options.out),
        "model": options.model,
        "source": source,
        "source_guessed": options.source is None,
        "to": target,
        "strength": options.strength,
        "guidance": options.guidance,
        "method": options.method,
        "steps": options.steps,
        "nfe": found.nfe,
        "round_trip_error": error,
        "changed": found.difference.square().mean().sqrt().item(),
        "device": str(device),
        "seconds": round(time.perf_counter() - began, 2),
    }
    write_text(options.out / "report.json", json.dumps(report, indent=1) + "\n")
    if options.json:
        print_json(report)
        return
    shown, wanted = (names[k] if k < len(names) else f"class {k}" for k in (source, target))
    print(
        f"{shown}{' (a guess)' * (options.source is None)} to {wanted}\n"
        f"{options.out}: before.png, after.png, difference.png; root mean square change "
        f"{report['changed']:.3f}, round-trip error {error:.1e}, {report['seconds']:.1f} s"
    )


def _class(text: str, names: list[str]) -> int:
    """The class that a number or a name means."""
    if text.isdecimal():
        return int(text)
    known = [name.lower() for name in names]
    if text.lower() not in known:
        raise ValueError(f"class {text!r}: give a number, or one of {', '.join(names) or 'none'}")
    return known.index(text.lower())


def _read(path: Path, shape: tuple[int, ...]):
    """A picture as a batch of one (1, *shape) in [-1, 1], in float64."""
    import numpy as np
    import torch
    from PIL import Image

    from ebbflow.data.images import fit_to

    with Image.open(path) as opened:
        pixels = np.array(opened.convert("L" if shape[0] == 1 else "RGB"))
    tensor = torch.from_numpy(pixels.reshape(1, *pixels.shape[:2], -1)).permute(0, 3, 1, 2)
    fit = "pad" if max(pixels.shape[:2]) <= shape[1] else "crop"
    fitted = fit_to(tensor.contiguous(), shape[1], fit, 0)
    return fitted.double() / 127.5 - 1
