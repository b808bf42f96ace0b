"""Figures of the examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def output(name: str, description: str) -> Path:
    """The file that the figure goes to, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="figure's file")
    return parser.parse_args().output


def save(figure: Any, path: Path) -> None:
    """Write under a temporary name in the same folder, then rename."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=130, bbox_inches="tight")
    temporary.replace(path)
    print(f"figure: {path}")
