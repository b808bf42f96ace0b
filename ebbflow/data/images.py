"""A data set of pictures in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy

Fit = Literal["crop", "pad"]
"""How a picture gets its size: "crop" scales (antialiased) the largest centred square; "pad" keeps
the pixels and puts them in the middle of the background."""


def to_float(pixels: Tensor) -> Tensor:
    """uint8 values 0..255 as float32 in [-1, 1]; the one place where this is done."""
    return pixels.to(torch.float32) / 127.5 - 1.0


@dataclass(frozen=True)
class Images:
    """Pixels uint8 (N, C, H, W), labels int64 (N,) or None, and the names of the classes."""

    pixels: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixels are {self.pixels.dtype} of shape {tuple(self.pixels.shape)}; "
                "they must be uint8 of shape (N, C, H, W)."
            )
        if len(self.pixels) == 0:
            raise ValueError("There are no images; give at least one.")
        if self.labels is None:
            if self.class_names:
                raise ValueError("class_names without labels; give the labels too.")
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}; "
                f"{len(self.pixels)} images need int64 of shape ({len(self.pixels)},)."
            )
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest >= len(self.class_names):
            raise ValueError(
                f"labels run from {lowest} to {highest}; {len(self.class_names)} classes need "
                f"labels in [0, {len(self.class_names) - 1}]."
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def classes(self) -> int:
        """Number of classes, 0 without labels."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one picture."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def floats(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Pictures in [-1, 1], float32 (B, C, H, W)."""
        return to_float(self.pixels[indices])

    def root_mean_square(self) -> float:
        """Of all values in [-1, 1], about 0."""
        counts = self.pixels.flatten().bincount(minlength=256).double()
        levels = to_float(torch.arange(256, dtype=torch.uint8)).double()
        return float((counts * levels**2).sum() / counts.sum()) ** 0.5

    def split(self, held_out: int) -> tuple[Images, Images | None]:
        """All but the last `held_out` pictures, and those last ones (None for 0)."""
        if not 0 <= held_out < len(self):
            raise ValueError(
                f"held_out is {held_out}; of {len(self)} images, hold out 0 to {len(self) - 1}."
            )
        if held_out == 0:
            return self, None
        count = len(self) - held_out
        return self._take(slice(0, count)), self._take(slice(count, None))

    def _take(self, part: slice) -> Images:
        labels = None if self.labels is None else self.labels[part]
        return replace(self, pixels=self.pixels[part], labels=labels)

    def fingerprint(self) -> str:
        """SHA-256 of pixels, labels and class names: which data this is."""
        digest = hashlib.sha256(repr((tuple(self.pixels.shape), self.class_names)).encode())
        digest.update(self.pixels.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def from_array(
    array: numpy.ndarray | Tensor,
    labels: Any = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    background: int = 0,
    class_names: tuple[str, ...] = (),
) -> Images:
    """Pictures from an array (N, H, W), (N, H, W, C) or (N, C, H, W) of uint8 or uint16.

    `labels` are N whole numbers from 0. Floats are refused, for their range is not known.
    """
    import numpy as np

    values = np.asarray(array)
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    if values.dtype != np.uint8:
        raise ValueError(
            f"Images are {values.dtype}; give uint8 in 0..255, for floats in [0, 1] "
            "(255 * x).round().astype('uint8')."
        )
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and values.shape[3] in (1, 3):
        values = values.transpose(0, 3, 1, 2)
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise ValueError(
            f"Images have shape {values.shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels."
        )
    if len(values) == 0:
        raise ValueError(f"There are no images in an array of shape {values.shape}.")
    # A copy: the array may be read-only, and its owner may change it.
    pixels = torch.from_numpy(np.array(values, order="C"))
    pixels = fit_to(to_channels(pixels, channels), size, fit, background)
    return Images(pixels, *_classes(labels, class_names))


def _classes(labels: Any, class_names: tuple[str, ...]) -> tuple[Tensor | None, tuple[str, ...]]:
    import numpy as np

    if labels is None:
        return None, ()
    values = np.asarray(labels)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"labels are {values.dtype}; give whole numbers from 0.")
    if not class_names and values.size:
        class_names = tuple(str(label) for label in range(int(values.max()) + 1))
    return torch.from_numpy(values.astype(np.int64)), class_names


def to_channels(pixels: Tensor, channels: int | None) -> Tensor:
    """uint8 pictures (N, C, H, W) with the asked number of channels, 1 (grey) or 3."""
    if channels is None or pixels.shape[1] == channels:
        return pixels
    if (pixels.shape[1], channels) == (1, 3):
        return pixels.expand(-1, 3, -1, -1).contiguous()
    if (pixels.shape[1], channels) == (3, 1):
        # ITU-R 601-2 luma, as Pillow's conversion to "L".
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (pixels.float() * luma).sum(1, keepdim=True).round().to(torch.uint8)
    raise ValueError(f"channels is {channels}; give 1 (grey) or 3 (colour).")


def fit_to(pixels: Tensor, size: int | None, fit: Fit, background: int) -> Tensor:
    """uint8 pictures (N, C, H, W) at size x size pixels; None leaves them as they are."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    if size < 1:
        raise ValueError(f"size is {size}; give at least 1 pixel.")
    if fit == "pad":
        return _pad(pixels, size, background)
    from PIL import Image

    resized = torch.empty(*pixels.shape[:2], size, size, dtype=torch.uint8)
    box = _centre(pixels.shape[3], pixels.shape[2])
    for source, target in zip(pixels.flatten(0, 1), resized.flatten(0, 1), strict=True):
        picture = Image.fromarray(source.numpy())
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
        target.copy_(
            torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size)
        )
    return resized


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _pad(pixels: Tensor, size: int, background: int) -> Tensor:
    height, width = pixels.shape[2:]
    if height > size or width > size:
        raise ValueError(
            f"Images of {width}x{height} pixels do not fit into {size}x{size} by padding; "
            f'use fit="crop" to scale them, or size at least {max(height, width)}.'
        )
    left, top = (size - width) // 2, (size - height) // 2
    padding = (left, size - width - left, top, size - height - top)
    return torch.nn.functional.pad(pixels, padding, value=background)
