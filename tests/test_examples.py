"""Each example runs, at few steps, writes its figure and shows what it says it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the examples' data come with scikit-learn")
pytest.importorskip("matplotlib", reason="the examples draw")

from examples import (
    data_distillation,
    dictionary_learning,
    molecular_dynamics,
    svm_regularisation,
)


def command(path: Path, steps: int) -> list[str]:
    return ["--steps", str(steps), "--output", str(path / "figure.png")]


def test_implicit_jacobians_of_the_machine_are_ahead_of_unrolled_ones(tmp_path: Path) -> None:
    found = svm_regularisation.main(command(tmp_path, 1))
    assert found["implicit"] < 0.2 * found["unrolled"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_distilled_digits_train_a_classifier(tmp_path: Path) -> None:
    found = data_distillation.main(command(tmp_path, 4))
    assert found["last loss"] < 0.9 * found["first loss"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_dictionary_learned_for_the_task_fits_it_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary_learning, "SPLITS", 1)
    found = dictionary_learning.main(command(tmp_path, 40))
    assert found["task-driven loss"] < found["reconstructing loss"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_tangent_of_a_packing_is_that_of_finite_differences(tmp_path: Path) -> None:
    found = molecular_dynamics.main(command(tmp_path, 20))
    assert found["implicit"] < 1e-5 < found["unrolled"]
    assert (tmp_path / "figure.png").stat().st_size > 5000
