"""Where samples go: one grid, one file of arrays, or a folder that can be resumed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ebbflow import images
from ebbflow.cli._draw import Recipe, Shard
from ebbflow.files import replacing, write_text


class Output(Protocol):
    """Takes the chunks of one run in any order."""

    def has(self, chunk: range) -> bool:
        """Whether nothing of this chunk is missing."""
        ...

    def add(self, chunk: range, samples: Tensor) -> None:
        """Take the samples of a chunk."""
        ...

    def finish(self) -> None:
        """Write what is only written when everything is there."""
        ...


def choose(
    path: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    count: int,
    columns: int,
    shard: Shard,
) -> Output:
    """The output that `path` asks for by its suffix.

    Raises ValueError, before anything is computed, for one that cannot hold these samples.
    """
    suffix = path.suffix.lower()
    pictures = len(recipe.shape) == 3 and recipe.shape[0] in (1, 3)
    shape = "x".join(map(str, recipe.shape))
    if suffix in (".png", ".npz"):
        if shard.total > 1:
            raise ValueError(f"{path}: parts of a run go into a folder; give --out FOLDER")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give a file name, or another folder")
        if suffix == ".npz":
            return Arrays(path, recipe, pictures)
        if not pictures and recipe.shape != (2,):
            raise ValueError(f"samples of shape {shape} are no pictures; give --out NAME.npz")
        return Sheet(path, columns if pictures else None)
    if suffix and not path.is_dir():
        raise ValueError(f"--out {path}: a grid ends in .png, arrays in .npz, a folder in neither")
    if not pictures:
        raise ValueError(f"samples of shape {shape} are no pictures; give --out NAME.npz")
    if path.is_file():
        raise ValueError(f"{path} is a file; give the name of a folder, or NAME.png for one grid")
    return Folder(path, recipe, facts, count)


class Sheet:
    """All samples in one PNG: pictures side by side, or points of the plane as a density."""

    def __init__(self, path: Path, columns: int | None) -> None:
        self.path = path
        self.columns = columns
        self.parts: dict[int, Tensor] = {}

    def has(self, chunk: range) -> bool:
        return False

    def add(self, chunk: range, samples: Tensor) -> None:
        self.parts[chunk.start] = samples

    def finish(self) -> None:
        samples = torch.cat([self.parts[start] for start in sorted(self.parts)])
        if self.columns is None:
            images.write_png(images.density(samples), self.path)
        else:
            images.write_grid(samples, self.path, min(self.columns, len(samples)))


class Arrays:
    """One .npz: `images` (N, H, W, C) uint8, or `samples` float32, and `labels` if there are."""

    def __init__(self, path: Path, recipe: Recipe, pictures: bool) -> None:
        self.path = path
        self.recipe = recipe
        self.pictures = pictures
        self.parts: dict[int, Tensor] = {}
        self.count = 0

    def has(self, chunk: range) -> bool:
        return False

    def add(self, chunk: range, samples: Tensor) -> None:
        self.parts[chunk.start] = images.to_uint8(samples) if self.pictures else samples.float()
        self.count += len(chunk)

    def finish(self) -> None:
        import numpy as np

        samples = torch.cat([self.parts[start] for start in sorted(self.parts)]).numpy()
        arrays = {"images" if self.pictures else "samples": samples}
        if self.recipe.classes:
            arrays["labels"] = np.array(self.recipe.labels(range(self.count)), dtype=np.int64)
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


class Folder:
    """One PNG a sample, `labels.csv`, and `recipe.json`, which keeps two recipes apart.

    A file is complete or absent, so a chunk whose files are all there is done.
    """

    def __init__(self, path: Path, recipe: Recipe, facts: Mapping[str, Any], count: int) -> None:
        self.path = path
        self._claim({**facts, "weights": fingerprint(recipe)})
        self._label(recipe, count)

    def _claim(self, facts: Mapping[str, Any]) -> None:
        path = self.path / "recipe.json"
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            for key, value in facts.items():
                if there.get(key) != value:
                    raise ValueError(
                        f"{self.path} holds samples with {key} {there.get(key)!r}, not {value!r}: "
                        "give another --out, or the same options to resume"
                    )
        elif self.path.is_dir() and any(self.path.glob("*.png")):
            raise ValueError(f"{self.path} holds other pictures (no recipe.json); give another")
        else:
            write_text(path, json.dumps(facts, indent=1) + "\n")

    def _label(self, recipe: Recipe, count: int) -> None:
        path = self.path / "labels.csv"
        if not recipe.classes:
            return
        lines = path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
        if lines > count:
            return
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("file", "label"))
        names = (images.single_path("", index).name for index in range(count))
        writer.writerows(zip(names, recipe.labels(range(count)), strict=True))
        write_text(path, table.getvalue())

    def has(self, chunk: range) -> bool:
        return all(images.single_path(self.path, index).exists() for index in chunk)

    def add(self, chunk: range, samples: Tensor) -> None:
        images.write_singles(samples, self.path, chunk.start)

    def finish(self) -> None:
        return None


def fingerprint(recipe: Recipe) -> str:
    """A digest of the model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(recipe.denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
