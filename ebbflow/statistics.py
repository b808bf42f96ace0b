"""Statistics: the mean and covariance of data, pooled and per class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.bases import Basis, cosines, eigen, leading, principal

if TYPE_CHECKING:
    from ebbflow.denoiser import Denoiser

EXACT_SIZE = 1024  # up to this many coordinates a covariance is kept whole
LOW_RANK = 256
PROBED_SIZE = 256  # up to this many coordinates a model's Jacobian is probed whole


@dataclass(frozen=True)
class Statistics:
    """A mean and a covariance `Q diag(variance) Qᵀ + residual (1 - Q Qᵀ)`.

    Args:
        mean: (*shape), float64.
        variance: (r,) along the columns of the basis, or (*shape) along the cosines.
        basis: Q, (d, r) with orthonormal columns and d the number of coordinates; or None for the
            orthonormal two-dimensional cosine transform (DCT-II) of images, which nearly
            diagonalises the covariance of natural pictures.
        residual: the variance off the span of a low-rank basis.
        classes: the statistics of each class label.
    """

    mean: Tensor
    variance: Tensor
    basis: Tensor | None = None
    residual: float = 0.0
    classes: Mapping[int, Statistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d = self.mean.numel()
        expected = self.mean.shape if self.basis is None else self.basis.shape[1:]
        if self.variance.shape != expected or (self.basis is not None and len(self.basis) != d):
            raise ValueError(
                f"variance {tuple(self.variance.shape)} does not fit mean "
                f"{tuple(self.mean.shape)} in this basis"
            )
        if bool((self.variance < 0).any()) or self.residual < 0:
            raise ValueError(f"a variance is negative: {self.variance.min().item():g}")

    @staticmethod
    def from_data(
        samples: Tensor, labels: Tensor | None = None, kind: str | None = None
    ) -> Statistics:
        """Statistics of samples (N, *shape), with those of each class if labels (N,) are given.

        kind: "exact", "low-rank" or "cosine"; unless given, exact up to 1,024 coordinates, else
        cosine for images (C, H, W) and low-rank for the rest. Raises ValueError for fewer than two
        samples or values that are not finite.
        """
        if len(samples) < 2:
            raise ValueError(f"statistics need at least two samples, got {len(samples)}")
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("the samples hold NaN or infinite values")
        d, images = samples[0].numel(), samples.ndim == 4
        chosen = kind or ("exact" if d <= EXACT_SIZE else "cosine" if images else "low-rank")
        if chosen not in ("exact", "low-rank", "cosine") or (chosen == "cosine" and not images):
            raise ValueError(f"kind {kind!r}: use exact, low-rank or, for images, cosine")
        whole = _of(samples.double(), chosen)
        if labels is None:
            return whole
        if labels.shape != (len(samples),):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {(len(samples),)}")
        classes = {
            int(c): _of(samples[labels == c].double(), chosen)
            for c in labels.unique()
            if int((labels == c).sum()) > 1
        }
        return Statistics(whole.mean, whole.variance, whole.basis, whole.residual, classes)

    @staticmethod
    @torch.no_grad()
    def from_model(
        denoiser: Denoiser,
        shape: tuple[int, ...] | None = None,
        probes: int = 64,
        noise_ratio: float = 20.0,
        **condition: Any,
    ) -> Statistics:
        """Statistics of the law that a denoiser describes, from the denoiser alone.

        At a noise level sigma/alpha = `noise_ratio` far above the data's deviation, its answer at
        the centre is the mean m, and its Jacobian there is `alpha C (alpha² C + sigma²)⁻¹`, probed
        by central differences: whole up to 256 coordinates (2 d samples), else the diagonal in
        cosines of images (2 `probes` samples). Double precision networks may use a higher ratio;
        single precision loses about ratio² 1e-7 of the variance.

        shape: of one sample, unless the denoiser states it; condition: shared by all probes.
        Raises ValueError for more than 256 coordinates that are not an image.
        """
        shape = denoiser.shape if shape is None else tuple(shape)
        if shape is None:
            raise ValueError("the denoiser states no shape: give shape=")
        d = math.prod(shape)
        if d > PROBED_SIZE and len(shape) != 3:
            raise ValueError(f"{d} coordinates of shape {shape}: only images may exceed 256")
        schedule = denoiser.schedule
        lowest = schedule.log_snr(1.0).item()
        t = schedule.time(max(lowest, -2 * math.log(noise_ratio))).item()
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        like = next(denoiser.parameters(), torch.zeros((), dtype=torch.float64))

        def answer(x: Tensor) -> Tensor:
            x = x.to(like.device, torch.promote_types(like.dtype, torch.float32))
            parts = [denoiser(part, t, **condition) for part in x.split(64)]
            return torch.cat(parts).to("cpu", torch.float64)

        mean = torch.zeros(1, *shape, dtype=torch.float64)
        for _ in range(3):  # contracts by variance / noise_ratio² a time
            mean = answer(alpha * mean)

        def jacobian(directions: Tensor) -> Tensor:
            moved = torch.cat(
                [alpha * mean + sigma * directions, alpha * mean - sigma * directions]
            )
            up, down = answer(moved).chunk(2)
            return (up - down) / (2 * sigma)

        if d <= PROBED_SIZE:
            unit = torch.eye(d, dtype=torch.float64)
            slope = jacobian(unit.reshape(d, *shape)).reshape(d, d)
            gain, basis = torch.linalg.eigh(alpha * (slope + slope.T) / 2)
        else:
            z = noise.normal(0, range(probes), 0, shape, torch.float64, stream=2).sign()
            gain = alpha * (z * cosines(jacobian(cosines(z, inverse=True)))).mean(0)
            basis = None
        variance = (sigma / alpha) ** 2 * gain / (1 - gain)
        return Statistics(mean[0], variance.clamp(min=0), basis)

    @staticmethod
    def exact(mean: Tensor, covariance: Tensor) -> Statistics:
        """Statistics of a known mean (*shape) and covariance (d, d)."""
        return Statistics(mean.double(), *eigen(covariance))

    def given(self, **condition: Any) -> Statistics | None:
        """The statistics under a condition: of its one class, `given(label=3)`, or these if there
        are no classes or no label; None for labels that differ or a class that is not known."""
        label = condition.get("label")
        if label is None or not self.classes:
            return self
        labels = torch.as_tensor(label).unique().tolist()
        return self.classes.get(labels[0]) if len(labels) == 1 else None

    def means(self, x: Tensor, **condition: Any) -> Tensor:
        """The mean of each sample's class (B, *shape), or of all data (1, *shape) without labels;
        like x (B, *shape) in dtype and device. Labels that are no class have the mean of all;
        floating labels are weights of classes (B, K)."""
        label = condition.get("label")
        if label is None or not self.classes:
            return self.mean[None].to(x.device, x.dtype)
        labels = torch.as_tensor(label)
        if labels.is_floating_point():  # weights of classes (B, K)
            table = [self.classes.get(k, self).mean for k in range(labels.shape[-1])]
            return torch.tensordot(labels.to(x.dtype), torch.stack(table).to(x.device, x.dtype), 1)
        means = [self.classes.get(c, self).mean for c in labels.expand(len(x)).tolist()]
        return torch.stack(means).to(x.device, x.dtype)

    @property
    def axes(self) -> Basis | None:
        """Coordinates in which the covariance is `diag(variance)`; None for a low-rank basis."""
        if self.basis is None:
            return Basis("cosine", tuple(self.mean.shape))
        d, rank = self.basis.shape
        return Basis("matrix", (d,), self.basis) if rank == d else None

    def covariance(self) -> Tensor:
        """The whole covariance (d, d)."""
        unit = torch.eye(self.mean.numel(), dtype=torch.float64)
        return self.scale(unit.reshape(-1, *self.mean.shape), power=1.0).reshape(unit.shape)

    def scale(
        self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0, power: float = 1.0
    ) -> Tensor:
        """`(alpha² C + sigma²)^power x` for a batch x (B, *shape)."""

        def gain(variance: Tensor | float) -> Any:
            return (alpha**2 * variance + sigma**2) ** power

        if self.basis is None:
            weights = gain(self.variance).to(x.dtype)
            return cosines(weights * cosines(x), inverse=True)
        basis = self.basis.to(x.dtype)
        flat = x.reshape(len(x), -1)
        inside = flat @ basis
        out = (inside * gain(self.variance).to(x.dtype)) @ basis.T
        if basis.shape[0] > basis.shape[1]:
            out = out + float(gain(self.residual)) * (flat - inside @ basis.T)
        return out.reshape(x.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors from which `from_tensors` makes these statistics again."""
        out: dict[str, Tensor] = {}
        for prefix, part in {"": self, **{f"{c}.": s for c, s in self.classes.items()}}.items():
            out[f"{prefix}mean"] = part.mean.contiguous()
            out[f"{prefix}variance"] = part.variance.contiguous()
            out[f"{prefix}residual"] = torch.tensor(part.residual, dtype=torch.float64)
            if part.basis is not None:
                out[f"{prefix}basis"] = part.basis.contiguous()
        return out

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Statistics:
        """The statistics that `tensors` described; raises ValueError for missing ones."""
        labels = {int(name.split(".")[0]) for name in tensors if "." in name}

        def part(prefix: str, classes: Mapping[int, Statistics]) -> Statistics:
            try:
                mean, variance = tensors[f"{prefix}mean"], tensors[f"{prefix}variance"]
                residual = tensors[f"{prefix}residual"].item()
            except KeyError as error:
                raise ValueError(f"the statistics lack {error}") from error
            basis = tensors.get(f"{prefix}basis")
            basis = None if basis is None else basis.double()
            return Statistics(mean.double(), variance.double(), basis, residual, classes)

        return part("", {label: part(f"{label}.", {}) for label in sorted(labels)})


def _of(x: Tensor, kind: str) -> Statistics:
    mean, rows = x.mean(0), x.flatten(1)
    if kind == "cosine":
        return Statistics(mean, cosines(x - mean).square().sum(0) / (len(x) - 1))
    parts: Any = principal(rows) if kind == "exact" else leading(rows, LOW_RANK)
    return Statistics(mean, *parts)
