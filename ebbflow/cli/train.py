"""Train a diffusion model on images.

DATA is a folder of pictures (sub-folders are classes), a .npz or .npy file, or an IDX file. The run
lives in the folder --out; the same command resumes it after any interruption, to the same weights.

Examples:
  ebbflow train photos/ --out runs/photos --size 32 --channels 3
  ebbflow train fashion_mnist.npz --out runs/fashion --size 32 --channels 1 --fit pad --patch 2
  ebbflow train photos/ --out runs/photos --export models/photos
  accelerate launch -m ebbflow train photos/ --out runs/photos --batch 512
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ebbflow.cli._shared import print_json
from ebbflow.training.config import Config

if TYPE_CHECKING:
    from ebbflow.data import Images
    from ebbflow.denoiser import Denoiser
    from ebbflow.statistics import Statistics

STOPPED = 130
"""Status of a run that ended before its last step."""

LARGEST_SAMPLE = 10_000
"""Images whose statistics are taken, at most."""


@dataclass(frozen=True)
class Options:
    """Train a diffusion model on images."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures, .npz, .npy or IDX file."""
    out: Path
    """Folder of the run; one that exists is resumed."""
    size: int | None = None
    """Side of the images in pixels; by default that of the data."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; by default that of the data."""
    fit: Literal["crop", "pad"] = "crop"
    """Scale the centred square, or keep pixels and add background around them."""
    background: int = 0
    """0 to 255: what padding and transparent pixels become."""
    images_key: str | None = None
    """Name of the images in a .npz file."""
    labels_key: str | None = None
    """Name of the labels in a .npz file."""
    labels: Path | None = None
    """File of labels, .npy or IDX."""
    unreadable: Literal["raise", "skip"] = "raise"
    """What to do about pictures that cannot be read."""
    validation: int = 0
    """Images held out, the last ones, for the validation loss."""

    width: int = 64
    """Channels of the network's top level."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Width of each level, in units of --width; each level halves the pixels."""
    blocks: int = 2
    """Residual blocks a level, on the way down and up."""
    attention: tuple[int, ...] = (8,)
    """Sizes in pixels of the levels that attend."""
    patch: int = 1
    """Move patch x patch pixels into channels first; 2 is about 4 times cheaper."""
    embedding: int = 0
    """Width of the embedding of time and label; 0 for 4 x --width."""

    schedule: Literal["cosine", "vp", "ve", "linear"] = "cosine"
    """The forward process."""
    prediction: Literal["edm", "x0", "noise", "v", "velocity"] = "edm"
    """What the network outputs."""
    sigma_data: float | None = None
    """For --prediction edm; by default the root mean square of the data about 0."""

    training: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    time_limit: float | None = None
    """Minutes after which to save and stop; the same command goes on from there."""
    export: Path | None = None
    """Do not train: write the run's model, as its last snapshot has it, to this folder."""
    sigma_rel: float = 0.05
    """For --export: width of the average of the weights, as a share of the training time."""
    json: bool = False
    """Print one JSON object that says what was done."""


def run(options: Options) -> int | None:
    """Train, resume or export; the status is 130 when stopped before the end."""
    from ebbflow import training

    if options.export:
        training.export(options.out, options.export, sigma_rel=options.sigma_rel)
        _say(options, f"{options.export}: the model of {options.out}", export=str(options.export))
        return None
    images, held_out = _images(options)
    denoiser = _denoiser(options, images)
    steps = options.training.steps
    details = {"class_names": list(images.class_names), "training_command": _command()}
    with _asked_to_stop(options.time_limit) as stop:
        step = training.train(
            denoiser,
            images,
            options.training,
            options.out,
            held_out=held_out,
            device=None if options.device == "auto" else options.device,
            stop=stop,
            details=details,
        )
    done = step >= steps
    then = "--export FOLDER writes the model" if done else "the same command goes on from there"
    _say(options, f"{options.out}: step {step} of {steps}; {then}", step=step, steps=steps)
    return None if done else STOPPED


def _say(options: Options, line: str, **facts: Any) -> None:
    if options.json:
        print_json({"out": str(options.out), **facts})
    else:
        print(line)


def _command() -> str:
    import shlex

    return shlex.join(["ebbflow", *sys.argv[1:]])


def _images(options: Options) -> tuple[Images, Images | None]:
    from ebbflow.data import read

    images = read(
        options.data,
        size=options.size,
        channels=options.channels,
        fit=options.fit,
        background=options.background,
        images_key=options.images_key,
        labels_key=options.labels_key,
        labels=options.labels,
        unreadable=options.unreadable,
    )
    return images.split(options.validation)


def _denoiser(options: Options, images: Images) -> Denoiser:
    import torch

    from ebbflow import schedules
    from ebbflow.denoiser import Denoiser
    from ebbflow.networks import UNet

    channels, height, width = images.shape
    if height != width:
        raise ValueError(f"The images have {width}x{height} pixels; make them square with --size.")
    torch.manual_seed(options.training.seed)
    net = UNet(
        channels=channels,
        size=height,
        width=options.width,
        multipliers=options.multipliers,
        blocks=options.blocks,
        attention=options.attention,
        classes=images.classes,
        patch=options.patch,
        embedding=options.embedding,
    )
    kinds = {
        "cosine": schedules.Cosine,
        "vp": schedules.VP,
        "ve": schedules.VE,
        "linear": schedules.Linear,
    }
    sigma_data = options.sigma_data
    if options.prediction == "edm" and sigma_data is None:
        sigma_data = round(images.root_mean_square(), 4)
    return Denoiser(
        net,
        kinds[options.schedule](),
        prediction=options.prediction,
        shape=images.shape,
        statistics=_statistics(images),
        time="angle",
        sigma_data=sigma_data,
    )


def _statistics(images: Images) -> Statistics:
    """Variances along the cosine transform, from evenly spaced images; a few kB a class."""
    from ebbflow.statistics import Statistics

    some = slice(None, None, math.ceil(len(images) / LARGEST_SAMPLE))
    labels = None if images.labels is None else images.labels[some]
    return Statistics.from_data(images.floats(some), labels, kind="cosine")


@contextmanager
def _asked_to_stop(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Yield a function that says True after Ctrl-C, SIGTERM or the time limit.

    A second Ctrl-C interrupts at once.
    """
    asked = []
    limit = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        print("stopping after this step, with a checkpoint", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked) or time.monotonic() > limit
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
