"""papers.toml lists only what works: every symbol imports, every check is a test."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ebbflow.cli.papers import Paper, read

ROOT = Path(__file__).parent.parent
PAPERS = read()


def resolve(symbol: str) -> object:
    """The object that a dotted name stands for: a module, or a name in one."""
    module, _, name = symbol.rpartition(".")
    try:
        return import_module(symbol)
    except ModuleNotFoundError:
        return getattr(import_module(module), name)


def test_ids_are_unique() -> None:
    ids = [paper.id for paper in PAPERS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.id)
def test_entry(paper: Paper) -> None:
    assert re.fullmatch(r"S\d{3}", paper.id)
    assert paper.symbol.startswith("ebbflow.")
    assert resolve(paper.symbol) is not None
    assert re.search(r"\d", paper.measured), "measured states a figure"
    assert paper.command.startswith(("python ", "ebbflow "))


def test_every_check_is_collected() -> None:
    checks = sorted({paper.check for paper in PAPERS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", ""]
    process = subprocess.run([*command, *checks], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize(
    "text",
    [
        '[[paper]]\nid = "S001"\n',
        '[[papers]]\nid = "S001"\n',
        "\n".join(["[[paper]]", *(f'{k} = ""' for k in Paper.__dataclass_fields__)]),
    ],
    ids=["missing", "misspelt", "empty"],
)
def test_a_malformed_entry_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "papers.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="paper"):
        read(path)
