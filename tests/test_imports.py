"""Importing is light: torch and the standard library, and for the command line not even torch."""

from __future__ import annotations

import subprocess
import sys

ROOTS = """
import sys
roots = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(*sorted(root for root in roots if not root.startswith("_")))
"""


def loaded_after(statement: str) -> set[str]:
    """Third-party packages in memory after `statement`, in a fresh interpreter."""
    process = subprocess.run(
        [sys.executable, "-c", statement + ROOTS], capture_output=True, text=True, check=True
    )
    return set(process.stdout.splitlines()[-1].split())


def test_the_core_loads_nothing_but_torch() -> None:
    names = "set(dir(ebbflow)) - {'training', 'metrics'}"
    core = f"import ebbflow\nfor name in {names}: getattr(ebbflow, name)\n"
    assert loaded_after(core) - loaded_after("import torch") == {"ebbflow"}


def test_the_list_of_verbs_needs_no_torch() -> None:
    loaded = loaded_after("from ebbflow.cli import main\nmain(['--help'])\n")
    assert loaded & {"torch", "numpy", "rich", "tyro", "PIL"} == set()


def test_a_verb_that_needs_no_model_needs_no_torch() -> None:
    loaded = loaded_after("from ebbflow.cli import main\nmain(['papers', '--json'])\n")
    assert "tyro" in loaded
    assert "torch" not in loaded
