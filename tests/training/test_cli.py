from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebbflow.cli import main
from ebbflow.storage import load


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (30, 6, 6), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(30) % 2)
    return path


def words(data: Path, out: Path, *more: str) -> list[str]:
    small = "--size 8 --fit pad --width 8 --multipliers 1 --blocks 1 --attention --validation 6"
    length = "--images 40 --batch 8 --checkpoint-every 2 --device cpu"
    return ["train", str(data), "--out", str(out), *small.split(), *length.split(), *more]


def test_train_stop_resume_and_export(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, model = tmp_path / "run", tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["/somewhere/ebbflow", *words(data, out)])
    assert main(words(data, out, "--time-limit", "0")) == 130
    assert "step 1 of 5; the same command goes on" in capsys.readouterr().out
    assert main(words(data, out, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "step": 5, "steps": 5}
    assert main(words(data, out, "--export", str(model))) == 0
    denoiser: Any = load(model)
    assert denoiser.shape == (1, 8, 8)
    assert denoiser.net.config["classes"] == 2
    assert denoiser.statistics is not None and set(denoiser.statistics.classes) == {0, 1}
    x = torch.randn(3, 1, 8, 8)
    assert denoiser(x, 0.5, label=torch.tensor([0, 1, 2])).shape == x.shape
    details = json.loads((model / "config.json").read_text())["details"]
    assert details["class_names"] == ["0", "1"]
    assert "--fit pad" in details["training_command"]


def test_sigma_data_is_the_root_mean_square_about_zero(data: Path, tmp_path: Path) -> None:
    assert main(words(data, tmp_path / "run", "--images", "8")) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    pixels = np.full((24, 8, 8), -1.0)
    pixels[:, 1:7, 1:7] = np.load(data)["images"][:24] / 127.5 - 1
    assert config["sigma_data"] == pytest.approx(np.sqrt((pixels**2).mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", "0"], "batch"),
        (["--validation", "30"], "held_out is 30"),
        (["--multipliers", "1", "1", "1", "1", "1"], "multiple of 16"),
        (["--size", "4"], "do not fit into 4x4"),
        (["--attention", "5"], "attention at [5]"),
        (["--images-key", "pictures"], "no array 'pictures'; it holds images, labels"),
        (["--labels-key", "names"], "no array 'names'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_one_line_and_leave_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(words(data, tmp_path / "run", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_another_option_on_resume_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, tmp_path / "run")) == 0
    assert main(words(data, tmp_path / "run", "--clip", "2")) == 2
    assert "training.clip = 1.0, now it is 2.0" in " ".join(capsys.readouterr().err.split())


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path / "none.npz", tmp_path / "run")) == 2
    assert "none.npz does not exist" in " ".join(capsys.readouterr().err.split())


def test_exporting_a_folder_that_is_no_run_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, tmp_path / "none", "--export", str(tmp_path / "model"))) == 2
    assert "none/model" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "model").exists()
