"""The training loop."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebbflow.data import Images
from ebbflow.denoiser import Denoiser
from ebbflow.images import write_grid
from ebbflow.sampling import sample
from ebbflow.storage import save
from ebbflow.training import checkpoint, draws
from ebbflow.training.config import Config, learning_rate
from ebbflow.training.journal import Journal
from ebbflow.training.loss import denoising_loss
from ebbflow.training.state import State

if TYPE_CHECKING:
    from accelerate import Accelerator

GRID = 64
"""Pictures in a grid of samples."""

logger = logging.getLogger("ebbflow")


def train(
    denoiser: Denoiser,
    images: Images,
    config: Config,
    folder: str | Path,
    *,
    held_out: Images | None = None,
    device: str | None = None,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    details: Mapping[str, Any] | None = None,
) -> int:
    """Train `denoiser.net` in place and return the step reached.

    The run lives in `folder`: `model/` (the untrained denoiser), `checkpoints/`, `averages/`,
    `samples/` and `log.jsonl`. If it holds a checkpoint, the run goes on from there, to weights
    bit-identical to those of a run that was never interrupted (same device type and processes).
    `stop` is asked after every step; when it says True, a checkpoint is written and the run ends.
    `details` are facts for the model's readers, such as its class names.

    Raises ValueError when a resumed run has other options, FloatingPointError when the loss or the
    gradient is not finite, OSError when a checkpoint cannot be written.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "Training needs accelerate; install it with: pip install 'ebbflow[train]'"
        ) from error

    # Without this, cuBLAS may add in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    if device is not None and accelerator.device.type != torch.device(device).type:
        raise ValueError(f"device is {device!r}; this machine offers {accelerator.device.type!r}.")
    _check(denoiser, images, config, accelerator.num_processes)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run = _Run(denoiser, images, config, Path(folder), held_out, accelerator)
        if accelerator.is_main_process and run.start == 0:
            save(denoiser, run.folder / "model", details=details)
        return run.go(progress, stop)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _check(denoiser: Denoiser, images: Images, config: Config, processes: int) -> None:
    if denoiser.shape is not None and tuple(denoiser.shape) != images.shape:
        raise ValueError(f"The denoiser takes {denoiser.shape}; the images are {images.shape}.")
    net: Any = denoiser.net
    classes = getattr(net, "config", {}).get("classes", images.classes)
    if classes != images.classes:
        raise ValueError(f"The network has {classes} classes; the images have {images.classes}.")
    if net.state_dict().keys() != dict(net.named_parameters()).keys():
        raise ValueError("The network keeps buffers (such as batch norm's), which have no average.")
    if config.batch % (processes * config.accumulate):
        raise ValueError(
            f"batch is {config.batch}; it must be a multiple of processes x accumulate, "
            f"{processes} x {config.accumulate}."
        )
    if len(images) < config.batch:
        logger.warning("%d images for a batch of %d: images repeat", len(images), config.batch)


def identity(denoiser: Denoiser, images: Images, config: Config) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that resumes it, as JSON values."""
    tree = {
        "network": {"kind": type(denoiser.net).__name__, **getattr(denoiser.net, "config", {})},
        "schedule": denoiser.schedule.config(),
        "prediction": denoiser.prediction,
        "time": denoiser.time,
        "sigma_data": denoiser.sigma_data,
        "data": images.fingerprint(),
        "training": config.identity(),
    }
    return json.loads(json.dumps(tree))


@dataclass
class _Recent:
    """Figures since the last line of the log."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)


class _Run:
    def __init__(
        self,
        denoiser: Denoiser,
        images: Images,
        config: Config,
        folder: Path,
        held_out: Images | None,
        accelerator: Accelerator,
    ) -> None:
        self.images, self.config, self.folder = images, config, folder
        self.held_out, self.accelerator = held_out, accelerator
        self.device = accelerator.device
        self.identity = identity(denoiser, images, config)
        self.recent = _Recent()
        net: Any = denoiser.net
        net.to(self.device).train()
        if config.channels_last:
            net.to(memory_format=torch.channels_last)
        self.prepared: Any = accelerator.prepare(net)
        self.like = denoiser
        self.denoiser = self._with(self.prepared)
        self.state = State(net, config)
        self.start = 0
        if found := checkpoint.load(folder / "checkpoints"):
            record, tensors = found
            checkpoint.require_same(record["identity"], self.identity, folder)
            self.start = record["step"]
            self.state.restore(tensors, self.start)
            logger.info("resumed at step %d", self.start)

    def _with(self, net: nn.Module) -> Denoiser:
        """The denoiser with another network."""
        like = self.like
        return Denoiser(
            net,
            like.schedule,
            like.prediction,
            like.shape,
            time=like.time,
            sigma_data=like.sigma_data,
        )

    def go(self, progress: bool, stop: Callable[[], bool]) -> int:
        config, main = self.config, self.accelerator.is_main_process
        if main and self.start == 0:
            self._save(0, snapshot=False)
        step = self.start
        log = self.folder / "log.jsonl"
        with Journal(log, self.start, config.steps, main, progress) as journal:
            for step in range(self.start + 1, config.steps + 1):
                self._step(step)
                last = step == config.steps or self._agree(stop, step)
                regular = self._due(step, config.checkpoint_every)
                # Nothing is saved before its losses are known to be finite.
                if last or regular or self._due(step, config.log_every):
                    self._report(step, journal)
                if main:
                    self._look(step, journal)
                    if last or regular:
                        self._save(step, snapshot=regular)
                journal.show(step)
                if last:
                    break
        self.accelerator.wait_for_everyone()
        return step

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _step(self, step: int) -> None:
        config, accelerator = self.config, self.accelerator
        part = config.batch // accelerator.num_processes // config.accumulate
        first = part * config.accumulate * accelerator.process_index
        total = torch.zeros((), device=self.device)
        for number in range(config.accumulate):
            positions = range(first + number * part, first + (number + 1) * part)
            batch = draws.training_batch(
                self.images, config, self.denoiser.schedule, step, positions
            )
            complete = number == config.accumulate - 1
            with nullcontext() if complete else accelerator.no_sync(self.prepared):
                loss = self._loss(self.denoiser, batch).mean() / config.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        self.recent.norms.append(self.state.update(step))
        self.recent.losses.append(total)

    def _loss(self, denoiser: Denoiser, batch: draws.Batch) -> Tensor:
        device = self.device
        x0, noise = batch.x0.to(device), batch.noise.to(device)
        condition = {name: value.to(device) for name, value in batch.condition.items()}
        if self.config.channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        half = self.config.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return denoising_loss(denoiser, x0, batch.t, noise, **condition)

    def _agree(self, stop: Callable[[], bool], step: int) -> bool:
        """Whether to stop; several processes must decide as one, at lines of the log."""
        if self.accelerator.num_processes == 1:
            return stop()
        if step % self.config.log_every:
            return False
        return bool(self._reduce(torch.tensor(float(stop()), device=self.device)) > 0)

    def _reduce(self, value: Tensor) -> Tensor:
        """The mean over the processes, on the CPU."""
        mean: Any = self.accelerator.reduce(value, "mean")
        return mean.cpu().double()

    def _report(self, step: int, journal: Journal) -> None:
        config, recent = self.config, self.recent
        losses = self._reduce(torch.stack(recent.losses))
        norms = torch.stack(recent.norms).cpu().double()
        bad = ~(losses.isfinite() & norms.isfinite())
        if bad.any():
            place = int(bad.int().argmax())
            at = step - len(losses) + 1 + place
            raise FloatingPointError(
                f"Step {at}: loss {losses[place]:g}, norm of the gradient {norms[place]:g} "
                f"(before: {norms[place - 1] if place else math.nan:g}), learning rate "
                f"{learning_rate(config, at):g}. The run stopped; its last checkpoint is intact. "
                'Try a lower learning_rate, a longer warmup, or precision "float32".'
            )
        seconds = time.monotonic() - recent.begun
        rate = len(losses) * config.batch / seconds
        loss = float(losses.mean())
        journal.write(
            step=step,
            images=step * config.batch,
            loss=loss,
            gradient_norm=float(norms.mean()),
            learning_rate=learning_rate(config, step),
            images_per_second=round(rate, 2),
            time=round(time.time(), 1),
        )
        journal.show(step, loss, rate)
        self.recent = _Recent()

    @torch.no_grad()
    def _look(self, step: int, journal: Journal) -> None:
        """Loss on held-out images and a grid of samples, where they are due."""
        begun = time.monotonic()
        if self.held_out is not None and self._due(step, self.config.validate_every):
            journal.write(step=step, validation_loss=self._validate(self.held_out))
        if self._due(step, self.config.sample_every):
            self._sample(step)
        self.recent.begun += time.monotonic() - begun

    def _validate(self, held_out: Images) -> float:
        denoiser, losses = self._with(self.state.averaged()), []
        for first in range(0, len(held_out), self.config.batch):
            positions = range(first, min(first + self.config.batch, len(held_out)))
            batch = draws.validation_batch(held_out, self.config, denoiser.schedule, positions)
            losses.append(self._loss(denoiser, batch).cpu())
        return float(torch.cat(losses).double().mean())

    def _sample(self, step: int) -> None:
        classes = self.images.classes
        label = torch.arange(GRID, device=self.device) % max(classes, 1)
        condition = {"label": label} if classes else {}
        samples = sample(
            self._with(self.state.averaged()), (GRID, *self.images.shape), steps=20, **condition
        )
        write_grid(samples, self.folder / "samples" / f"step-{step:08d}.png")

    def _save(self, step: int, snapshot: bool) -> None:
        if snapshot:
            path = self.folder / "averages" / f"step-{step:08d}.safetensors"
            checkpoint.write_tensors(path, self.state.average_tensors())
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, step, self.state.tensors(), self.identity, self.config.keep)
