"""Samples streamed in chunks that are aligned to the sample index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.plan import Plan
from ebbflow.sampling import sample


@dataclass(frozen=True)
class Shard:
    """Part `index` of `total`: every total-th chunk. The parts' union is the whole, bit for bit."""

    index: int = 0
    total: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.total:
            raise ValueError(f"shard {self.index}/{self.total}: write K/N with 0 <= K < N")

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """`K/N`; without it what a launcher says in RANK and WORLD_SIZE, else the whole."""
        if text is None:
            return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        index, slash, total = text.partition("/")
        if not (slash and index.isdecimal() and total.isdecimal()):
            raise ValueError(f"shard {text!r} must be K/N with 0 <= K < N, such as 0/4")
        return cls(int(index), int(total))

    def chunks(self, count: int, size: int) -> list[range]:
        """This part's chunks of indices below `count`, each starting at a multiple of `size`."""
        starts = range(self.index * size, count, self.total * size)
        return [range(start, min(start + size, count)) for start in starts]


@dataclass(frozen=True)
class Recipe:
    """Everything on which a sample depends, besides its index.

    `shape` is that of one sample. `classes` is empty for a model without classes; sample i has
    the class `classes[i % len(classes)]`.
    """

    denoiser: Denoiser
    plan: Plan
    shape: tuple[int, ...]
    classes: tuple[int, ...]
    seed: int
    batch: int
    device: torch.device

    def labels(self, indices: range) -> list[int]:
        """The class of each sample, empty for a model without classes."""
        return [self.classes[i % len(self.classes)] for i in indices] if self.classes else []

    def stream(
        self, chunks: list[range], on_step: Callable[..., None] | None = None
    ) -> Iterator[tuple[range, Tensor]]:
        """Each chunk with its samples (len(chunk), *shape), on the CPU.

        When the device's memory runs out, the batch is halved for this and the following chunks.
        """
        batch = self.batch
        condition = {}
        for chunk in chunks:
            if self.classes:
                condition["label"] = torch.tensor(self.labels(chunk), device=self.device)
            samples = None
            while samples is None:
                try:
                    samples = sample(
                        self.denoiser,
                        (len(chunk), *self.shape),
                        plan=self.plan,
                        seed=self.seed,
                        first_index=chunk.start,
                        batch=batch,
                        on_step=on_step,
                        **condition,
                    )
                except torch.OutOfMemoryError:
                    if batch == 1:
                        raise
                    batch //= 2
            yield chunk, samples.cpu()
