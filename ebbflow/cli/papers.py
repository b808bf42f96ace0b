"""List the published methods in this package, each with the test that proves it.

Examples:
    ebbflow papers              a table: paper, where it lives, what was measured
    ebbflow papers --json       everything, also the checks and the commands that measure
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ebbflow.cli._shared import print_json, print_table


@dataclass(frozen=True)
class Options:
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Paper:
    """One entry of papers.toml.

    `symbol` is importable, `check` a pytest node, `claim` the paper's headline, `measured` what
    `command` prints here.
    """

    id: str
    title: str
    symbol: str
    check: str
    claim: str
    measured: str
    command: str


def read(path: Path | None = None) -> list[Paper]:
    """The entries of papers.toml, in its order; raises ValueError for one that is malformed."""
    path = path or Path(__file__).parent.parent / "papers.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    if set(content) - {"paper"}:
        raise ValueError(f"{path.name} has only [[paper]] entries, found {sorted(content)}")
    return [_paper(entry) for entry in content.get("paper", [])]


def _paper(entry: Mapping[str, Any]) -> Paper:
    wanted = {field.name for field in fields(Paper)}
    if set(entry) != wanted or not all(isinstance(v, str) and v.strip() for v in entry.values()):
        raise ValueError(
            f"the paper {entry.get('id', '(no id)')!r} needs exactly these texts: "
            f"{', '.join(sorted(wanted))}; it has {', '.join(sorted(entry))}"
        )
    return Paper(**entry)


def run(options: Options) -> None:
    papers = read()
    if options.json:
        print_json({"papers": [asdict(paper) for paper in papers]})
        return
    rows = [(p.id, p.title, p.symbol, p.claim, p.measured) for p in papers]
    print_table(("id", "paper", "symbol", "the paper's claim", "measured here"), rows)
