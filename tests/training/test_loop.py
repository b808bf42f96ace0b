from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebbflow.cli import main
from ebbflow.data import Images
from ebbflow.denoiser import Denoiser
from ebbflow.networks import MLP
from ebbflow.schedules import Cosine, Linear
from ebbflow.storage import load
from ebbflow.training import Config, export, train
from ebbflow.training import checkpoint as checkpoints

Run = Callable[..., dict[str, Tensor]]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def final(folder: Path) -> bytes:
    """The whole final state: weights, moments and averages."""
    return checkpoints.records(folder / "checkpoints")[-1].with_suffix(".safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_crash_at_any_write_resumes_to_the_same_bits(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"images": 48}
    whole = run(tmp_path / "whole", options)
    replaced = os.replace
    crashes = 0
    for place in range(0, 100, 2):
        folder = tmp_path / f"crash{place}"
        count = 0

        def replace_or_crash(source: Any, target: Any, place: int = place) -> None:
            nonlocal count
            count += 1
            if count == place + 1:
                raise KeyboardInterrupt
            replaced(source, target)

        monkeypatch.setattr(os, "replace", replace_or_crash)
        try:
            run(folder, options)
        except KeyboardInterrupt:
            crashes += 1
            monkeypatch.setattr(os, "replace", replaced)
            assert same(run(folder, options), whole)
        monkeypatch.setattr(os, "replace", replaced)
        assert final(folder) == final(tmp_path / "whole")
        steps = [entry["step"] for entry in log(folder)]
        assert steps == sorted(set(steps))
        if count <= place:
            break
    assert crashes >= 5


def test_stop_and_resume_and_a_later_end(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) in (1, 5)

    folder = tmp_path / "parts"
    run(folder, stop=stop)
    run(folder, {"images": 56, "log_every": 1, "checkpoint_every": 4}, stop=stop)
    assert not same(run(folder, {"images": 56}), whole)
    assert same(run(folder), whole)
    assert same(run(folder), whole), "a finished run starts again"
    assert final(folder) == final(tmp_path / "whole")


def test_other_options_data_or_networks_are_refused_on_resume(
    run: Run, tmp_path: Path, images: Images, config: Config
) -> None:
    run(tmp_path, {"images": 8})
    with pytest.raises(ValueError, match=r"training.learning_rate = 0.001, now it is 0.002"):
        run(tmp_path, {"learning_rate": 0.002})
    with pytest.raises(ValueError, match="data = "):
        run(tmp_path, images=replace(images, pixels=255 - images.pixels))
    net = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match=r"network\.\w+ = .*, now it is None"):
        run(tmp_path, denoiser=Denoiser(net, Cosine(), "edm", sigma_data=0.6, time="angle"))


def test_parts_of_a_batch_add_up_to_the_batch(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "1", {"images": 40})
    parts = run(tmp_path / "4", {"images": 40, "accumulate": 4})
    for name, weight in whole.items():
        assert torch.allclose(weight, parts[name], atol=2e-5), name
    rates = [[e["learning_rate"] for e in log(tmp_path / folder)] for folder in ("1", "4")]
    assert rates[0] == rates[1]


class Failing(nn.Module):
    """Returns NaN from one call on."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.left = call

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        self.left -= 1
        return x * self.weight * (1.0 if self.left > 0 else torch.nan)


def test_nan_stops_with_the_step_and_saves_nothing(run: Run, tmp_path: Path) -> None:
    denoiser = Denoiser(Failing(5), Linear())
    with pytest.raises(FloatingPointError, match=r"Step 5: loss nan.*learning rate"):
        run(tmp_path, {"log_every": 100}, denoiser=denoiser)
    found = checkpoints.load(tmp_path / "checkpoints")
    assert found is not None
    assert found[0]["step"] == 3


def test_the_loss_falls_towards_the_gaussian_optimum(tmp_path: Path) -> None:
    """One pixel with a normal value: the posterior mean is a known multiple of what is seen."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP(1, width=32, blocks=1)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.inner(x.flatten(1), time).view_as(x)

    torch.manual_seed(0)
    pixels = (127.5 + 40 * torch.randn(4000, 1, 1, 1)).round().clamp(0, 255).to(torch.uint8)
    images = Images(pixels)
    deviation = float(images.floats().std())
    denoiser = Denoiser(Flat(), Linear(), "x0", time="angle")
    config = Config(
        images=40_000,
        batch=200,
        learning_rate=3e-3,
        warmup=10,
        noise_mean=-1.0,
        noise_std=0.5,
        checkpoint_every=200,
        validate_every=200,
        log_every=200,
        decay="cosine",
    )
    train(denoiser, images, config, tmp_path, held_out=images, device="cpu")
    t = torch.tensor([0.1, 0.25, 0.4], dtype=torch.float64)
    for at in t:
        x = torch.linspace(-0.35, 0.35, 11).view(-1, 1, 1, 1)
        alpha, sigma = float(Linear().alpha(at)), float(Linear().sigma(at))
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        assert (denoiser(x, at) - gain * x).abs().max() < 0.06
    (validation,) = [e["validation_loss"] for e in log(tmp_path) if "validation_loss" in e]
    level = torch.exp(torch.distributions.Normal(-1.0, 0.5).sample((20_000,)))
    optimum = (deviation * level) ** 2 / (deviation**2 + level**2)
    assert validation == pytest.approx(float(optimum.mean()), rel=0.08)


def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, images: Images, config: Config, denoiser: Denoiser
) -> None:
    two = replace(images, labels=images.labels.clamp(max=1), class_names=("a", "b"))  # pyright: ignore
    with pytest.raises(ValueError, match="3 classes; the images have 2"):
        train(denoiser, two, config, tmp_path, device="cpu")
    large = Images(torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 8, 8\); the images are \(1, 16, 16\)"):
        train(denoiser, large, config, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="buffers"):
        train(Denoiser(nn.BatchNorm2d(1), Linear()), images, config, tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


def test_fewer_images_than_a_batch_repeat_with_a_warning(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, images: Images
) -> None:
    few, _ = images.split(21)
    with caplog.at_level(logging.WARNING, "ebbflow"):
        run(tmp_path, {"images": 16}, images=few)
    assert "3 images for a batch of 8" in caplog.text


def test_looks_at_the_model_do_not_change_it(run: Run, tmp_path: Path, images: Images) -> None:
    train_part, held_out = images.split(6)
    plain = run(tmp_path / "plain", images=train_part)
    options = {"validate_every": 2, "sample_every": 5}
    looked = run(tmp_path / "looked", options, images=train_part, held_out=held_out)
    assert same(plain, looked)
    losses = [e for e in log(tmp_path / "looked") if "validation_loss" in e]
    assert [entry["step"] for entry in losses] == [2, 4, 6, 8, 10]
    grids = sorted(p.name for p in (tmp_path / "looked" / "samples").iterdir())
    assert grids == ["step-00000005.png", "step-00000010.png"]


def test_export_gives_the_average_at_half_precision(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "run", details={"class_names": ["x", "y", "z"]})
    export(tmp_path / "run", tmp_path / "model", sigma_rel=0.1, details={"licence": "none"})
    found = checkpoints.load(tmp_path / "run" / "checkpoints")
    assert found is not None
    model: Any = load(tmp_path / "model")
    for name, weight in model.net.state_dict().items():
        tracked = found[1][f"0.1/{name}"]
        assert torch.allclose(weight, tracked, rtol=1e-3, atol=1e-6), name
    details = json.loads((tmp_path / "model" / "config.json").read_text())["details"]
    assert details["class_names"] == ["x", "y", "z"]
    assert details["licence"] == "none"
    with pytest.raises(ValueError, match=r"no snapshot of step 4; it has \[3, 6, 9, 10\]"):
        export(tmp_path / "run", tmp_path / "model", step=4)


def test_bfloat16_trains_and_keeps_float32_weights(run: Run, tmp_path: Path) -> None:
    plain = run(tmp_path / "float32")
    half = run(tmp_path / "bfloat16", {"precision": "bfloat16"})
    assert all(weight.dtype == torch.float32 for weight in half.values())
    assert not same(plain, half)
    losses = [log(tmp_path / kind)[-1]["loss"] for kind in ("float32", "bfloat16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def command(data: Path, out: Path) -> list[str]:
    words = f"-m ebbflow train {data} --out {out} --size 8 --width 8 --multipliers 1 --blocks 1"
    words += " --attention --images 320 --batch 8 --checkpoint-every 5 --log-every 3 --device cpu"
    return [sys.executable, *words.split()]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.fixture
def data(tmp_path: Path, images: Images) -> Path:
    path = tmp_path / "data.npz"
    assert images.labels is not None
    np.savez(path, images=images.pixels[:, 0].numpy(), labels=images.labels.numpy())
    return path


def test_kill_9_and_the_same_command_again_ends_with_the_same_bits(
    tmp_path: Path, data: Path
) -> None:
    assert main(command(data, tmp_path / "whole")[3:]) == 0
    again = command(data, tmp_path / "killed")
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "killed" / "checkpoints" / "step-00000010.json", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(again, check=True, capture_output=True)
    names = ("checkpoints/step-00000040.safetensors", "averages/step-00000040.safetensors")
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, data: Path) -> None:
    subprocess.run(command(data, tmp_path / "one"), check=True, capture_output=True)
    python, *rest = command(data, tmp_path / "two")
    launch = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", *rest]
    subprocess.run(launch, check=True, capture_output=True)
    states = []
    for folder in ("one", "two"):
        found = checkpoints.load(tmp_path / folder / "checkpoints")
        assert found is not None and found[0]["step"] == 40
        states.append(found[1])
    for name, tensor in states[0].items():
        if name.startswith("net/"):
            assert torch.allclose(tensor, states[1][name], atol=1e-4), name
