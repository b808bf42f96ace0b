"""Tensors in [-1, 1] as PNG files: one picture, or many side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebbflow.files import replacing

if TYPE_CHECKING:
    import numpy


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C); values outside are clipped."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"pictures need the shape (B, 1 or 3, H, W), got {tuple(images.shape)}: "
            "one grey or three colour channels"
        )
    levels = ((images.detach().float() + 1.0) * 127.5).round().clamp(0.0, 255.0)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> numpy.ndarray:
    """Images (B, C, H, W) in reading order as one uint8 picture (height, width, C).

    Every pixel becomes `scale` x `scale` equal pixels; `gap` white pixels (before scaling) lie
    between the images, and places left over in the last row are white.
    """
    import numpy as np

    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    pixels = to_uint8(images).numpy()
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    pitch_y = height + gap
    pitch_x = width + gap
    shape = (rows * pitch_y - gap, columns * pitch_x - gap, channels)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for index, picture in enumerate(pixels):
        top = index // columns * pitch_y
        left = index % columns * pitch_x
        sheet[top : top + height, left : left + width] = picture
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def write_png(pixels: numpy.ndarray, path: str | Path) -> None:
    """Write a uint8 picture (height, width, 1 or 3) as PNG, completely or not at all."""
    from PIL import Image

    picture = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def write_grid(
    images: Tensor, path: str | Path, columns: int | None = None, scale: int | None = None
) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG, by default nearly square and easy to see.

    `scale` defaults to the largest whole factor that keeps a column of images below 100 pixels.
    """
    if columns is None:
        columns = max(1, round(len(images) ** 0.5))
    if scale is None:
        scale = max(1, 96 // images.shape[-1])
    write_png(grid(images, columns, scale), path)


def write_singles(images: Tensor, folder: str | Path, first_index: int = 0) -> None:
    """Write each image (C, H, W) as `folder/000337.png`, numbered from `first_index`."""
    for offset, pixels in enumerate(to_uint8(images).numpy()):
        write_png(pixels, single_path(folder, first_index + offset))


def single_path(folder: str | Path, index: int) -> Path:
    """The file that holds sample `index` in a folder of single images."""
    return Path(folder) / f"{index:06d}.png"


def density(points: Tensor, bins: int = 128, scale: int = 4) -> numpy.ndarray:
    """Points (N, 2) as a uint8 picture (bins*scale, bins*scale, 1): darker where there are more.

    The picture shows the square around the origin that holds all points, the first axis to the
    right, the second up.
    """
    import numpy as np

    values = points.detach().double().cpu().numpy()
    extent = 1.05 * float(np.abs(values).max()) or 1.0
    ranges = ((-extent, extent), (-extent, extent))
    counts, _, _ = np.histogram2d(values[:, 1], values[:, 0], bins=bins, range=ranges)
    # The square root keeps the thin parts visible.
    shade = 255.0 * (1.0 - np.sqrt(counts / counts.max()))
    sheet = shade.round().astype(np.uint8)[::-1, :, None]
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)
