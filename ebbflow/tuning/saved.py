"""The state of a fit in one file, written whole, that knows which call it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow.files import read_tensors, write_tensors

NUMBER = "number."


@dataclass(frozen=True)
class Saved:
    """Numbers, float64, and tensors, by name."""

    numbers: Mapping[str, float]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(path: str | Path | None, request: Mapping[str, Any]) -> Saved | None:
        """What `write` left there for the same request; None where there is nothing.

        Raises ValueError for the state of another call.
        """
        if path is None or not Path(path).is_file():
            return None
        tensors = read_tensors(path)
        asked = tensors.pop("request", torch.zeros(0, dtype=torch.uint8))
        if not torch.equal(asked, _bytes(request)):
            raise ValueError(
                f"{path} holds the state of another call: give the arguments of that one, another "
                "file, or remove it"
            )
        numbers = {key: tensors.pop(key).item() for key in list(tensors) if key.startswith(NUMBER)}
        return Saved({key.removeprefix(NUMBER): v for key, v in numbers.items()}, tensors)

    def write(self, path: str | Path, request: Mapping[str, Any]) -> None:
        out = {name: v.detach().cpu().contiguous() for name, v in self.tensors.items()}
        for name, value in self.numbers.items():
            out[NUMBER + name] = torch.tensor(value, dtype=torch.float64)
        write_tensors(path, {**out, "request": _bytes(request)})


def _bytes(request: Mapping[str, Any]) -> Tensor:
    text = json.dumps(request, sort_keys=True).encode()
    return torch.tensor(list(text), dtype=torch.uint8)
