"""What the examples share: their command line and the writing of their figures."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def arguments(
    name: str, description: str | None, steps: int, argv: Sequence[str] | None
) -> tuple[int, Path]:
    """Steps and the figure's file, from the command line."""
    found = _parser(name, description, steps).parse_args(argv)
    return found.steps, found.output


def arguments_and_data(
    name: str, description: str | None, steps: int, holds: str, argv: Sequence[str] | None
) -> tuple[int, Path, Path | None]:
    """Steps, the figure's file and the user's own data, which `holds` describes, or None."""
    parser = _parser(name, description, steps)
    parser.add_argument("--data", type=Path, metavar="PATH", help=f"your own: {holds}")
    found = parser.parse_args(argv)
    if found.data is not None and not found.data.is_file():
        parser.error(f"--data: there is no file {found.data}; it should be {holds}")
    return found.steps, found.output, found.data


def columns(path: Path, *names: str) -> list[list[str]]:
    """The named columns of a .csv file with a header, row by row."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(names) - set(reader.fieldnames or ())
        if missing:
            has = ", ".join(reader.fieldnames or ()) or "none"
            raise SystemExit(f"{path} lacks the columns {', '.join(sorted(missing))}; it has {has}")
        return [[row[name] for name in names] for row in reader]


def _parser(name: str, description: str | None, steps: int) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    parser.add_argument("--steps", type=int, default=steps, help=f"default {steps}")
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="figure's file")
    return parser


def plots() -> Any:
    """matplotlib.pyplot, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure: Any, path: Path) -> None:
    """Write under a temporary name in the same folder, then rename."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=130, bbox_inches="tight")
    temporary.replace(path)
    print(f"figure: {path}")
