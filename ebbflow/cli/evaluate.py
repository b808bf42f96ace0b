"""Measure how far pictures, or a model's samples, are from real ones.

Examples:
  ebbflow evaluate samples                              a folder that `ebbflow sample` wrote
  ebbflow evaluate --model fashion-mnist --count 2000   samples of a model
  ebbflow evaluate samples.npz --reference real.npz     against other real pictures
  ebbflow evaluate samples --allow-few --json           fewer pictures than features, for machines
  ebbflow evaluate real.npz --model fashion-mnist --likelihood      bits a dimension of the pictures
  ebbflow evaluate real.npz --model fashion-mnist --diagnose --figure report.png

The figures are on the features of a small classifier in the package, trained on Fashion-MNIST:
compare them with each other and with those of held-out real pictures, at about equal counts.
With --likelihood they are those of the pictures under the model, uniformly dequantised, without a
class; a picture of 32 x 32 takes about 4 s on a laptop's core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ebbflow.cli._shared import pick_device, print_json, print_table, progress

if TYPE_CHECKING:
    import torch

    from ebbflow.denoiser import Denoiser


DRAWN = 1_000
ROWS = (
    ("Fréchet distance", "{frechet:.3f}", "0"),
    ("kernel distance", "{kernel:.4f} ± {kernel_standard_error:.4f}", "0"),
    ("sliced Wasserstein", "{sliced_wasserstein:.3f}", "0"),
    ("energy distance", "{energy:.4f}", "0"),
    ("two-sample accuracy", "{two_sample_accuracy:.1%} (p = {two_sample_p_value:.2g})", "50%"),
    ("precision", "{precision:.3f}", "1"),
    ("recall", "{recall:.3f}", "1"),
    ("density", "{density:.3f}", "1"),
    ("coverage", "{coverage:.3f}", "1"),
)


@dataclass(frozen=True)
class Options:
    samples: Annotated[Path | None, tyro.conf.Positional] = None
    """A folder of pictures, a .npz or a .npy: uint8, or floats in [-1, 1]."""
    model: str | None = None
    """Instead of files, a model to draw from: one in the package, or a folder."""
    count: int | None = None
    """How many pictures, the first; without it, all that are there, or 1,000 of a model."""
    reference: Path | None = None
    """Real pictures: a folder, .npz or .npy; without it, those known to the package."""
    features: Path | None = None
    """Folder of another classifier; without it, the one in the package."""
    allow_few: bool = False
    """Accept fewer pictures than features, where the Fréchet distance is mostly bias."""
    solver: str | None = None
    """As in `ebbflow sample`, for a model; so are the next four."""
    steps: int | None = None
    """Steps of the solver."""
    nfe: int | None = None
    """Budget of denoiser calls, in place of --steps."""
    plan: Path | None = None
    """A plan that `ebbflow tune` made, in place of a solver."""
    guidance: float | None = None
    """Scale of classifier-free guidance."""
    seed: int = 0
    """Seed of the samples, and of what the figures draw at random."""
    batch: int | None = None
    """Samples drawn at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    likelihood: bool = False
    """Bits a dimension of the pictures under --model, of the first 64 unless --count says more."""
    probes: int = 4
    """Random directions a picture by which --likelihood estimates its divergence, at least 2."""
    rtol: float = 1e-3
    """Relative error of its solver."""
    diagnose: bool = False
    """How far --model is from a gradient, calibrated and straight, on the first 16 pictures."""
    figure: Path | None = None
    """Where --diagnose draws what it finds, such as report.png."""
    json: bool = False
    """Print one JSON object instead of a table."""


def run(options: Options) -> None:
    if options.likelihood and options.diagnose:
        raise ValueError("give --likelihood or --diagnose, and not both")
    if options.likelihood:
        return _likelihood(options)
    if options.diagnose:
        return _diagnose(options)
    from ebbflow.metrics import classifier
    from ebbflow.metrics.features import extract
    from ebbflow.metrics.report import Reference, compare

    if (options.samples is None) == (options.model is None):
        raise ValueError("give either pictures (ebbflow evaluate samples) or --model, and not both")
    if options.count is not None and options.count < 1:
        raise ValueError(f"count must be at least 1, got {options.count}")
    device = pick_device(options.device)
    folder = options.features or classifier.FOLDER
    network = classifier.load(folder).to(device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return extract(network.features, pixels, device=device, progress=True)

    if options.reference is None:
        reference = Reference.load(folder / "reference.safetensors")
    else:
        real, _ = _read(options.reference, network.shape)
        reference = Reference.of(features(real), f"{len(real):,} pictures of {options.reference}")
    if options.samples is not None:
        pixels, labels = _read(options.samples, network.shape)
    else:
        pixels, labels = _draw(options)
    found = features(pixels[: options.count])
    figures = compare(found, reference, allow_few=options.allow_few, seed=options.seed)
    agreement = None
    if labels is not None:
        guesses = network.head(found.to(device)).argmax(1).cpu()
        agreement = float((guesses == labels[: len(guesses)]).double().mean())
    held_out = reference.yardstick(figures.count)
    report = {
        "samples": str(options.samples or options.model),
        "reference": reference.description,
        "figures": asdict(figures),
        "class_agreement": agreement,
        "held_out_real": None if held_out is None else asdict(held_out),
    }
    if options.json:
        print_json(report)
    else:
        _print(report)


def _likelihood(options: Options) -> None:
    from ebbflow.cli import _likelihood as likelihood

    denoiser, pixels, device = _both(options, "--likelihood", likelihood.COUNT)
    report = likelihood.measure(
        denoiser,
        pixels,
        probes=options.probes,
        rtol=options.rtol,
        seed=options.seed,
        batch=options.batch or likelihood.BATCH,
        device=device,
    )
    if options.json:
        print_json({"samples": str(options.samples), "model": options.model, **report})
    else:
        likelihood.show(report, f"{options.samples} under {options.model}")


def _diagnose(options: Options) -> None:
    from ebbflow.cli import _diagnose as diagnosis

    denoiser, pixels, device = _both(options, "--diagnose", diagnosis.COUNT)
    report = diagnosis.measure(denoiser, pixels, options.seed, device)
    if options.figure is not None:
        report.save_figure(options.figure)
    if options.json:
        wrote = {"samples": str(options.samples), "model": options.model}
        print_json({**wrote, **report.summary()})
    else:
        diagnosis.show(report, f"{options.model} on {len(pixels)} pictures of {options.samples}")


def _both(options: Options, what: str, count: int) -> tuple[Denoiser, torch.Tensor, torch.device]:
    """The model and the first pictures, as it takes them, of a command that needs both."""
    from ebbflow.cli._models import open_model

    if options.samples is None or options.model is None:
        raise ValueError(f"{what} needs pictures and a model: ebbflow evaluate real.npz --model M")
    if options.count is not None and options.count < 1:
        raise ValueError(f"count must be at least 1, got {options.count}")
    device = pick_device(options.device)
    denoiser = open_model(options.model, device)
    if denoiser.shape is None or len(denoiser.shape) != 3:
        raise ValueError(f"{what} needs a model of pictures, {options.model} has {denoiser.shape}")
    pixels, _ = _read(options.samples, denoiser.shape)
    return denoiser, pixels[: options.count or count], device


def _print(report: Mapping[str, Any]) -> None:
    samples, real = report["figures"], report["held_out_real"]
    columns = {f"{samples['count']:,} pictures": samples}
    if real is not None:
        columns[f"{real['count']:,} held-out real"] = real
    rows = [
        [name, *(form.format(**c) for c in columns.values()), best] for name, form, best in ROWS
    ]
    if report["class_agreement"] is not None:
        unknown = [""] * (len(columns) - 1)
        rows.append(["class agreement", f"{report['class_agreement']:.1%}", *unknown, "100%"])
    title = f"{report['samples']} against {report['reference']}"
    print_table(("figure", *columns, "best"), rows, title)


def _draw(options: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Samples of a model as uint8 pictures (n, C, H, W), with the classes that were asked for."""
    import torch

    from ebbflow.cli import sample
    from ebbflow.cli._draw import Shard
    from ebbflow.images import to_uint8

    wanted = sample.Options(
        model=str(options.model),
        solver=options.solver,
        steps=options.steps,
        nfe=options.nfe,
        plan=options.plan,
        guidance=options.guidance,
        seed=options.seed,
        batch=options.batch,
        device=options.device,
    )
    recipe, _ = sample.prepare(wanted)
    count = options.count or DRAWN
    chunks = Shard().chunks(count, recipe.batch)
    with progress("sampling", len(chunks) * (len(recipe.plan.times) - 1)) as advance:
        drawn = [to_uint8(part) for _, part in recipe.stream(chunks, lambda point: advance())]
    labels = recipe.labels(range(count))
    return torch.cat(drawn).permute(0, 3, 1, 2), torch.tensor(labels) if labels else None


def _read(path: Path, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pictures as uint8 of the shape (n, *shape), with a black border where they are smaller.

    Their classes come from the file, from sub-folders with numbers for names, or from labels.csv.
    """
    import torch

    from ebbflow.data import from_array, read

    stored = _floats(path)
    if stored is None:
        images = read(path, size=shape[1], channels=shape[0], fit="pad")
    else:
        images = from_array(*stored, size=shape[1], channels=shape[0], fit="pad")
    if (path / "labels.csv").is_file():
        return images.pixels, _listed(path)
    if images.labels is None or not all(name.isdecimal() for name in images.class_names):
        return images.pixels, None
    return images.pixels, torch.tensor([int(name) for name in images.class_names])[images.labels]


def _listed(folder: Path) -> torch.Tensor | None:
    """The classes of a folder's pictures, in the order of their names; None if one has none."""
    import csv

    import torch

    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["file"]: int(row["label"]) for row in csv.DictReader(file)}
    names = sorted(path.name for path in folder.glob("*.png"))
    return torch.tensor([labels[name] for name in names]) if labels.keys() >= set(names) else None


def _floats(path: Path) -> tuple[torch.Tensor, Any] | None:
    """A .npy, or the one array of floats in a .npz, as uint8, and its labels.

    None for all else, which `ebbflow.data` reads, or refuses with the reason: it takes no floats,
    because their range can only be checked where it is known.
    """
    import zipfile

    import numpy as np
    import torch

    from ebbflow.metrics.features import check_range

    if path.suffix not in (".npy", ".npz") or not path.is_file():
        return None
    try:
        stored = np.load(path, allow_pickle=False)
        arrays = {"images": stored} if path.suffix == ".npy" else dict(stored)
    except (ValueError, EOFError, zipfile.BadZipFile):
        return None
    floats = [array for array in arrays.values() if array.dtype.kind == "f" and array.ndim > 2]
    if len(floats) != 1:
        return None
    values = torch.from_numpy(floats[0]).float()
    check_range(values)
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), arrays.get("labels")
