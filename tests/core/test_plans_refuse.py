"""What is not a plan, and what a plan does not run on, is refused with a message."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow import Plan, Stage

VP = ef.schedules.VP()
EULER = ({"x0": 0.5, "D": 0.5},)


def stage(time: Any = 0.8, query: Any = None, update: Any = EULER, node: Any = 0.5) -> Stage:
    return Stage(time, {"x0": 1.0} if query is None else query, update, node)


ONE = {"x0": 1.0}
TWO = ({"x0": 1.0, "D": 1.0}, {"D": 1.0})

MALFORMED: dict[str, tuple[Any, tuple[Stage, ...], str]] = {
    "no stage": (0.8, (), "at least one stage"),
    "start above 1": (1.2, (stage(),), r"start 1\.2 is not a time in \[0, 1\]"),
    "start that is no number": ("1", (stage(),), "start '1' is not a time"),
    "start NaN": (math.nan, (stage(),), "start nan is not a time"),
    "start True": (True, (stage(),), "start True is not a time"),
    "time below 0": (0.8, (stage(time=-0.1),), r"stage 0: time -0\.1 is not in \[0, 1\]"),
    "time NaN": (0.8, (stage(time=math.nan),), "stage 0: time nan"),
    "time None": (0.8, (stage(time=None),), "stage 0: time None"),
    "a call without noise": (0.8, (stage(time=0.0),), "no noise at t = 0, nothing to denoise"),
    "unknown register": (0.8, (stage(query={"x1": 1.0}),), "stage 0, query: 'x1' is not a name"),
    "unknown name": (0.8, (stage(update=({"eps": 1.0},)),), "register 0: 'eps' is not a name"),
    "a query that sees itself": (0.8, (stage(query={"X": 1.0}),), "query: 'X' is not a name"),
    "a query that sees its answer": (0.8, (stage(query={"D": 1.0}),), "query: 'D' is not a name"),
    "an empty query": (0.8, (stage(query={}),), "query: the row is {}"),
    "a query that is a list": (0.8, (stage(query=[1.0]),), "query: the row is"),
    "a row that is None": (0.8, (stage(update=(None,)),), "register 0: the row is None"),
    "only the constant": (0.8, (stage(query={"1": 1.0}),), "more than the constant"),
    "NaN": (0.8, (stage(update=({"x0": math.nan},)),), "coefficient 'x0' is nan, not finite"),
    "infinite": (0.8, (stage(update=({"D": -math.inf},)),), "'D' is -inf, not finite"),
    "beyond any float": (0.8, (stage(update=({"D": 10**400},)),), "not finite"),
    "text": (0.8, (stage(update=({"D": "0.5"},)),), "'0.5', not a number"),
    "a truth value": (0.8, (stage(update=({"D": True},)),), "True, not a number"),
    "a tensor": (
        0.8,
        (stage(update=({"D": torch.tensor(1.0)},)),),
        "tensor of shape",
    ),
    "too few rows": (
        0.8,
        (stage(update=TWO), stage(time=0.5, node=0.3)),
        r"stage 1: 1 update rows for 2 register\(s\)",
    ),
    "too many rows": (
        0.8,
        (stage(), stage(time=0.5, update=TWO, node=0.3)),
        r"stage 1: 2 update rows for 1 register\(s\)",
    ),
    "an emptied register is read": (
        0.8,
        (stage(update=(*EULER, {})), stage(time=0.5, query={"x1": 1.0}, update=TWO, node=0.3)),
        "stage 1, query: 'x1' is empty there",
    ),
    "no state at a node": (0.8, (stage(update=({}, ONE)),), "needs a time in .* and a state"),
    "node above 1": (0.8, (stage(node=1.5),), r"node 1\.5 needs a time"),
    "node that is no number": (0.8, (stage(node="0"),), "node '0' needs a time"),
    "no end": (0.8, (stage(node=None),), "last stage must end at a node"),
    "a node that repeats": (
        0.8,
        (stage(), stage(time=0.5, node=0.5)),
        r"times\[2\] = 0\.5 after times\[1\] = 0\.5",
    ),
    "nodes that turn back": (
        0.8,
        (stage(), stage(time=0.5, node=0.6)),
        r"times\[2\] = 0\.6 after times\[1\] = 0\.5: nodes must be strictly decreasing",
    ),
    "no register": (0.8, (stage(update=()),), "'x0' is not a name there"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_plans_are_refused(case: str) -> None:
    start, stages, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message):
        Plan(VP, start, stages)


def test_the_pieces_of_the_table_are_right_when_put_together() -> None:
    """What the cases above spoil is a plan."""
    assert Plan(VP, 0.8, (stage(),)).times == (0.8, 0.5)
    two = Plan(VP, 0.8, (stage(update=TWO), stage(time=0.5, update=TWO, node=0.3)))
    assert (two.nfe, two.registers, two.times) == (2, 2, (0.8, 0.5, 0.3))
    assert not two.stochastic


def identity(schedule: ef.schedules.Schedule = VP) -> ef.Denoiser:
    return ef.Denoiser(lambda x, t: x, schedule)


def test_a_plan_refuses_another_schedule() -> None:
    plan = ef.solvers.get("ddim").plan(VP, 3)
    for other in (ef.schedules.Cosine(), ef.schedules.VP(0.1, 19.9)):
        with pytest.raises(ValueError, match=r"made for VP\(.*compile the solver"):
            plan.run(identity(other), torch.zeros(2, 3))
        with pytest.raises(ValueError, match="compile the solver"):
            ef.sample(identity(other), (2, 3), plan=plan)
    assert plan.run(identity(ef.schedules.VP(0.1, 20.0)), torch.zeros(2, 3)).shape == (2, 3)


def test_a_plan_refuses_a_bare_function() -> None:
    with pytest.raises(TypeError, match=r"ef\.Denoiser\(net, schedule\)"):
        ef.solvers.get("ddim").plan(VP, 3).run(lambda x, t: x, torch.zeros(2, 3))  # pyright: ignore


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "int64.* floating-point batch"),
        (torch.tensor(1.0), "floating-point batch"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex64"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), r"needs 1 register\(s\)"),
    ],
)
def test_a_plan_refuses_what_is_no_state(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ef.solvers.get("ddim").plan(VP, 3).run(identity(), x)


def test_registers_of_unequal_shape_are_refused() -> None:
    plan = ef.solvers.get("dpm-solver++2m").plan(VP, 3)
    with pytest.raises(ValueError, match="of one shape"):
        plan.run(identity(), (torch.zeros(2, 3), torch.zeros(2, 1)))


def test_the_shape_of_a_denoiser_holds_in_a_run() -> None:
    denoiser = ef.Denoiser(lambda x, t: x, VP, shape=(3,))
    plan = ef.solvers.get("ddim").plan(VP, 3)
    with pytest.raises(
        ValueError, match=r"shape \(2, 4\): this denoiser takes \(batch, \*\(3,\)\)"
    ):
        plan.run(denoiser, torch.zeros(2, 4))


@pytest.mark.parametrize(
    "net",
    [
        lambda x, t: x[:1],
        lambda x, t: x.mean(1, keepdim=True),
        lambda x, t: t,
        lambda x, t: x[0],
        lambda x, t: x.unsqueeze(0),
    ],
)
@pytest.mark.parametrize("prediction", ["x0", "noise", "v"])
def test_outputs_that_would_broadcast_are_refused(net: Any, prediction: str) -> None:
    denoiser = ef.Denoiser(net, VP, prediction)
    with pytest.raises(ValueError, match="the network returned shape"):
        denoiser(torch.ones(4, 5), 0.5)
    with pytest.raises(ValueError, match="the network returned shape"):
        ef.sample(denoiser, (4, 5), steps=2)


def test_noise_of_another_shape_is_not_added() -> None:
    for noise in (torch.zeros(1, 3), torch.zeros(3), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="they must be equal"):
            VP.add_noise(torch.zeros(2, 3), 0.5, noise)


def test_a_dense_form_of_numpy_nodes_is_the_same() -> None:
    """Nodes may be any sequence of numbers, and are kept bit for bit."""
    nodes = [0.9, 1 / 3, 0.1]
    for given in (
        nodes,
        tuple(nodes),
        np.array(nodes),
        Tensor.new_tensor(torch.zeros(1).double(), nodes),
    ):
        plan = ef.solvers.get("dpm-solver++2m").plan(VP, times=given)  # pyright: ignore
        assert plan.times == tuple(nodes)
        assert [s.time for s in plan.stages] == nodes[:-1]
