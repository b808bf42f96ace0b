from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ebbflow.training import checkpoint


def write(folder: Path, step: int, keep: int = 5) -> None:
    checkpoint.save(folder, step, {"w": torch.full((1000,), float(step))}, {"a": 1}, keep)


def test_the_newest_is_read_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    for step in (5, 10, 100):
        write(tmp_path, step, keep=2)
    found = checkpoint.load(tmp_path)
    assert found is not None
    record, tensors = found
    assert record["step"] == 100
    assert record["identity"] == {"a": 1}
    assert torch.equal(tensors["w"], torch.full((1000,), 100.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-{step:08d}.{kind}" for step in (10, 100) for kind in ("json", "safetensors")
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["safetensors", "json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, damage: Any
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    damage(tmp_path / f"step-00000002.{kind}")
    with caplog.at_level(logging.WARNING, "ebbflow"):
        found = checkpoint.load(tmp_path)
    assert found is not None
    # One flipped bit in the record may leave it readable; what it guards must then be whole.
    assert found[1]["w"][0] == found[0]["step"]
    if kind == "safetensors":
        assert found[0]["step"] == 1
        assert "step-00000002" in caplog.text


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write(tmp_path, 1, keep=1)
    calls = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        # A file and its folder are synchronised in turn: the tensors', then the record's.
        if len(calls) == 2 * failing - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*intact") as caught:
        write(tmp_path, 2, keep=1)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[0]["step"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_a_difference_is_named_with_both_values(tmp_path: Path) -> None:
    checkpoint.require_same({"a": {"b": 1}}, {"a": {"b": 1}}, tmp_path)
    with pytest.raises(ValueError, match=r"a\.b = 1, now it is 2"):
        checkpoint.require_same({"a": {"b": 1}}, {"a": {"b": 2}}, tmp_path)
    with pytest.raises(ValueError, match="c = None, now it is 3"):
        checkpoint.require_same({}, {"c": 3}, tmp_path)
