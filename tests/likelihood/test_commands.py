"""`ebbflow evaluate --likelihood` and `--diagnose` on oracles of pictures and on bad options."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ebbflow as ef
from ebbflow.cli import _diagnose, _likelihood, main

DEVIATION = 0.2


def pictures(count: int) -> tuple[ef.Denoiser, torch.Tensor]:
    """A Gaussian of 2 x 2 pixels, independent, and pixels of it."""
    flat = ef.oracles.GaussianMixture(
        torch.zeros(1, 4), torch.tensor([DEVIATION**2]), torch.ones(1)
    )
    exact = flat.denoiser(ef.schedules.Cosine())
    denoiser = ef.Denoiser(
        lambda x, t: exact(x.flatten(1).double(), t).reshape(x.shape).to(x.dtype),
        ef.schedules.Cosine(),
        shape=(1, 2, 2),
    )
    values = flat.sample(count, 0).reshape(count, 1, 2, 2)
    return denoiser, ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_bits_of_a_gaussian_are_its_entropy() -> None:
    denoiser, pixels = pictures(400)
    report = _likelihood.measure(
        denoiser, pixels, probes=2, rtol=1e-4, seed=0, batch=200, device=torch.device("cpu")
    )
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DEVIATION**2) - math.log2(2 / 255)
    # The bound's own draws, 32 in 4 dimensions, scatter more than the pictures do.
    for name, error in (("bits_per_dimension", 0.05), ("bound_bits_per_dimension", 0.12)):
        found = report[name]
        assert abs(found["mean"] - entropy) < 4 * found["standard_error"]
        assert found["standard_error"] < error
    assert report["coarse_bits_per_dimension"]["mean"] > entropy
    _likelihood.show(report, "a title")


def test_a_model_in_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy = pytest.importorskip("numpy")
    file = tmp_path / "images.npz"
    numpy.savez(file, images=numpy.zeros((2, 28, 28), dtype=numpy.uint8))
    arguments = ["--model", "fashion-mnist", "--likelihood", "--count", "1", "--rtol", "0.01"]
    command = ["evaluate", str(file), *arguments, "--probes", "2", "--json", "--device", "cpu"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dimensions"] == 1024
    # A black picture is one of the likeliest.
    assert report["bits_per_dimension"]["mean"] < 2
    assert report["bound_bits_per_dimension"]["mean"] > report["bits_per_dimension"]["mean"] - 0.5


def test_a_diagnosis_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    denoiser, pixels = pictures(24)
    report = _diagnose.measure(denoiser, pixels, 0, torch.device("cpu"))
    _diagnose.show(report, "a title")
    shown = capsys.readouterr().out
    assert f"{report.times[0]:.3f}" in shown
    assert f"{report.best_end:.3f}" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--likelihood", "--model", "fashion-mnist"],
        ["pictures", "--diagnose"],
        ["pictures", "--model", "fashion-mnist", "--diagnose", "--likelihood"],
        ["pictures", "--model", "oracle", "--likelihood"],
    ],
)
def test_what_is_missing_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert "error:" in capsys.readouterr().err
