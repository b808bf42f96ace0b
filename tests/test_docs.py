"""What the documents say is run: set-up lines, command lines and Python."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from ebbflow.oracles import GaussianMixture
from ebbflow.schedules import Cosine

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks(README, "bash") for line in block.splitlines()]
SET_UP = [line for line in LINES if not line.startswith("ebbflow ")]
COMMANDS = [line for line in LINES if line.startswith("ebbflow ")]


def test_set_up_is_two_lines_that_make_their_own_environment() -> None:
    assert len(SET_UP) == 2
    for line in SET_UP:
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "-c constraints.txt" in line
        assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0


def test_ci_runs_the_readme_s_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"grep -m 1 -E '(.*?)' README.md", script)
    found = [line for line in README.splitlines() if re.search(pattern, line)]
    assert found == [SET_UP[1]]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_parses(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    options = import_module(f"ebbflow.cli.{verb}").Options
    assert isinstance(tyro.cli(options, args=arguments), options)


PYTHON = ("model", "solvers", "tune", "diffusers", "reverse", "oracle", "implicit")


@pytest.mark.parametrize("code", blocks(README, "python"), ids=PYTHON)
def test_the_readme_s_python_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(code, names)
    result = next(names[name] for name in ("images", "samples", "gradient") if name in names)
    assert isinstance(result, torch.Tensor)
    assert torch.isfinite(result).all()
    if "mixture" in names:
        spread = names["mixture"].covariance.diagonal().sqrt()
        assert ((result.mean(0) - names["mixture"].mean).abs() < 5 * spread / 1000**0.5).all()


GUIDES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
EXAMPLES = [(name, code) for name, text in GUIDES.items() for code in blocks(text, "python")]


@pytest.mark.parametrize(("guide", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_guides_python_runs(guide: str, code: str) -> None:
    names: dict[str, Any] = {"__name__": "guide"}
    exec(code, names)
    if guide == "differentiation":
        assert names["t"].grad.item() == pytest.approx(1 / 12)


def test_the_solver_in_the_guide_has_the_order_that_it_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = blocks(CONTRIBUTING, "python")
    assert len(code.splitlines()) <= 50
    names: dict[str, Any] = {"__name__": "guide"}
    # A dataclass looks its module up by name.
    monkeypatch.setitem(__import__("sys").modules, "guide", type(torch)("guide"))
    exec(code, names)
    solver = names["midpoint"]
    means = torch.tensor([[-1.0, 0.3], [0.8, 0.5]])
    mixture = GaussianMixture(means, torch.tensor([0.1, 0.3]), torch.tensor([0.4, 0.6]))
    denoiser = mixture.denoiser(Cosine())
    x = torch.randn(16, 2, dtype=torch.float64)

    def final(steps: int) -> torch.Tensor:
        # Between two times inside (0, 1), where every step is a full one.
        nodes = [0.9 - 0.8 * i / steps for i in range(steps + 1)]
        return solver.plan(Cosine(), times=nodes).run(denoiser, x)

    reference = final(1536)
    coarse, fine = ((final(steps) - reference).norm() for steps in (48, 96))
    assert torch.log2(coarse / fine).item() == pytest.approx(solver.order, abs=0.25)
    whole = solver.plan(Cosine(), 8)
    assert whole.nfe == 2 * 8 - 1
    assert torch.isfinite(whole.run(denoiser, x)).all()
