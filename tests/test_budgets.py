"""The budgets of the house, counted on formatted code, docstrings left out."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ebbflow"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FILE_BUDGET = 300
CORE_BUDGET = 2000
# For each sampler that a family publishes.
SOLVER_BUDGET = 50


def code_lines(source: str) -> int:
    """Lines of `source` without those of docstrings (of modules, classes, functions, names)."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            documentation.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return len(source.splitlines()) - len(documentation)


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top, as the import contract in pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    return [re.findall(r"\w+", floor) for floor in contract["layers"]]


def files_of(room: str) -> list[Path]:
    return [PACKAGE / f"{room}.py", *sorted((PACKAGE / room).rglob("*.py"))]


def test_docstrings_are_not_counted_and_code_is() -> None:
    source = '"""One.\n\nTwo.\n"""\n\nx = 1\n"""What x is."""\ny = "text"\n'
    assert code_lines(source) == 3
    assert code_lines('def f():\n    """Doc."""\n    return """a\nb"""\n') == 3


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    lines = code_lines(path.read_text(encoding="utf-8"))
    assert lines <= FILE_BUDGET


def test_the_core_is_small() -> None:
    rooms = floors()
    first = next(i for i, floor in enumerate(rooms) if "sampling" in floor)
    last = next(i for i, floor in enumerate(rooms) if "schedules" in floor)
    core = {room for floor in rooms[first : last + 1] for room in floor} - {"solvers"}
    paths = [path for room in sorted(core) for path in files_of(room) if path.exists()]
    assert PACKAGE / "schedules.py" in paths
    sizes = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in paths}
    assert sum(sizes.values()) < CORE_BUDGET, sizes


def published(source: str) -> list[str]:
    """Samplers that a file publishes: module-level instances of its own public classes."""
    body = ast.parse(source).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    return [
        ast.unparse(node.targets[0])
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id in classes
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in files_of("solvers") if path.exists() and published(path.read_text("utf-8"))],
    ids=lambda path: path.name,
)
def test_a_sampler_is_one_short_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = code_lines(source)
    assert lines <= SOLVER_BUDGET * len(published(source))
