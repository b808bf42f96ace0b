"""Edits of held-out pictures to another class: how often a classifier agrees, and what is kept.

    python -m benchmarks.editing                     strengths and scales of guidance, 50 pictures
    python -m benchmarks.editing methods             ways of inversion, 24 pictures, 16 steps
    python -m benchmarks.editing draw docs/editing.png

The pictures are of Fashion-MNIST's test part, which neither the model nor the classifier has seen;
each goes to another class, drawn once. `change` is the root mean square in units of [-1, 1].
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import ebbflow as ef
from ebbflow import editing, images
from ebbflow.editing.edit import part
from ebbflow.guidance import ClassifierFree
from ebbflow.metrics import classifier

PICTURES = Path(__file__).parents[1] / "tests" / "data_files" / "fashion_mnist_test_200.npz"
SETTINGS = ((1.0, 2.0), (1.0, 4.0), (0.9, 2.0), (0.9, 4.0), (0.7, 4.0), (0.7, 7.0))
CHOSEN = (0.9, 4.0)
PAIRS = ((9, 7), (0, 3), (2, 0), (7, 9), (8, 0))  # classes before and after


def data(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 1, 32, 32), their classes and others."""
    stored = np.load(PICTURES)
    pixels = torch.from_numpy(stored["images"][first : first + count, None])
    label = torch.from_numpy(stored["labels"][first : first + count]).long()
    generator = torch.Generator().manual_seed(first)
    shift = torch.randint(1, 10, (count,), generator=generator)
    return functional.pad(pixels, (2, 2, 2, 2)).double() / 127.5 - 1, label, (label + shift) % 10


def answers(pictures: Tensor) -> Tensor:
    """The classifier's classes of pictures as they are written to files."""
    pixels = images.to_uint8(pictures).permute(0, 3, 1, 2)
    with torch.no_grad():
        return classifier.load()(pixels.float() / 127.5 - 1).argmax(1)


def model() -> ef.Denoiser:
    return ef.load("fashion-mnist").requires_grad_(False)


def show(name: str, after: Tensor, x0: Tensor, label: Tensor, to: Tensor) -> None:
    found = answers(after)
    hit, stay = ((found == wanted).double().mean().item() for wanted in (to, label))
    change = (after - x0).square().mean().sqrt().item()
    print(f"{name:44} {hit:7.0%} {stay:7.0%} {change:7.3f}", flush=True)


HEAD = f"{'':44} {'target':>7} {'source':>7} {'change':>7}"


def strengths(count: int = 50, steps: int = 20) -> None:
    denoiser = model()
    x0, label, to = data(48, count)
    candidates = [{"label": torch.full((count,), k)} for k in range(10)]
    guess = editing.classify(denoiser, x0, candidates).argmin(1)
    shares = [(found == label).double().mean() for found in (answers(x0), guess)]
    print(f"classes of {count} pictures: classifier {shares[0]:.0%}, denoiser {shares[1]:.0%}")
    print(f"{steps} steps each way\n{HEAD}")
    found = {}
    for strength, scale in SETTINGS:
        guided = ClassifierFree(denoiser, scale, {"label": 10})
        if strength not in found:
            times = part(denoiser.schedule, steps, strength)
            found[strength] = ef.invert(denoiser, x0, method="leapfrog", times=times, label=label)
        inversion = found[strength]
        plan = ef.solvers.get("ddim").plan(denoiser.schedule, times=inversion.times[::-1])
        after = plan.run(guided, inversion.x1, label=to)
        show(f"strength {strength:g}, guidance {scale:g}", after, x0, label, to)
    print(f"round trip, strength 1: {found[1.0].round_trip_error.item():.1e}")
    strength, scale = CHOSEN
    guided = ClassifierFree(denoiser, scale, {"label": 10})
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:, :] = 1.0
    rest = {"guided": guided, "strength": strength, "steps": steps}
    for name, source, region in (("source guessed", guess, None), ("lower half", label, mask)):
        edited = editing.edit(
            denoiser, x0, source={"label": source}, target={"label": to}, mask=region, **rest
        )
        show(f"strength {strength:g}, guidance {scale:g}, {name}", edited.after, x0, label, to)
    kept = edited.difference[..., :16, :].abs().max().item()
    print(f"greatest change where the mask is 0: {kept:g}")


def methods(count: int = 24, steps: int = 16) -> None:
    denoiser = model()
    x0, label, to = data(0, count)
    guided = ClassifierFree(denoiser, 2.0, {"label": 10})
    print(f"guidance 2, {steps} steps each way\n{HEAD}")
    for strength in (1.0, 0.7):
        for method in ("leapfrog", "bdia", "edict", "reversed"):
            times = part(denoiser.schedule, steps, strength)
            if method == "reversed":
                times = (times[1] / 2, *times[1:])
            found = ef.invert(denoiser, x0, method=method, times=times, label=label)
            plan = ef.solvers.get("ddim").plan(denoiser.schedule, times=found.times[::-1])
            after = plan.run(guided, found.x1, label=to)
            show(f"strength {strength:g}, {method}", after, x0, label, to)


def draw(path: Path, steps: int = 20) -> None:
    """Rows: before, after, difference, below the mask, and from one bag to another."""
    denoiser = model()
    pictures, labels, _ = data(0, 200)
    first = [int((labels == source).nonzero()[1]) for source, _ in PAIRS]
    x0, label = pictures[first], labels[first]
    to = torch.tensor([target for _, target in PAIRS])
    strength, scale = CHOSEN
    guided = ClassifierFree(denoiser, scale, {"label": 10})
    rest = {"source": {"label": label}, "target": {"label": to}, "guided": guided}
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:, :] = 1.0
    whole, half = (
        editing.edit(denoiser, x0, strength=strength, steps=steps, mask=region, **rest)
        for region in (None, mask)
    )
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    bags = pictures[labels == 8]
    between = editing.interpolate(
        denoiser, bags[1:2], bags[5:6], shares, steps=steps, label=torch.tensor([8])
    )
    rows = (x0, whole.after, whole.difference / 2, half.after, torch.cat(between))
    images.write_grid(torch.cat(rows), path, columns=len(PAIRS), scale=3)


if __name__ == "__main__":
    command = (sys.argv[1:] or ["strengths"])[0]
    if command == "draw":
        draw(Path(sys.argv[2]))
    else:
        {"strengths": strengths, "methods": methods}[command]()
