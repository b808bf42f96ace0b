"""What the examples share: their command line and the writing of their figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def arguments(
    name: str, description: str | None, steps: int, argv: Sequence[str] | None
) -> tuple[int, Path]:
    """Steps and the figure's file, from the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    parser.add_argument("--steps", type=int, default=steps, help=f"default {steps}")
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="figure's file")
    found = parser.parse_args(argv)
    return found.steps, found.output


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
