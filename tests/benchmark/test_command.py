"""`ebbflow benchmark`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ebbflow import solvers
from ebbflow.benchmark import jobs
from ebbflow.benchmark.measure import AUTO, PLAIN
from ebbflow.benchmark.problems import oracle
from ebbflow.cli import benchmark, main

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--model", "mixture-2d", "--schedule", "edm", "--count", 8, "--workers", 1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        out = () if "--out" in arguments else ("--out", tmp_path)
        status = main(["benchmark", *map(str, arguments), *map(str, out)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_one_run_prints_a_table_and_writes_both_files(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="a plot needs it; the next test runs without")
    status, out, _ = run(*QUICK, "--evaluations", 4, 6, "--solver", "ddim", "heun", "auto")
    assert status == 0
    for word in ("mixture-2d, edm", "ddim", "heun", "flipped", "sliced W2", "benchmark.png"):
        assert word in out
    with (tmp_path / "benchmark.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["budget"]) for row in rows} == {
        (name, budget) for name in ("ddim", "heun", "auto") for budget in ("4", "6")
    }
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.png"}


def test_for_machines_and_without_the_optional_packages(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "k_diffusion.sampling", raising=False)
    for name in ("matplotlib", "diffusers", "azula.noise", "k_diffusion"):
        monkeypatch.setitem(sys.modules, name, None)
    command = (*QUICK, "--evaluations", 5, "--solver", "ddim", "--peers", "--json")
    status, out, _ = run(*command)
    assert status == 0
    report = json.loads(out)
    assert [row["method"] for row in report["rows"]] == ["ddim"]
    assert report["comparison"] == []
    assert report["reference"]["mixture-2d edm"] < 1e-4
    assert report["files"] == [str(tmp_path / "benchmark.csv")]
    notes = "\n".join(report["notes"])
    for library in ("diffusers", "k-diffusion", "azula"):
        assert f"{library} is missing and was left out" in notes
    assert "a plot needs matplotlib: pip install 'ebbflow[plots]'" in notes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--solver", "dimm"), ("unknown solver 'dimm'", "did you mean 'ddim'", "heun")),
        (("--schedule", "vpp"), ("unknown schedule 'vpp'", "did you mean 'vp'", "flow")),
        (("--model", "mnist"), ("unknown model 'mnist'", "mixture-2d", "fashion-mnist", "oracle")),
        (("--evaluations", "0"), ("evaluations must be at least 1, got 0",)),
        (("--count", "3"), ("count must be at least 8, got 3",)),
        (("--classes", "3"), ("class 3: the law 'mixture-2d' has no classes",)),
        (("--model", "fashion-mnist", "--classes", "12"), ("class 12", "classes 0 to 9")),
        (("--seed", "-1"), ("seed must lie in [0, 2^32), got -1",)),
        (("--workers", "0"), ("workers must be at least 1, got 0",)),
        (("--out", __file__), (f"--out {__file__} is a file",)),
        (("--device", "tpu9"), ("device 'tpu9' cannot be used here",)),
    ],
)
def test_bad_options_are_refused_with_the_value(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert all(word in " ".join(err.split()) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_three_laws_on_three_settings() -> None:
    work = benchmark.prepare(benchmark.Options())
    cases = {(job.problem().name, job.problem().setting) for job in work}
    laws = ("mixture-2d", "mixture-64d", "empirical-64d")
    assert cases == {(law, setting) for law in laws for setting in ("vp", "edm", "flow")}
    assert all(job.budgets == (5, 8, 10, 20) and job.solvers[:2] == (AUTO, PLAIN) for job in work)
    (job, *_) = benchmark.prepare(benchmark.Options(solver=("all",)))
    assert set(job.solvers) == {AUTO, PLAIN, *solvers.list()}


def test_models_by_name_come_with_their_own_schedule() -> None:
    (job,) = benchmark.prepare(benchmark.Options(model=("oracle",)))
    problem = job.problem()
    assert (problem.name, problem.setting, problem.shape) == ("oracle", "own", (2,))
    (job,) = benchmark.prepare(benchmark.Options(model=("fashion-mnist",), device="cpu"))
    network = job.problem()
    assert network.shape == (1, 32, 32)
    assert network.condition(12)["label"].tolist() == [*range(10), 0, 1]
    assert network.distances is not None


def test_a_solver_that_cannot_run_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_ours(case: object, name: str, budgets: object) -> list[str]:
        if name == "heun":
            raise FloatingPointError("the state is not finite")
        return [] if name == "edm" else [name]

    monkeypatch.setattr(jobs, "run_ours", run_ours)
    job = jobs.Job(partial(oracle, "mixture-2d", "edm"), ("heun", "edm", "ddim"), (5,), 8, 0)
    outcome = jobs.measure(job)
    assert outcome.rows == ["ddim"]
    assert outcome.idle["heun"] == "the state is not finite"
    assert "do not suffice" in outcome.idle["edm"]
    assert any("heun was left out" in note for note in benchmark._notes([outcome]))


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_rows() -> None:
    """In one process, `test_one_run_prints_a_table_and_writes_both_files`."""
    work = [
        jobs.Job(partial(oracle, "mixture-2d", setting), ("ddim", "heun"), (5,), 8, 0)
        for setting in ("edm", "flow")
    ]
    ticks: list[int] = []
    alone = jobs.run(work, 1, lambda: None)
    beside = jobs.run(work, 2, lambda: ticks.append(1))
    assert len(ticks) == sum(job.parts for job in work)
    for a, b in zip(alone, beside, strict=True):
        assert (a.problem, a.setting) == (b.problem, b.setting)
        for one, other in zip(a.rows, b.rows, strict=True):
            assert one.rms == pytest.approx(other.rms, rel=1e-9)
