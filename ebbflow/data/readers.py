"""Pictures from files: one function, `read`, for every kind."""

from __future__ import annotations

import gzip
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ebbflow.data.images import Fit, Images, fit_to, from_array

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image as Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PAIRS = (
    ("train_images", "train_labels"),
    ("images", "labels"),
    ("x_train", "y_train"),
    ("x", "y"),
    ("arr_0", "arr_1"),
)
"""Names under which .npz files keep their images and labels, tried in this order."""

logger = logging.getLogger("ebbflow")


def read(
    path: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    background: int = 0,
    images_key: str | None = None,
    labels_key: str | None = None,
    labels: str | Path | None = None,
    unreadable: Literal["raise", "skip"] = "raise",
) -> Images:
    """Read a folder of pictures (sub-folders are classes), a .npz, a .npy or an IDX file.

    Args:
        path: folder or file; IDX files may be compressed with gzip.
        size: side in pixels; None keeps a size that all pictures share.
        channels: 1 for grey, 3 for colour; None keeps that of an array, and means 3 for a folder.
        fit: "crop" scales the largest centred square, "pad" keeps pixels and adds background.
        background: 0 to 255; what padding and transparent pixels become.
        images_key: name of the images in a .npz file; by default one of the usual names.
        labels_key: name of the labels in a .npz file.
        labels: .npy or IDX file of labels; for IDX files by default the usual neighbour.
        unreadable: "skip" leaves out pictures that cannot be read and logs how many.
    """
    path = Path(path)
    shape: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "fit": fit,
        "background": background,
    }
    if not 0 <= background <= 255:
        raise ValueError(f"background is {background}; give 0 (black) to 255 (white).")
    if path.is_dir():
        return _folder(path, size, channels or 3, fit, background, unreadable == "skip")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder, .npz, .npy or IDX file.")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        images, found = _npz(path, images_key, labels_key)
    elif suffix == ".npy":
        images, found = _load(path), None
    else:
        images = _idx(path)
        beside = Path(str(path).replace("images", "labels").replace("idx3", "idx1"))
        found = _idx(beside) if labels is None and beside != path and beside.exists() else None
    if labels is not None:
        labels = Path(labels)
        found = _load(labels) if labels.suffix.lower() == ".npy" else _idx(labels)
    try:
        return from_array(images, found, **shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as NumPy arrays without unpickling ({error}); "
            "save plain numeric arrays with numpy.save or numpy.savez."
        ) from error


def _npz(
    path: Path, images_key: str | None, labels_key: str | None
) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    import zipfile

    try:
        with _load(path) as archive:
            names = archive.files
            if images_key is None:
                pairs = (pair for pair in PAIRS if pair[0] in names)
                images_key, usual = next(pairs, (names[0] if len(names) == 1 else None, None))
                labels_key = labels_key or (usual if usual in names else None)
            for key in (images_key, labels_key):
                if key not in names and (key is not None or images_key is None):
                    raise ValueError(
                        f"{path} has no array {key!r}; it holds {', '.join(names)}. "
                        "Name the right one with images_key and labels_key."
                    )
            try:
                return archive[images_key], archive[labels_key] if labels_key else None
            except ValueError as error:
                raise ValueError(f"{path}: {error}; save plain numeric arrays.") from error
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}).") from error


def _idx(path: Path) -> numpy.ndarray:
    """Read an IDX file: two zero bytes, type 8 (uint8), the number of axes, their lengths, data."""
    import numpy as np

    raw = path.read_bytes()
    try:
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}).") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} is no IDX file of bytes (it begins with {content[:4].hex() or 'nothing'}, "
            "expected 000008..); known kinds: a folder of pictures, .npz, .npy, IDX."
        )
    axes = content[3]
    start = 4 + 4 * axes
    shape = tuple(np.frombuffer(content, ">u4", count=min(axes, (len(content) - 4) // 4), offset=4))
    if len(shape) < axes or len(content) != start + math.prod(map(int, shape)):
        raise ValueError(
            f"{path} is damaged or incomplete: {len(content)} bytes for the shape {shape}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _folder(
    folder: Path, size: int | None, channels: int, fit: Fit, background: int, skip: bool
) -> Images:
    import numpy as np

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(
            f"{folder} holds no pictures; expected files that end in {' '.join(SUFFIXES)}, "
            "directly or in one sub-folder a class."
        )
    pictures, kept, skipped = [], [], 0
    for file in files:
        try:
            pixels = from_array(_open(file, channels, background)[None]).pixels
        except (OSError, ValueError, SyntaxError) as error:
            if not skip:
                raise ValueError(
                    f"{file} cannot be read as a picture ({error}); repair or remove it, or leave "
                    'out such files with unreadable="skip".'
                ) from error
            logger.warning("left out %s: %s", file, error)
            skipped += 1
            continue
        pixels = fit_to(pixels, size, fit, background)
        if pictures and pixels.shape != pictures[0].shape:
            raise ValueError(
                f"{file} has {pixels.shape[3]}x{pixels.shape[2]} pixels and {kept[0]} "
                f"{pictures[0].shape[3]}x{pictures[0].shape[2]}; give a size for all."
            )
        pictures.append(pixels)
        kept.append(file)
    if skipped:
        logger.warning("left out %d of %d files in %s", skipped, len(files), folder)
    if not pictures:
        raise ValueError(f"{folder}: none of its {len(files)} pictures can be read.")
    pixels = np.concatenate([picture.numpy() for picture in pictures])
    parts = [file.relative_to(folder).parts for file in kept]
    if any(len(part) < 2 for part in parts):
        return from_array(pixels)
    names = tuple(sorted({part[0] for part in parts}))
    number = {name: index for index, name in enumerate(names)}
    return from_array(pixels, [number[part[0]] for part in parts], class_names=names)


def _open(file: Path, channels: int, background: int) -> numpy.ndarray:
    """Return one picture as uint8 (H, W, C), whatever its mode is on disk."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.load()
        picture: Picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values run from {values.min()} to {values.max()}, not 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("it holds floats, whose range is not known; save it as 8 or 16 bits")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (background, background, background, 255))
        picture = Image.alpha_composite(ground, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    return np.asarray(picture).reshape(picture.height, picture.width, channels)
