"""What a run says while it goes on: a JSONL file, and a progress bar on terminals."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ebbflow.training.checkpoint import write_bytes


class Journal:
    """Log of a run from step `start`; entries of later steps, which will come again, are dropped.

    Without `active` (processes other than the first) it does nothing.
    """

    def __init__(self, path: Path, start: int, steps: int, active: bool, progress: bool) -> None:
        self.path = path
        self.active = active
        self.bar: Any = None
        if not active:
            return
        from rich import progress as rich_progress
        from rich.console import Console

        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= start]
        write_bytes(path, b"".join(line + b"\n" for line in kept))
        console = Console(stderr=True)
        if progress and console.is_terminal:
            columns = (
                rich_progress.TextColumn("step {task.completed}/{task.total}"),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.fields[figures]}"),
                rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self.bar = rich_progress.Progress(*columns, console=console)
            self.task = self.bar.add_task("", total=steps, completed=start, figures="")

    def __enter__(self) -> Journal:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def write(self, **entry: Any) -> None:
        """Append one line to the log."""
        if self.active:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def show(self, step: int, loss: float | None = None, rate: float = 0.0) -> None:
        """Move the bar; with a loss, also the figures beside it."""
        if self.bar:
            figures = {} if loss is None else {"figures": f"loss {loss:.4f}, {rate:.0f} images/s"}
            self.bar.update(self.task, completed=step, **figures)


def _step(line: bytes) -> float:
    """The step of an entry; infinite for a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
