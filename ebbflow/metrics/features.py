"""Images through a feature network, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ebbflow.progress import bar

Network = Callable[[Tensor], Tensor]
Item = TypeVar("Item")


def extract(
    network: Network,
    images: Tensor,
    batch: int = 256,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Tensor:
    """Features (n, d) of images (n, C, H, W) by `network`: (B, C, H, W) in [-1, 1] -> (B, d).

    Images are uint8, or floats in [-1, 1], clipped where a model overshoots a little. Raises
    ValueError for other types and ranges, which a network answers just as readily.
    """
    return torch.cat(list(batches(network, images, batch, device, progress)))


def batches(
    network: Network,
    images: Tensor,
    batch: int = 256,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Iterator[Tensor]:
    """What `extract` returns, batch by batch, on the CPU."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have the shape (n, C, H, W), got {tuple(images.shape)}")
    check_range(images)
    for part in track(images.split(batch), "features", progress):
        part = part.to(device)
        levels = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float()
        with torch.no_grad():
            yield network(levels.clamp(-1, 1)).cpu()


def track(items: Sequence[Item], description: str, progress: bool) -> Iterator[Item]:
    """`items`, with a progress bar on stderr if `progress` is true."""
    if not progress:
        yield from items
        return
    with bar(description, len(items)) as advance:
        for item in items:
            yield item
            advance()


def check_range(values: Tensor) -> None:
    """Raise ValueError unless `values` are uint8, or floats in [-1, 1] up to a small overshoot."""
    if values.dtype == torch.uint8:
        return
    if not values.is_floating_point():
        raise ValueError(f"images of type {values.dtype}: give uint8, or floats in [-1, 1]")
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        raise ValueError(
            f"float images in [{low:.4g}, {high:.4g}], expected [-1, 1]: rescale with 2 * x - 1"
        )
    if not (low >= -1.1 and high <= 1.1):  # NaN fails too
        raise ValueError(
            f"float images in [{low:.4g}, {high:.4g}], expected [-1, 1]: "
            "give levels 0 to 255 as uint8, or rescale with x / 127.5 - 1"
        )
