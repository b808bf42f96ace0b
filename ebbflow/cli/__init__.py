"""The command line: one verb a file, each a dataclass of options and a function `run`.

Nothing heavy is imported here: a verb's file is imported when the verb is called.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType

# What a wrong input, a full disk, a missing extra or a broken number raises, here and in torch.
# Everything else is a defect of the program and shows its traceback.
EXPECTED = (ValueError, OSError, ArithmeticError, RuntimeError, ImportError, MemoryError)

USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def verbs() -> dict[str, str]:
    """Every verb with the first sentence of its file, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = summary.partition("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 after an error, 130 after an interrupt."""
    # Read when torch is imported: threads that wait asleep, not spinning, lose little on idle cores
    # and are many times faster on shared ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rest = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in rest
    try:
        status = _dispatch([argument for argument in rest if argument != "--debug"])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone (`ebbflow papers | head`). Python flushes stdout once more
        # at exit; let it write to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except EXPECTED as error:
        if debug:
            raise
        return _fail(" ".join(str(error).split()) or type(error).__name__)


def _dispatch(rest: list[str]) -> int:
    if not rest or rest[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if rest[0] == "--version":
        from ebbflow import __version__

        print(f"ebbflow {__version__}")
        return 0
    verb, *arguments = rest
    if verb not in verbs():
        near = get_close_matches(verb, list(verbs()), 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown verb {verb!r}; {hint}known: {', '.join(verbs())}")
    return _run(import_module(f"ebbflow.cli.{verb}"), verb, arguments)


def _run(module: ModuleType, verb: str, arguments: list[str]) -> int:
    import tyro

    try:
        options = tyro.cli(
            module.Options,
            prog=f"ebbflow {verb}",
            description=module.__doc__,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:
        # tyro has printed the help (status 0) or what is wrong with the options (status 2).
        return stop.code if isinstance(stop.code, int) else USAGE
    return module.run(options) or 0


def _overview() -> str:
    lines = [
        "usage: ebbflow VERB [OPTIONS]",
        "",
        "Diffusion and flow models: three nouns and one verb.",
        "",
        "verbs:",
    ]
    lines += [f"  {verb:<12}{summary}" for verb, summary in verbs().items()]
    lines += [
        "",
        "options:",
        "  --version   the version of ebbflow",
        "  --debug     the traceback of an error, with any verb",
        "",
        "`ebbflow VERB --help` shows a verb's options and examples.",
    ]
    return "\n".join(lines)


def _fail(message: str) -> int:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), (message, "red")))
    return USAGE
