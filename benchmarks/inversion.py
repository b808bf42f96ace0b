"""Ways to the noise and back: what returns, through which latents, at what cost.

    python -m benchmarks.inversion            a mixture on four schedules, every method
    python -m benchmarks.inversion precision  the same in float32 and with rounded predictions
    python -m benchmarks.inversion model      the model in the package, guidance 1 and 2

Columns: the greatest difference after the way back, the greatest latent over sigma(1), the least
time asked, and denoiser calls one way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.guidance import ClassifierFree
from ebbflow.inversion import Inversion
from ebbflow.inversion.invert import METHODS

PICTURES = Path(__file__).parents[1] / "tests" / "data_files" / "fashion_mnist_test_200.npz"
SCHEDULES = (ef.schedules.VP(), ef.schedules.VE(), ef.schedules.Cosine(), ef.schedules.Linear())
EXACT = ("bdia", "edict", "leapfrog")
HEAD = f"{'':34} {'round trip':>10} {'latent':>7} {'nearest':>8} {'calls':>6}"


def mixture() -> ef.oracles.GaussianMixture:
    """Twelve narrow Gaussians in three dimensions, of no symmetry."""
    generator = torch.Generator().manual_seed(3)
    means = 1.2 * torch.randn(12, 3, generator=generator, dtype=torch.float64)
    roots = 0.2 * torch.randn(12, 3, 3, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.005 * torch.eye(3, dtype=torch.float64)
    return ef.oracles.GaussianMixture(means, covariances, torch.ones(12))


def row(name: str, found: Inversion) -> None:
    sigma = found.denoiser.schedule.sigma(1.0).item()
    latent = max(x.abs().max().item() for x in found.latents) / sigma
    print(
        f"{name:34} {found.round_trip_error.item():10.1e} {latent:7.2f} {found.nearest:8.1e} "
        f"{found.nfe:6d}",
        flush=True,
    )


def methods(steps: int = 50) -> None:
    print(f"{steps} steps, 256 samples of a mixture, float64\n{HEAD}")
    law = mixture()
    x0 = law.sample(256, seed=1)
    for schedule in SCHEDULES:
        denoiser = law.denoiser(schedule)
        for method in METHODS:
            found = ef.invert(denoiser, x0, method=method, steps=steps)
            row(f"{type(schedule).__name__} {method}", found)


def precision() -> None:
    print(f"128 samples of a mixture, Cosine\n{HEAD}")
    law, schedule = mixture(), ef.schedules.Cosine()
    exact = law.denoiser(schedule)

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.bfloat16().double(), t).bfloat16().to(x.dtype)

    coarse = ef.Denoiser(rounded, schedule, shape=(3,))
    x0 = law.sample(128, seed=1)
    for method in EXACT:
        for steps in (10, 50, 250):
            for name, denoiser, data in (
                ("float64", exact, x0),
                ("float32", exact, x0.float()),
                ("float64, bfloat16 network", coarse, x0),
                ("float32, bfloat16 network", coarse, x0.float()),
            ):
                found = ef.invert(denoiser, data, method=method, steps=steps)
                row(f"{method} {steps}, {name}", found)


def model(count: int = 4, steps: int = 50) -> None:
    print(f"{steps} steps, {count} held-out pictures\n{HEAD}")
    stored = np.load(PICTURES)
    pixels = torch.from_numpy(stored["images"][:count, None])
    x0 = torch.nn.functional.pad(pixels, (2, 2, 2, 2)).double() / 127.5 - 1
    label = torch.from_numpy(stored["labels"][:count]).long()
    denoiser = ef.load("fashion-mnist").requires_grad_(False)
    guided = ClassifierFree(denoiser, 2.0, {"label": 10})
    for method in METHODS:
        for name, used in (("", denoiser), (", guidance 2", guided)):
            fewer = 10 if method in ("fixed-point", "renoise") else steps
            found = ef.invert(used, x0, method=method, steps=fewer, label=label)
            row(f"{method}{name}" + ", 10 steps" * (fewer != steps), found)
    for method in EXACT:
        found = ef.invert(denoiser, x0.float(), method=method, steps=steps, label=label)
        row(f"{method}, float32", found)
    half = ef.load("fashion-mnist").requires_grad_(False).bfloat16()
    for method in EXACT:
        for dtype in (torch.float64, torch.float32):
            found = ef.invert(half, x0.to(dtype), method=method, steps=steps, label=label)
            row(f"{method}, {str(dtype)[6:]}, bfloat16 network", found)


if __name__ == "__main__":
    {"methods": methods, "precision": precision, "model": model}[(sys.argv[1:] or ["methods"])[0]]()
