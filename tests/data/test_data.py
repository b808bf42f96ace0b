from __future__ import annotations

import gzip
import io
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ebbflow.data import Images, from_array, read, to_float


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.png", "a/0.png", "a/deep/1.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        value = int(path.stem)
        Image.new("RGB", (4, 4), (value, 10 * value, 100)).save(path)
    return tmp_path / "pictures"


def test_the_range_is_exact_at_both_ends_and_symmetric() -> None:
    levels = to_float(torch.arange(256, dtype=torch.uint8))
    assert levels[0] == -1 and levels[255] == 1
    assert torch.allclose(levels, -levels.flip(0), atol=1e-7)
    back = ((levels + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, torch.arange(256, dtype=torch.uint8))


def test_sub_folders_are_classes_in_order(folder: Path) -> None:
    images = read(folder)
    assert images.shape == (3, 4, 4)
    assert images.class_names == ("a", "b") and images.classes == 2
    assert images.labels is not None and images.labels.tolist() == [0, 0, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert images.pixels[2, :, 3, 3].tolist() == [2, 20, 100]


def test_a_flat_folder_has_no_classes(folder: Path) -> None:
    images = read(folder / "b")
    assert images.labels is None and images.classes == 0 and len(images) == 1


def test_root_mean_square_is_that_of_the_floats() -> None:
    images = from_array(pixels(7, 5, 5))
    expected = float(images.floats().double().square().mean()) ** 0.5
    assert images.root_mean_square() == pytest.approx(expected, rel=1e-6)


MODES: dict[str, Any] = {
    "L": (lambda: Image.new("L", (2, 2), 51), (51, 51, 51)),
    "1": (lambda: Image.new("1", (2, 2), 1), (255, 255, 255)),
    "RGB": (lambda: Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)),
    # Half transparent red over background 100.
    "RGBA": (lambda: Image.new("RGBA", (2, 2), (200, 0, 0, 128)), (150, 50, 50)),
    "LA": (lambda: Image.new("LA", (2, 2), (200, 0)), (100, 100, 100)),
    "I;16": (lambda: Image.fromarray(np.full((2, 2), 51 * 256 + 7, np.uint16)), (51, 51, 51)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_asked_channels(tmp_path: Path, mode: str, channels: int) -> None:
    make, colour = MODES[mode]
    make().save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as saved:
        assert saved.mode == mode
    images = read(tmp_path, channels=channels, background=100)
    assert images.shape == (channels, 2, 2)
    red, green, blue = colour
    grey = (round(0.299 * red + 0.587 * green + 0.114 * blue),)
    expected = torch.tensor(colour if channels == 3 else grey)
    assert (images.pixels[0, :, 0, 0].int() - expected).abs().max() <= 1


def test_palettes_and_orientation_are_applied(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "a.png")
    turned = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "b.png", exif=exif)
    images = read(tmp_path)
    assert images.pixels[0, :, 0, 1].tolist() == [40, 50, 60]
    assert images.pixels[1, 0].tolist() == [[240, 160], [80, 0]]


def test_an_empty_folder_and_a_missing_path_are_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"holds no pictures; expected files that end in \.png"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"cut"], ids=["empty", "text", "cut"])
def test_an_unreadable_picture_is_named_or_skipped_and_counted(
    folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if content == b"cut":
        buffer = io.BytesIO()
        Image.fromarray(pixels(40, 40, 3)).save(buffer, format="PNG")
        content = buffer.getvalue()[:600]
    (folder / "a" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a/bad\.png cannot be read.*unreadable=\"skip\""):
        read(folder)
    with caplog.at_level(logging.WARNING, "ebbflow"):
        assert len(read(folder, unreadable="skip")) == 3
    assert "left out 1 of 4 files" in caplog.text
    for path in folder.rglob("*.png"):
        path.write_bytes(content)
    with pytest.raises(ValueError, match="none of its 4 pictures can be read"):
        read(folder, unreadable="skip")


def test_floats_and_values_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif.*floats"):
        read(tmp_path)
    (tmp_path / "f.tif").unlink()
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(ValueError, match=r"i\.tif.*70000"):
        read(tmp_path)


def test_tiny_and_odd_pictures_get_the_asked_size(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (5, 6, 7)).save(tmp_path / "tiny.png")
    Image.new("RGB", (300, 20), (5, 6, 7)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has 300x20 pixels.*give a size"):
        read(tmp_path)
    images = read(tmp_path, size=8)
    assert torch.equal(images.pixels, torch.tensor([5, 6, 7]).view(1, 3, 1, 1).expand(2, 3, 8, 8))


def test_crop_takes_the_centred_square_and_is_antialiased() -> None:
    wide = np.zeros((1, 8, 24), np.uint8)
    wide[:, :, 8:16] = 200
    assert (from_array(wide, size=8).pixels == 200).all()
    stripes = np.zeros((1, 64, 64), np.uint8)
    stripes[:, :, ::2] = 255
    small = from_array(stripes, size=8).pixels[..., 1:-1]
    assert ((small.int() - 127).abs() <= 12).all(), "stripes must blur to grey, not alias"


def test_pad_centres_and_keeps_every_pixel() -> None:
    array = pixels(2, 28, 28)
    images = from_array(array, size=32, fit="pad", background=9)
    assert np.array_equal(images.pixels[:, 0, 2:30, 2:30].numpy(), array)
    frame = images.pixels.clone()
    frame[:, :, 2:30, 2:30] = 9
    assert (frame == 9).all()
    with pytest.raises(ValueError, match="28x28 pixels do not fit into 20x20"):
        from_array(array, size=20, fit="pad")


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 1, 6, 7)])
def test_layouts_of_grey_arrays_agree(shape: tuple[int, ...]) -> None:
    array = pixels(5, 6, 7)
    assert np.array_equal(from_array(array.reshape(shape)).pixels[:, 0].numpy(), array)


def test_layouts_of_colour_arrays_agree_and_turn_grey() -> None:
    array = pixels(5, 6, 7, 3)
    images = from_array(array)
    assert torch.equal(images.pixels, from_array(array.transpose(0, 3, 1, 2)).pixels)
    grey = from_array(array, channels=1).pixels[0, 0].numpy()
    assert np.abs(grey.astype(int) - np.asarray(Image.fromarray(array[0]).convert("L"))).max() <= 1
    assert torch.equal(from_array(array[..., 0], channels=3).pixels[:, 2], images.pixels[:, 0])


@pytest.mark.parametrize(
    ("array", "labels", "message"),
    [
        (np.zeros((2, 4, 4)), None, "float64"),
        (np.zeros((2, 4, 4, 2), np.uint8), None, r"\(2, 4, 4, 2\)"),
        (np.zeros((4,), np.uint8), None, r"\(4,\)"),
        (np.zeros((0, 4, 4), np.uint8), None, "no images"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1, 2], r"\(3,\)"),
        (np.zeros((2, 4, 4), np.uint8), [0.5, 1.0], "float64"),
        (np.zeros((2, 4, 4), np.uint8), [-1, 0], "from -1 to 0"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_array(array, labels)


def test_sixteen_bit_arrays_keep_their_high_byte() -> None:
    array = pixels(2, 3, 3)
    assert torch.equal(
        from_array(array.astype(np.uint16) * 256 + 9).pixels, from_array(array).pixels
    )


@pytest.mark.parametrize("names", [("train_images", "train_labels"), ("images", "labels")])
def test_npz_with_usual_names(tmp_path: Path, names: tuple[str, str]) -> None:
    array, labels = pixels(3, 4, 4), np.array([2, 0, 1], np.uint8)
    np.savez(tmp_path / "x.npz", **{names[0]: array, names[1]: labels, "test_images": array[:1]})
    images = read(tmp_path / "x.npz")
    assert np.array_equal(images.pixels[:, 0].numpy(), array)
    assert images.labels is not None and images.labels.tolist() == [2, 0, 1]
    assert images.class_names == ("0", "1", "2")


def test_npz_with_named_keys_and_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, pictures=pixels(3, 4, 4), kinds=np.arange(3), more=pixels(2, 2, 2))
    images = read(path, images_key="pictures", labels_key="kinds")
    assert images.classes == 3
    with pytest.raises(ValueError, match="it holds pictures, kinds, more"):
        read(path)
    with pytest.raises(ValueError, match="no array 'kind'"):
        read(path, images_key="pictures", labels_key="kind")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"x\.npz"):
        read(path, images_key="pictures")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickled_arrays_are_never_loaded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    array = np.array([{"a": 1}], dtype=object)
    if suffix == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, images=array)
    with pytest.raises(ValueError, match=rf"x\.{suffix}"):
        read(path)


def test_npy_with_a_file_of_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(3, 4, 4))
    np.save(tmp_path / "y.npy", np.array([0, 1, 1]))
    images = read(tmp_path / "x.npy", labels=tmp_path / "y.npy")
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_find_their_labels(tmp_path: Path, compress: bool) -> None:
    array, labels = pixels(3, 5, 4), np.array([1, 0, 1], np.uint8)
    suffix = ".gz" if compress else ""
    for name, content in (("images-idx3", array), ("labels-idx1", labels)):
        data = gzip.compress(idx(content)) if compress else idx(content)
        (tmp_path / f"train-{name}-ubyte{suffix}").write_bytes(data)
    images = read(tmp_path / f"train-images-idx3-ubyte{suffix}")
    assert np.array_equal(images.pixels[:, 0].numpy(), array)
    assert images.labels is not None and images.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00",
        b"\x00\x00\x0d\x01" + bytes(8),
        idx(pixels(3, 4, 4))[:-1],
        idx(pixels(3, 4, 4)) + b"x",
        b"\x00\x00\x08\x03\x00\x00",
        gzip.compress(idx(pixels(3, 4, 4)))[:-12],
    ],
    ids=["empty", "short", "floats", "cut", "longer", "header", "gzip"],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match="images"):
        read(tmp_path / "images")


def test_split_holds_out_the_last() -> None:
    images = from_array(pixels(10, 2, 2), np.arange(10) % 3)
    train, held_out = images.split(4)
    assert held_out is not None and held_out.labels is not None
    assert torch.equal(train.pixels, images.pixels[:6])
    assert torch.equal(held_out.pixels, images.pixels[6:])
    assert held_out.labels.tolist() == [0, 1, 2, 0]
    assert images.split(0) == (images, None)
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=f"held_out is {bad}"):
            images.split(bad)


def test_the_fingerprint_knows_pixels_labels_and_shape() -> None:
    base = from_array(pixels(4, 2, 6), [0, 1, 0, 1])
    others = [
        from_array(pixels(4, 2, 6, seed=1), [0, 1, 0, 1]),
        from_array(pixels(4, 2, 6), [0, 1, 1, 1]),
        from_array(pixels(4, 2, 6)),
        from_array(pixels(4, 2, 6).reshape(4, 6, 2), [0, 1, 0, 1]),
        from_array(pixels(4, 2, 6), [0, 1, 0, 1], class_names=("x", "y")),
    ]
    prints = {images.fingerprint() for images in [base, *others]}
    assert len(prints) == 6
    assert base.fingerprint() == from_array(pixels(4, 2, 6), [0, 1, 0, 1]).fingerprint()


def test_a_bad_background_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="background is 256"):
        read(folder, background=256)


def test_images_refuse_other_dtypes() -> None:
    with pytest.raises(ValueError, match="float32"):
        Images(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="without labels"):
        Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, ("a",))
