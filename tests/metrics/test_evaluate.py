"""`ebbflow evaluate` on files of every kind, and on a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ebbflow import data, images, schedules
from ebbflow.cli import main
from ebbflow.denoiser import Denoiser
from ebbflow.networks import UNet

TEST_IMAGES = Path(__file__).parents[1] / "data_files" / "fashion_mnist_test_200.npz"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["evaluate", *map(str, arguments), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments), "--device", "cpu"]) == 2
    return capsys.readouterr().err


@pytest.fixture
def floats() -> torch.Tensor:
    return data.read(TEST_IMAGES, size=32, fit="pad").floats()


def test_a_table_names_the_counts_and_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(TEST_IMAGES)]) == 0
    table = " ".join(capsys.readouterr().out.split())
    for words in ("200 pictures", "10,000 Fashion-MNIST", "200 held-out real", "Fréchet", "recall"):
        assert words in table


def test_every_kind_of_file_gives_the_same_figures(
    tmp_path: Path, floats: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = data.read(TEST_IMAGES).labels
    assert labels is not None
    images.write_singles(floats, tmp_path / "folder")
    rows = [f"{i:06d}.png,{label}" for i, label in enumerate(labels.tolist())]
    (tmp_path / "folder" / "labels.csv").write_text("\n".join(["file,label", *rows]))
    np.save(tmp_path / "images.npy", floats.numpy())
    np.savez(tmp_path / "images.npz", samples=floats.permute(0, 2, 3, 1), labels=labels)
    expected = evaluate(capsys, TEST_IMAGES)
    assert expected["class_agreement"] > 0.85
    for name in ("folder", "images.npz"):
        found = evaluate(capsys, tmp_path / name)
        assert {**found, "samples": ""} == {**expected, "samples": ""}
    found = evaluate(capsys, tmp_path / "images.npy", "--count", 150)
    assert found["figures"]["count"] == 150
    assert found["class_agreement"] is None


def test_another_reference(
    tmp_path: Path, floats: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "same.npy", floats.numpy())
    found = evaluate(capsys, TEST_IMAGES, "--reference", tmp_path / "same.npy")
    assert found["figures"]["frechet"] < 1e-6
    assert found["figures"]["precision"] == found["figures"]["recall"] == 1
    assert found["held_out_real"] is None
    assert found["reference"] == f"200 pictures of {tmp_path / 'same.npy'}"


def test_a_model_is_drawn_and_asked_for_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = UNet(channels=1, width=8, blocks=1, attention=(), classes=10)
    denoiser = Denoiser(net, schedules.Cosine(), "edm", shape=(1, 32, 32), sigma_data=0.5)
    denoiser.save(tmp_path / "model")
    model = tmp_path / "model"
    found = evaluate(capsys, "--model", model, "--count", 20, "--steps", 1, "--allow-few")
    assert found["figures"]["count"] == 20
    assert found["class_agreement"] <= 0.5
    assert found["figures"]["frechet"] > 5


def test_too_few_pictures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, TEST_IMAGES, "--count", 100)
    assert "100 samples are fewer than the 128 features" in message and "--allow-few" in message
    assert "at least 1, got 0" in refusal(capsys, TEST_IMAGES, "--count", 0)


def test_wrong_ranges_and_types_are_refused(
    tmp_path: Path, floats: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.npy"
    for values, message in (
        ((floats + 1) * 127.5, "[0, 255], expected [-1, 1]"),
        ((floats + 1) / 2, "rescale with 2 * x - 1"),
        (floats.repeat(1, 1, 2, 2), "64x64 pixels do not fit into 32x32"),
        (floats.long(), "int64"),
    ):
        np.save(path, values.numpy())
        assert message in refusal(capsys, path)
    path.write_bytes(b"no array")
    assert "wrong.npy" in refusal(capsys, path)
    assert "does not exist" in refusal(capsys, tmp_path / "nothing.npz")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refusal(capsys, tmp_path / "empty")


def test_files_or_a_model_but_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not both" in refusal(capsys)
    assert "not both" in refusal(capsys, TEST_IMAGES, "--model", "fashion-mnist")
