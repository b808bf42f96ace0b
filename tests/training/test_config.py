from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from ebbflow.training import Config, learning_rate

CONFIG = Config(images=6400, batch=64, learning_rate=2.0, warmup=10, decay_start=25)


def test_the_learning_rate_rises_linearly_then_falls_as_the_root() -> None:
    rates = [learning_rate(CONFIG, step) for step in (1, 5, 10, 25, 100)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 1.0])


def test_the_cosine_ends_at_zero_with_the_run() -> None:
    config = replace(CONFIG, decay="cosine")
    assert config.steps == 100
    assert learning_rate(config, 50) == pytest.approx(1.0)
    assert learning_rate(config, 100) == pytest.approx(0.0)


def test_the_constant_stays_and_no_warmup_starts_at_the_top() -> None:
    config = replace(CONFIG, decay="constant", warmup=0)
    assert {learning_rate(config, step) for step in (1, 10, 10**6)} == {2.0}


def test_the_learning_rate_counts_optimiser_steps_whatever_the_parts() -> None:
    parts = replace(CONFIG, accumulate=4)
    assert parts.steps == CONFIG.steps
    assert learning_rate(parts, 77) == learning_rate(CONFIG, 77)


def test_only_a_cosine_run_depends_on_where_it_ends() -> None:
    assert "images" not in CONFIG.identity()
    assert "images" in replace(CONFIG, decay="cosine").identity()
    assert "log_every" not in CONFIG.identity()


@pytest.mark.parametrize(
    "bad",
    [
        {"images": 0},
        {"batch": -1},
        {"learning_rate": math.nan},
        {"learning_rate": 0.0},
        {"label_dropout": 1.0},
        {"noise_std": 0.0},
        {"precision": "float8"},
        {"decay": "linear"},
        {"accumulate": 3},
        {"beta1": 1.0},
        {"checkpoint_every": 0},
    ],
    ids=str,
)
def test_a_bad_value_is_named(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        replace(CONFIG, **bad)
