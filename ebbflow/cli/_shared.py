"""What several verbs need: the device, progress, tables, and one JSON object for machines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ebbflow.progress import bar

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is this process's GPU if there is one, else the CPU."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]} "
            "Give auto, cpu, cuda or cuda:1"
        ) from error
    return device


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print(json.dumps(values, indent=1, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> None:
    """Print a table to stdout, as wide as its content where stdout is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one of `total`: a bar on a terminal, else some lines."""
    if sys.stderr.isatty():
        with bar(description, total) as advance:
            yield advance
        return
    began = shown = time.monotonic()
    done = 0

    def show() -> None:
        passed = time.monotonic() - began
        left = f", {passed / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{description} {done}/{total}, {passed:.0f} s{left}", file=sys.stderr, flush=True)

    def advance_line() -> None:
        nonlocal done, shown
        done += 1
        if done == total or time.monotonic() - shown > 10:
            shown = time.monotonic()
            show()

    show()
    yield advance_line
