"""Calibration: a trained model's mean score, measured once and subtracted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow import grids, noise
from ebbflow.denoiser import PREDICTIONS, Denoiser, Frozen, Wrapper
from ebbflow.files import read_tensors, write_tensors
from ebbflow.finite import readable
from ebbflow.schedules import Schedule, TimeLike, along, as_time

FILE = "calibration.safetensors"


class Calibrated(Wrapper):
    """A denoiser whose mean score is zero: `s(x, t) - E[s(x_t, t)]`; made by `calibrate`.

    The true score has mean zero over the forward process at every time, so a mean is an error, and
    taking it away lowers the score-matching loss by half its square. In the other predictions it is
    the shift that makes the means agree: of x_0 with the data's, of the noise with zero. The law is
    meant to be the same, so the statistics stay. No more passes than before.
    On Calibrating Diffusion Probabilistic Models.

    Args:
        inner: the denoiser.
        angles: (T,) rising, `atan(sigma/alpha)` of the measured times, in [0, pi/2].
        shift: (R, T, *shape), `(E[x_0 prediction] - E[x_0]) / sin(angle)` in the data's units, one
            row a class, and a last one for calls without a class if there is a null label or
            there are no classes. Between the angles it is interpolated linearly, beyond constant.
        labels: (C,) the classes; empty where labels make no difference.
        null: the label that stands for no class, or None if every call has a class.
        standard_error: of `shift`, in its shape.
    """

    def __init__(
        self,
        inner: Denoiser,
        angles: Tensor,
        shift: Tensor,
        labels: Tensor,
        null: int | None = None,
        standard_error: Tensor | None = None,
    ) -> None:
        super().__init__(inner)
        if angles.ndim != 1 or len(angles) < 1 or bool((angles.diff() <= 0).any()):
            raise ValueError(f"angles of shape {tuple(angles.shape)} must be rising, (T,)")
        rows = len(labels) + (null is not None or len(labels) == 0)
        if shift.shape[:2] != (rows, len(angles)):
            raise ValueError(
                f"shift has shape {tuple(shift.shape)}, expected ({rows} rows, {len(angles)} times,"
                f" *shape) for {len(labels)} classes and null={null}"
            )
        if inner.shape is not None and tuple(shift.shape[2:]) != inner.shape:
            raise ValueError(
                f"a calibration of samples {tuple(shift.shape[2:])} does not fit a denoiser of "
                f"{inner.shape}: calibrate this model itself"
            )
        self.statistics = inner.statistics
        self.null = null
        known = torch.zeros_like(shift) if standard_error is None else standard_error
        self.angles: Tensor
        self.shift: Tensor
        self.labels: Tensor
        self.standard_error: Tensor
        for name, value in {"angles": angles, "shift": shift, "standard_error": known}.items():
            self.register_buffer(name, value.double())
        self.register_buffer("labels", labels.long())

    def passes(self, t: float) -> int:
        return self.net.passes(t)  # pyright: ignore

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        frozen = self.net.at(t, x, target)  # pyright: ignore
        now, home = as_time(t), self.shift.device
        low, weight = (value.to(home) for value in self._place(now))
        factor = _factor(self.schedule, now, target).to(home)
        if now.ndim == 0:
            table = factor * torch.lerp(self.shift[:, low], self.shift[:, low + 1], weight)
            table = table.to(x.device, x.dtype)
            return lambda x, **condition: (
                -table[self._rows(condition.get("label"))] + frozen(x, **condition)
            )

        def calibrated(x: Tensor, **condition: Any) -> Tensor:
            row = self._rows(condition.get("label"))
            left, right = self.shift[row, low], self.shift[row, low + 1]
            move = along(factor, x) * torch.lerp(left, right, along(weight, x))
            return frozen(x, **condition) - move.to(x.device, x.dtype)

        return calibrated

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the measured angle below and the weight of the one above, in the shape of t."""
        if len(self.angles) == 1:  # the pair (-1, 0) is the one angle twice
            return torch.full_like(t, -1, dtype=torch.long), torch.ones_like(t)
        angles = self.angles.to(t.device)
        angle = torch.atan2(self.schedule.sigma(t), self.schedule.alpha(t))
        angle = angle.clamp(angles[0], angles[-1])
        above = torch.searchsorted(angles, angle.contiguous()).clamp(1, len(angles) - 1)
        left, right = angles[above - 1], angles[above]
        return above - 1, (angle - left) / (right - left)

    def _rows(self, label: Any) -> Tensor | int:
        """The row of the table for each label; raises ValueError for labels never measured."""
        if len(self.labels) == 0:
            return 0
        if label is None and self.null is not None:
            return len(self.labels)
        if label is None:
            raise ValueError(
                f"no label: this calibration knows the classes {self.labels.tolist()} and nothing "
                "without; give one, or calibrate with null="
            )
        label = torch.as_tensor(label, device=self.labels.device)
        hit = label[..., None] == self.labels
        missed = ~hit.any(-1)
        if self.null is not None:
            missed = missed & (label != self.null)
        if readable(missed) and bool(missed.any()):
            bad = label[missed].flatten()[0].item()
            raise ValueError(
                f"label {bad} was not calibrated: known are {self.labels.tolist()} and, for none, "
                f"{self.null}; calibrate with samples of it"
            )
        return torch.where(hit.any(-1), hit.long().argmax(-1), len(self.labels))

    def save(self, folder: str | Path) -> None:
        """Write the correction, in a file `calibration.safetensors` of the folder; `load` reads it.

        The denoiser inside is saved on its own, in this folder or elsewhere.
        """
        names = ("angles", "shift", "labels", "standard_error")
        null = torch.tensor([] if self.null is None else [self.null], dtype=torch.long)
        tensors = {name: getattr(self, name).cpu().contiguous() for name in names}
        write_tensors(Path(folder) / FILE, {**tensors, "null": null})

    @staticmethod
    def load(folder: str | Path, inner: Denoiser) -> Calibrated:
        """The correction that `save` wrote, on its denoiser; raises ValueError for other files."""
        path = Path(folder) / FILE
        tensors = read_tensors(path)
        names = ["angles", "labels", "null", "shift", "standard_error"]
        if sorted(tensors) != names:
            raise ValueError(f"{path} holds {sorted(tensors)[:6]}, expected {names}")
        null = tensors["null"].tolist()
        angles, shift, labels = (tensors[name] for name in ("angles", "shift", "labels"))
        only = null[0] if null else None
        return Calibrated(inner, angles, shift, labels, only, tensors["standard_error"])


def _factor(schedule: Schedule, t: Tensor, target: str) -> Tensor:
    """What a shift of one moves a prediction by, at times t.

    Of x_0 by sin, of the noise by -cos of the angle, and every prediction F is made of them:
    `scale F = r x_0 + s eps`. Finite at both ends but for the score without noise, which raises.
    """
    r, s, scale = PREDICTIONS[target](schedule, t, None)
    if readable(scale) and bool((scale == 0).any()):
        raise ValueError(f"the {target} of a calibrated denoiser is infinite where sigma = 0")
    angle = torch.atan2(schedule.sigma(t), schedule.alpha(t))
    return (r * torch.sin(angle) - s * torch.cos(angle)) / scale


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    data: Tensor,
    times: Sequence[float] | int = 32,
    seed: int = 0,
    labels: Tensor | None = None,
    null: int | None = None,
    confidence: float = 0.0,
    batch: int = 256,
    **condition: Any,
) -> Calibrated:
    """Measure a denoiser's mean score over noisy data and subtract it from now on.

    At each time t, with each sample x_0 and its noise eps, as +eps and as -eps (so that the noise
    averages to exactly zero): `E[D(x_t, t)] - E[x_0]`, which is `-sigma/alpha` times the mean noise
    prediction and `sigma²/alpha` times the mean score. A sample keeps its noise at all times.

    Args:
        data: (N, *shape), the training data or as much of it as there is time for: the error of
            the correction falls as 1/sqrt(N), and is stated in `.standard_error`. With too few, a
            good model is made worse: see confidence.
        times: those to measure at, such as a plan's own, or how many, uniform in the angle.
        labels: (N,) for one calibration a class, passed to the denoiser as `label`.
        null: the label that stands for no class, such as 10, where guidance needs one for that too.
        confidence: c of the shrinkage `shift max(0, 1 - (c standard_error / shift)²)`, which leaves
            alone what cannot be told from zero: 0 subtracts the whole measured mean as the paper
            does, 2 or 3 is for small data.
        batch: samples of one call; condition: shared by all calls.
    Costs 2 N passes a time, 4 N with a null. Raises ValueError for data that do not fit.
    """
    if len(data) < 2 or not bool(torch.isfinite(data).all()):
        raise ValueError(f"{len(data)} samples: at least 2 are needed, with finite values")
    if not 0 <= confidence < math.inf:
        raise ValueError(f"confidence must be finite and at least 0, got {confidence}")
    if labels is not None and labels.shape != (len(data),):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {(len(data),)}")
    denoiser.check_input(data)
    if isinstance(times, int):
        times = _spread(denoiser.schedule, times)
    nodes = torch.tensor(sorted(set(times)), dtype=torch.float64)
    angles = torch.atan2(denoiser.schedule.sigma(nodes), denoiser.schedule.alpha(nodes))
    if bool((angles == 0).any()):
        raise ValueError("times hold one without noise, where every prediction is right: leave it")
    like = next(denoiser.parameters(), data)
    dtype = torch.promote_types(like.dtype, torch.float32)
    eps = noise.normal(seed, range(len(data)), 0, data.shape[1:], dtype, stream=4)

    def mean(chosen: Tensor, label: int | None) -> tuple[Tensor, Tensor]:
        found = [_mean(denoiser, data, eps, chosen, t, label, batch, condition) for t in nodes]
        value, error = (torch.stack(part) for part in zip(*found, strict=True))
        return value / along(torch.sin(angles), value), error / along(torch.sin(angles), error)

    known = torch.zeros(0, dtype=torch.long) if labels is None else labels.unique().cpu()
    if null is not None:
        known = known[known != null]
    parts = [mean(torch.nonzero(labels == c)[:, 0], int(c)) for c in known]
    if null is not None or labels is None:
        parts.append(mean(torch.arange(len(data)), null))
    shift, error = (torch.stack(part) for part in zip(*parts, strict=True))
    if confidence > 0:
        share = 1 - (confidence * error).square() / shift.square()  # -inf for a shift of zero
        shift = torch.where(share > 0, share * shift, 0.0)
    return Calibrated(denoiser, angles, shift, known, null, error)


def _spread(schedule: Schedule, count: int) -> list[float]:
    nodes = grids.angle(schedule, grids.check_steps(count))
    return [t for t in nodes if schedule.sigma(t).item() > 0]


def _mean(
    denoiser: Denoiser,
    data: Tensor,
    eps: Tensor,
    rows: Tensor,
    t: Tensor,
    label: int | None,
    batch: int,
    condition: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Mean of `D(x_t, t) - x_0` over both signs of the noise, and its standard error, (*shape)."""
    alpha, sigma = denoiser.schedule.alpha(t).item(), denoiser.schedule.sigma(t).item()
    like = next(denoiser.parameters(), data)
    total = torch.zeros(data.shape[1:], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in rows.split(batch):
        x0, z = (v[part].to(like.device, eps.dtype) for v in (data, eps))
        extra = dict(condition)
        if label is not None:
            extra["label"] = torch.full((len(part),), label, device=like.device)
        up = denoiser(alpha * x0 + sigma * z, t, **extra)
        down = denoiser(alpha * x0 - sigma * z, t, **extra)
        error = ((up.double() + down.double()) / 2 - x0.double()).cpu()
        total += error.sum(0)
        squares += error.square().sum(0)
    n = len(rows)
    mean = total / n
    variance = (squares / n - mean.square()).clamp(min=0) * n / max(n - 1, 1)
    return mean, (variance / n).sqrt() if n > 1 else torch.full_like(mean, math.inf)
