"""Files that are either complete or absent, and JSON that is what it should be."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it becomes `path` when the block succeeds.

    A block that raises (a full disk, an interrupt) leaves what stood at `path` as it was and no
    temporary file behind. The folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError, naming the file, for any other content."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, expected an object")
    return config


def exact_keys(config: Any, keys: Collection[str], where: str, optional: bool = False) -> None:
    """Raise ValueError unless `config` has these keys and no others.

    An unknown key comes with the nearest known one; `optional` keys may be missing.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} is {config!r:.40}, expected an object with {sorted(keys)}")
    for key in config:
        if key not in keys:
            near = get_close_matches(str(key), keys, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}{hint} (known: {sorted(keys)})")
    missing = sorted(set(keys) - set(config))
    if missing and not optional:
        raise ValueError(f"{where}: missing {missing}")


def as_list(value: Any, where: str) -> list[Any]:
    """`value` itself; raises ValueError unless it is a list."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r:.40}, expected a list")
    return value


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors to `path`, completely or not at all."""
    from safetensors.torch import save

    with replacing(path) as temporary:
        temporary.write_bytes(save(dict(tensors)))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises FileNotFoundError, or ValueError for any other."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: it holds the tensors of the file beside it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}): fetch or save it again; "
            "pickled checkpoints are never read"
        ) from error
