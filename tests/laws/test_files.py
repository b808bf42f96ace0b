"""Law 11 for plans: they come back as they were; what is unknown or hostile is refused with a
message."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ebbflow as ef
from ebbflow import Plan
from tests.laws import cases
from tests.laws.cases import SOLVERS
from tests.laws.test_schedules import SCHEDULES

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([10**400, -1, 1e308, 0.5])
    | st.sampled_from(["", "x0", "VP", "MLP", "edm", "__import__('os')"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "x0", "D", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("schedule", ["VP", "VE", "Betas zero terminal"])
@pytest.mark.parametrize("name", SOLVERS)
def test_plans_come_back(name: str, schedule: str, tmp_path: Path) -> None:
    process = SCHEDULES[schedule]
    plan = SOLVERS[name].plan(process, 5, statistics=cases.some_statistics(3))
    plan.save(tmp_path / "deep" / "plan.json")
    again = Plan.load(tmp_path / "deep" / "plan.json")
    assert again == plan and again.origin == plan.origin and again.origin["solver"] == name
    denoiser = ef.Denoiser(lambda x, t: torch.tanh(x), process)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(again.run(denoiser, x, seed=4), plan.run(denoiser, x, seed=4))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside some JSON."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    return [path, *(p for key, child in children for p in places(child, (*path, key)))][:400]


def changed(config: Any, path: tuple[Any, ...], what: Callable[[Any, Any], None]) -> Any:
    config = copy.deepcopy(config)
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    what(parent, path[-1])
    return config


PLAN = ef.solvers.get("edm-churn").plan(ef.schedules.VP(), 2).to_config()


@given(place=st.sampled_from(places(PLAN)[1:]), value=JSON)
def test_a_plan_with_any_value_changed_loads_whole_or_is_refused(place: Any, value: Any) -> None:
    hostile = changed(PLAN, place, lambda parent, key: parent.__setitem__(key, value))
    try:
        plan = Plan.from_config(hostile)
    except ValueError as error:
        assert str(error)
    else:
        again = Plan.from_config(json.loads(json.dumps(plan.to_config())))
        assert again == plan


def test_any_other_number_is_another_plan() -> None:
    """Files keep the last digit of every number, and equality sees it."""
    right = Plan.from_config(PLAN)
    for place in places(PLAN["stages"]):
        value = PLAN["stages"]
        for key in place:
            value = value[key]
        if isinstance(value, float) and value:
            nudge = math.nextafter(value, 0.5)
            other = changed(PLAN["stages"], place, lambda p, key, v=nudge: p.__setitem__(key, v))
            text = json.dumps({**PLAN, "stages": other})
            assert Plan.from_config(json.loads(text)) != right, place


def test_unknown_and_missing_keys_are_refused_at_every_level() -> None:
    for place in places(PLAN)[1:]:
        inside_rows_or_origin = {"query", "update", "origin"} & set(place[:-1])
        if isinstance(place[-1], str) and not inside_rows_or_origin and place[0] != "schedule":
            missing = changed(PLAN, place, lambda parent, key: parent.pop(key))
            with pytest.raises(ValueError):
                Plan.from_config(missing)
            other = changed(PLAN, place, lambda parent, key: parent.update(surprise=1))
            with pytest.raises(ValueError, match="unknown key 'surprise'"):
                Plan.from_config(other)
    with pytest.raises(ValueError, match="did you mean 'beta_min'"):
        ef.schedules.from_config({"name": "VP", "beta_mim": 0.1})


BAD_JSON = {
    "empty": b"",
    "pickled": pickle.dumps({"format": "ebbflow-plan"}),
    "truncated": json.dumps(PLAN).encode()[:200],
    "a list": b"[1, 2]",
    "deep": b"[" * 200_000,
    "not text": b"\xff\xfe\x00",
    "not finite": json.dumps(PLAN).replace('"start": 1.0', '"start": NaN').encode(),
    "of something else": b'{"_class_name": "DDIMScheduler"}',
    "of the future": json.dumps({**PLAN, "version": 2}).encode(),
}


@pytest.mark.parametrize("content", BAD_JSON)
def test_bad_files_of_plans_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(BAD_JSON[content])
    with pytest.raises(ValueError, match=r"JSON|plan|start|object"):
        Plan.load(tmp_path / "plan.json")
