"""What is sampled: laws known in closed form on three settings, or a model on its own schedule.

The three laws are a mixture in the plane, a mixture of smooth 8x8 pictures, and an empirical law of
8x8 pictures widened a little. Each is put on the schedules that networks are trained on: "vp" (the
1,000 linear betas of DDPM), "edm" (sigma from 80 to 0.002, no shrinking) and "flow" (the straight
path of rectified flow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.metrics.energy import energy_distance
from ebbflow.metrics.sliced import sliced_wasserstein
from ebbflow.oracles import Empirical, GaussianMixture
from ebbflow.schedules import VE, Betas, Linear, Schedule
from ebbflow.statistics import Statistics

Law = GaussianMixture | Empirical
KNOWN = 4096
"""Samples from which the statistics that an oracle's denoiser carries are estimated."""
OTHER = 1 << 32
"""Added to the seed for fresh data, so that they share nothing with the noise."""


@dataclass(frozen=True)
class Distances:
    """Of a set of samples to fresh data; `frechet` on features of pictures, where there are any."""

    sliced: float
    energy: float
    frechet: float | None = None


@dataclass(frozen=True)
class Problem:
    """A denoiser on the schedule of one setting.

    wide: the same denoiser where it reaches the most noise levels; it answers the peers and the
    reference. deviation: of the data; that of the reference's samples unless known. distances: of
    samples (n, *shape) to fresh data, by seed. floor: sigma/alpha below which the denoiser's own
    answer is the end of the path. tolerance: of the reference, in deviations. condition: made for a
    number of samples.
    """

    name: str
    setting: str
    denoiser: Denoiser
    wide: Denoiser
    shape: tuple[int, ...]
    deviation: float | None = None
    distances: Callable[[Tensor, int], Distances] | None = None
    floor: float = 1e-4
    tolerance: float = 1e-5
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    condition: Callable[[int], Mapping[str, Any]] = field(default=lambda count: {})

    def bare(self) -> Problem:
        """The same without statistics."""
        plain = copy(self.denoiser)  # shares the network
        plain.statistics = None
        return replace(self, denoiser=plain)


def _linear_betas() -> Schedule:
    return Betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


SETTINGS: Mapping[str, Callable[[], Schedule]] = {"vp": _linear_betas, "edm": VE, "flow": Linear}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plane() -> GaussianMixture:
    """Six Gaussians in the plane, of unequal weights and shapes; deviation 0.5."""
    g = _generator(31)
    means = 0.9 * torch.randn(6, 2, generator=g, dtype=torch.float64)
    angles = math.pi * torch.rand(6, generator=g, dtype=torch.float64)
    turn = torch.stack([angles.cos(), angles.sin(), -angles.sin(), angles.cos()], 1)
    turn = turn.reshape(6, 2, 2)
    scale = 0.03 + 0.17 * torch.rand(6, 1, 2, generator=g, dtype=torch.float64)
    weights = 0.3 + torch.rand(6, generator=g, dtype=torch.float64)
    return GaussianMixture(means, (turn * scale**2) @ turn.mT, weights)


def pictures() -> GaussianMixture:
    """Five kinds of 8x8 pictures, each smooth around a smooth mean; deviation 0.44."""
    g = _generator(32)
    rows, columns = torch.meshgrid(*[torch.arange(8.0, dtype=torch.float64)] * 2, indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    distance = torch.cdist(places, places)
    one = torch.eye(64, dtype=torch.float64)
    root = torch.linalg.cholesky(torch.exp(-0.5 * (distance / 2.5) ** 2) + 1e-6 * one)
    means = 0.45 * torch.randn(5, 64, generator=g, dtype=torch.float64) @ root.T
    lengths = 1.0 + 2.0 * torch.rand(5, 1, 1, generator=g, dtype=torch.float64)
    covariances = 0.05 * torch.exp(-distance / lengths) + 4e-4 * one
    weights = 0.5 + torch.rand(5, generator=g, dtype=torch.float64)
    return GaussianMixture(means, covariances, weights)


def blobs() -> Empirical:
    """300 pictures (1, 8, 8) of one soft spot each, widened by 0.05; deviation about 0.6."""
    g = _generator(33)
    draw = torch.rand(4, 300, 1, 1, generator=g, dtype=torch.float64)
    rows, columns = torch.meshgrid(*[torch.arange(8.0, dtype=torch.float64)] * 2, indexing="ij")
    across, down, width, height = 7 * draw[0], 7 * draw[1], 1.2 + 2 * draw[2], 0.8 + 1.2 * draw[3]
    spot = torch.exp(-((rows - down) ** 2 + (columns - across) ** 2) / (2 * width**2))
    return Empirical((1.4 * height * spot - 0.7).reshape(300, 1, 8, 8), bandwidth=0.05)


LAWS: Mapping[str, Callable[[], Law]] = {
    "mixture-2d": cache(plane),
    "mixture-64d": cache(pictures),
    "empirical-64d": cache(blobs),
}


def oracle(name: str, setting: str) -> Problem:
    """One of `LAWS` on one of `SETTINGS`, in float64.

    The denoiser carries statistics estimated from `KNOWN` samples, as a trained model's would be.
    """
    return of_law(name, setting, LAWS[name]())


@cache
def _statistics(law: Law) -> Statistics:
    return Statistics.from_data(law.sample(KNOWN, seed=OTHER - 1))


def of_law(name: str, setting: str, law: Law) -> Problem:
    """A problem from any oracle."""
    statistics = _statistics(law)
    schedule = SETTINGS[setting]()
    denoiser = law.denoiser(schedule)
    denoiser.statistics = statistics
    assert denoiser.shape is not None
    variance = statistics.covariance().diagonal().mean().item()
    return Problem(
        name,
        setting,
        denoiser,
        law.denoiser(Linear()),
        denoiser.shape,
        math.sqrt(variance),
        partial(_to_law, law),
    )


def _to_law(law: Law, samples: Tensor, seed: int) -> Distances:
    fresh = law.sample(len(samples), seed=OTHER + seed).flatten(1)
    flat = samples.flatten(1).double()
    return Distances(sliced_wasserstein(flat, fresh, seed=seed), energy_distance(flat, fresh))


def of_denoiser(
    name: str,
    denoiser: Denoiser,
    labels: Sequence[int] = (),
    device: str = "cpu",
) -> Problem:
    """A model on its own schedule; sample i has the class `labels[i % len(labels)]`.

    Pictures of the shape that the classifier in the package takes are compared with real ones by
    its features. Raises ValueError for a model that states no shape.
    """
    if denoiser.shape is None:
        raise ValueError(f"model {name} states no shape: give the denoiser one, shape=(3, 32, 32)")

    def condition(count: int) -> dict[str, Any]:
        if not labels:
            return {}
        return {"label": torch.tensor([labels[i % len(labels)] for i in range(count)]).to(device)}

    known = denoiser.statistics
    parameter = next(denoiser.parameters(), None)
    single = parameter is not None
    return Problem(
        name,
        "own",
        denoiser,
        denoiser,
        denoiser.shape,
        _deviation(known) if known is not None else None,
        _to_features(denoiser.shape),
        floor=2e-3 if single else 1e-4,
        tolerance=1e-3 if single else 1e-5,
        dtype=torch.float32 if single else torch.float64,
        device=device,
        condition=condition,
    )


def _deviation(statistics: Statistics) -> float:
    size = statistics.mean.numel()
    rest = statistics.residual * (size - statistics.variance.numel())
    return math.sqrt((statistics.variance.sum().item() + rest) / size)


def _to_features(shape: tuple[int, ...]) -> Callable[[Tensor, int], Distances] | None:
    from ebbflow.metrics import classifier
    from ebbflow.metrics.report import Reference

    folder: Path = classifier.FOLDER
    if not (folder / "reference.safetensors").is_file():
        return None
    network = classifier.load(folder)
    if network.shape != shape:
        return None
    reference = Reference.load(folder / "reference.safetensors")

    def distances(samples: Tensor, seed: int) -> Distances:
        from ebbflow.metrics.features import extract
        from ebbflow.metrics.frechet import frechet_distance

        found = extract(network.features, samples.float().clamp(-1, 1).cpu())
        real = reference.features[: max(len(found), 2)]
        return Distances(
            sliced_wasserstein(found, real, seed=seed),
            energy_distance(found, real),
            frechet_distance(found, reference.moments, allow_few=True),
        )

    return distances
