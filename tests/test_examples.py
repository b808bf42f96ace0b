"""Each example runs, at few steps, writes its figure and shows what it says it shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="the examples' data come with scikit-learn")
pytest.importorskip("matplotlib", reason="the examples draw")

from examples import (
    data_distillation,
    dictionary_learning,
    latent_ode,
    molecular_dynamics,
    neural_cde,
    neural_sde,
    regularized_ode,
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


def test_a_latent_ode_learns_a_pendulum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_ode, "COUNT", 150)
    found = latent_ode.main(command(tmp_path, 12))
    assert found["last loss"] < 0.7 * found["first loss"]
    # Lines do well between what was seen and cannot continue a swing.
    assert found["lines between"] < 0.6 * found["lines beyond"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_controlled_equation_learns_strokes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neural_cde, "COUNT", 400)
    found = neural_cde.main(command(tmp_path, 25))
    assert found["last loss"] < 0.9 * found["first loss"]
    assert found["accuracy"] > 0.2 and found["logistic"] > 0.5
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_stochastic_equation_comes_nearer_to_the_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neural_sde, "COUNT", 600)
    found = neural_sde.main(command(tmp_path, 8))
    assert found["last loss"] < 0.9 * found["first loss"]
    # A normal law has the covariance and still is not the law.
    assert found["other real"] < 0.5 * found["normal law"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_regularised_classifiers_are_cheaper(tmp_path: Path) -> None:
    found = regularized_ode.main(command(tmp_path, 15))
    for kind in ("global", "local"):
        assert found[f"{kind} evaluations"] < found["plain evaluations"]
        assert found[f"{kind} accuracy"] > 0.4
    assert (tmp_path / "figure.png").stat().st_size > 5000


def table(path: Path, header: str, rows: list[str]) -> str:
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def series(count: int) -> list[str]:
    """Series with 12 observations each, at uneven times."""
    return [
        f"s{k},{(j + 0.3 * (k % 3)) / 4},{math.sin(j / 2 + k)}"
        for k in range(count)
        for j in range(12)
    ]


def test_examples_read_files(tmp_path: Path) -> None:
    import numpy as np

    points = [
        f"{k},{'ab'[k % 2]},{j},{math.cos(j / 5)},{(k % 2) * math.sin(j / 5 + k)}"
        for k in range(30)
        for j in range(10 + k)
    ]
    generator = np.random.default_rng(0)
    labels = np.repeat(["x", "y"], 80)
    images = generator.normal(size=(160, 4, 4)) + (labels == "x")[:, None, None]
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    files = {
        latent_ode: table(tmp_path / "a.csv", "series,time,value", series(24)),
        neural_sde: table(tmp_path / "b.csv", "series,time,value", series(60)),
        neural_cde: table(tmp_path / "c.csv", "stroke,label,time,x,y", points),
        regularized_ode: str(tmp_path / "images.npz"),
    }
    for example, path in files.items():
        figure = tmp_path / f"{example.__name__}.png"
        found = example.main(["--steps", "2", "--output", str(figure), "--data", path])
        assert all(math.isfinite(v) for v in found.values())
        assert figure.stat().st_size > 5000


def test_examples_say_what_a_file_lacks(tmp_path: Path, capsys: Any) -> None:
    path = table(tmp_path / "a.csv", "series,when,value", ["1,0,0"])
    with pytest.raises(SystemExit, match="lacks the columns time; it has series, when, value"):
        latent_ode.main(["--data", path])
    with pytest.raises(SystemExit, match="1 series; at least 20"):
        neural_sde.main(["--data", table(tmp_path / "b.csv", "series,time,value", ["1,0,0"])])
    with pytest.raises(SystemExit):
        neural_cde.main(["--data", str(tmp_path / "none.csv")])
    assert "there is no file" in capsys.readouterr().err
