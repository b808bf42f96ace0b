"""Pictures: levels, layout, and files that are complete or absent."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebbflow import images
from ebbflow.files import replacing, write_text


def test_levels_are_exact_and_clipped() -> None:
    levels = torch.arange(256).float()
    pixels = images.to_uint8((levels / 127.5 - 1).reshape(1, 1, 16, 16))
    assert pixels.flatten().tolist() == list(range(256))
    assert images.to_uint8(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [
        0,
        255,
    ]


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 2, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 or 3"):
        images.to_uint8(torch.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_of_a_grid_is_at_its_place(channels: int) -> None:
    batch = torch.rand(5, channels, 3, 4) * 2 - 1
    sheet = images.grid(batch, columns=2, scale=3, gap=1)
    assert sheet.shape == ((3 * 4 - 1) * 3, (2 * 5 - 1) * 3, channels)
    small = sheet[::3, ::3]
    assert (sheet == small.repeat(3, 0).repeat(3, 1)).all()
    covered = np.zeros(small.shape[:2], dtype=bool)
    for index, pixels in enumerate(images.to_uint8(batch).numpy()):
        row, column = divmod(index, 2)
        place = slice(row * 4, row * 4 + 3), slice(column * 5, column * 5 + 4)
        assert (small[place] == pixels).all()
        covered[place] = True
    assert (small[~covered] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_single_images_read_back(channels: int, tmp_path: Path) -> None:
    batch = torch.rand(2, channels, 5, 6) * 2 - 1
    images.write_singles(batch, tmp_path / "new", first_index=337)
    paths = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in paths] == ["000337.png", "000338.png"]
    for path, pixels in zip(paths, images.to_uint8(batch).numpy(), strict=True):
        with Image.open(path) as picture:
            assert (np.array(picture).reshape(pixels.shape) == pixels).all()


def test_density_shows_where_the_points_are() -> None:
    # Three quarters of the points up right, one quarter down left: dark and a little less dark.
    points = torch.tensor([[1.0, 1.0]] * 3 + [[-1.0, -1.0]])
    sheet = images.density(points, bins=4, scale=1)[:, :, 0]
    assert sheet[0, 3] == 0
    assert sheet[3, 0] == round(255 * (1 - (1 / 3) ** 0.5))
    assert (sheet == 255).sum() == 14


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 bytes: a write fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    write_text(path, "what was there")
    with pytest.raises(OSError), full_disk():
        images.write_grid(torch.rand(4, 3, 16, 16), path)
    assert path.read_text() == "what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
