"""Checkpoints that are whole or absent, and know which run they belong to.

A checkpoint is `step-00000500.safetensors`, all tensors, beside `step-00000500.json`, which is
written last and holds the step, the run's identity, versions and the SHA-256 of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ebbflow.files import replacing

logger = logging.getLogger("ebbflow")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that after a crash or power cut it is there completely or not at all.

    Raises OSError that says what to do when the disk refuses it.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written ({error.strerror or error}); earlier checkpoints are "
            "intact. Make room, then give the same command again to go on from the last one",
        ) from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file atomically and return its SHA-256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(plain)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], identity: dict[str, Any], keep: int
) -> None:
    """Write the checkpoint of `step`, then remove all but the last `keep`."""
    path = folder / f"step-{step:08d}"
    record = {
        "step": step,
        "identity": identity,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "sha256": write_tensors(path.with_suffix(".safetensors"), tensors),
    }
    write_bytes(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    for old in records(folder)[:-keep]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def records(folder: Path) -> list[Path]:
    """The JSON records of a folder's checkpoints, oldest first."""
    return sorted(folder.glob("step-*.json"))


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read the newest checkpoint that is whole, or None where none was written.

    A damaged one is left aside with a warning. Raises ValueError when all are damaged.
    """
    found = records(folder)
    for path in reversed(found):
        try:
            record = json.loads(path.read_bytes())
            content = path.with_suffix(".safetensors").read_bytes()
            if hashlib.sha256(content).hexdigest() == record["sha256"]:
                return record, safetensors.torch.load(content)
            reason = "its checksum differs"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        logger.warning("left aside the damaged checkpoint %s: %s", path.stem, reason)
    if found:
        raise ValueError(
            f"All {len(found)} checkpoints in {folder} are damaged; restore one, or remove the "
            "folder to start anew."
        )
    return None


def require_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise ValueError naming the first option in which a checkpoint differs from the run."""
    saved, now = _flat(saved), _flat(now)
    for name in sorted(saved.keys() | now.keys()):
        before, after = saved.get(name), now.get(name)
        if before != after:
            raise ValueError(
                f"The run in {path} was started with {name} = {before!r}, now it is {after!r}; "
                f"give {before!r} to resume it, or another folder to start anew."
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
