"""Law 4, the table itself: any linear machine runs as its dense form says, and its moments, its
transitions and its inverse are those of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ebbflow as ef
from ebbflow import Plan, Stage, noise
from tests.laws import cases, mutants
from tests.laws.cases import PLAIN, SOLVERS

COSINE = ef.schedules.Cosine()
Row = dict[str, float]


def curved(x: Tensor, t: Tensor) -> Tensor:
    """Neither linear nor the same at two times, and elementwise."""
    return torch.tanh(1.3 * x) * (1 + t.reshape(-1, *(1,) * (x.ndim - 1)))


DENOISER = ef.Denoiser(curved, COSINE)


@st.composite
def machines(draw: st.DrawFn) -> Plan:
    """Any valid plan: random rows over whatever registers are held, with ones and zeros."""
    registers = draw(st.integers(1, 3))
    calls = draw(st.integers(1, 5))
    coefficient = st.sampled_from([0.0, 1.0, -1.0, 0.37, -0.81, 1.9])
    held = {f"x{i}" for i in range(registers)}

    def row(names: set[str], needed: str) -> Row:
        others = draw(st.sets(st.sampled_from(sorted(names)))) - {needed}
        return {name: draw(coefficient) for name in (needed, *sorted(others))}

    stages = []
    for k in range(calls):
        query = row(held | {"Z", "1"}, draw(st.sampled_from(sorted(held))))
        names = held | {"X", "D", "Z", "1"}
        update = [row(names, draw(st.sampled_from(sorted(names - {"1"}))))]
        for _ in range(1, registers):
            kept = draw(st.booleans())
            update.append(row(names, draw(st.sampled_from(["D", "X"]))) if kept else {})
        held = {f"x{i}" for i, r in enumerate(update) if r}
        node = 0.9 - 0.1 * k if k == calls - 1 or draw(st.booleans()) else None
        stages.append(Stage(draw(st.floats(0.1, 1.0)), query, tuple(update), node))
    return Plan(COSINE, 1.0, tuple(stages))


def interpret(plan: Plan, x: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(queries, predictions, draws) and, as the last query, the end: a plan read word by word."""
    registers: dict[str, Tensor] = {f"x{i}": x for i in range(plan.registers)}
    queries, predictions, draws = [], [], []
    for k, stage in enumerate(plan.stages):
        z = noise.normal(seed, range(len(x)), k + 1, x.shape[1:], torch.float64)
        values = {**registers, "Z": z, "1": torch.ones_like(x)}

        def form(row: Any, values: dict[str, Tensor]) -> Tensor:
            return sum((values[name] * c for name, c in row.items()), torch.zeros_like(x))

        values["X"] = form(stage.query, values)
        values["D"] = DENOISER(values["X"], stage.time)
        queries.append(values["X"])
        predictions.append(values["D"])
        draws.append(z)
        registers = {f"x{i}": form(row, values) for i, row in enumerate(stage.update) if row}
    return [*queries, registers["x0"]], predictions, draws


X = torch.linspace(-1.5, 1.5, 15, dtype=torch.float64).reshape(3, 5)


def check_dense(plan: Plan, told: Plan) -> None:
    """Raise AssertionError unless `told`'s dense form describes how `plan` runs."""
    queries, predictions, draws = interpret(plan, X, seed=5)
    dense = told.dense()
    d, z = torch.stack(predictions), torch.stack(draws)

    def written(a: Tensor, b: Tensor, c: Tensor, constant: Tensor) -> Tensor:
        linear = a[:, None, None] * X + constant[:, None, None]
        return linear + torch.einsum("kj,jbi->kbi", b, d) + torch.einsum("kj,jbi->kbi", c, z)

    found = written(dense.a, dense.B, dense.C, dense.constant)
    torch.testing.assert_close(found, torch.stack(queries[:-1]), rtol=1e-10, atol=1e-10)
    ends = written(dense.node_a, dense.node_B, dense.node_C, dense.node_constant)
    torch.testing.assert_close(ends[-1], queries[-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ends[-1], plan.run(DENOISER, X, seed=5), rtol=1e-10, atol=1e-10)
    # Causal: query k knows the predictions before it and the noise up to its own.
    assert not bool(dense.B.triu(0).any()) and not bool(dense.C.triu(1).any())


@given(plan=machines())
def test_any_machine_runs_as_its_dense_form_says(plan: Plan) -> None:
    check_dense(plan, plan)


@pytest.mark.parametrize("name", PLAIN)
def test_dense_forms_of_solvers_and_of_their_mutants(name: str) -> None:
    plan = cases.maker(SOLVERS[name])(COSINE, cases.uneven(5))
    check_dense(plan, plan)
    for mutant in mutants.systematic(name, 1):
        if mutant.name not in ("times late",):  # the dense form knows no times
            with pytest.raises(AssertionError):
                check_dense(plan, mutant.rewrite(plan))
                pytest.fail(f"{mutant} survives", pytrace=False)


@given(plan=machines())
def test_a_file_keeps_any_machine(plan: Plan) -> None:
    again = Plan.from_config(plan.to_config())
    assert again == plan
    assert torch.equal(again.run(DENOISER, X, seed=2), plan.run(DENOISER, X, seed=2))


@pytest.mark.parametrize("name", PLAIN)
def test_transitions_are_the_steps(name: str) -> None:
    """Given the stage before it, the next state is normal, with this mean and this deviation."""
    plan = cases.maker(SOLVERS[name])(COSINE, cases.uneven(5))
    if any("Z" in stage.query for stage in plan.stages):
        with pytest.raises(ValueError, match="noise before its last call"):
            plan.transition(0)
        return
    before: tuple[Tensor | None, ...] = (X,) * plan.registers
    ends = [k for k, stage in enumerate(plan.stages) if stage.node is not None]
    for step in plan.execute(DENOISER, X, seed=5):
        if step.stage in ends:
            mean, deviation, stage = plan.transition(ends.index(step.stage))
            assert stage == step.stage
            values = {f"x{i}": register for i, register in enumerate(before)}
            query = plan.stages[stage].query
            values["X"] = sum(c * values[n] for n, c in query.items())  # pyright: ignore
            values["D"] = step.prediction
            z = noise.normal(5, range(3), stage + 1, (5,), torch.float64)
            expected = sum(c * values[n] for n, c in mean.items()) + deviation * z  # pyright: ignore
            torch.testing.assert_close(step.registers[0], expected, rtol=1e-12, atol=1e-12)
        before = step.registers
    for outside in (-1, len(ends)):
        with pytest.raises(ValueError, match=f"steps 0 to {len(ends) - 1}"):
            plan.transition(outside)


def test_ddpm_is_the_posterior_of_the_chain() -> None:
    """Equations 6 and 7 of Denoising Diffusion Probabilistic Models, in its own letters."""
    betas = torch.linspace(1e-4, 0.3, 20, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    plan = ef.solvers.get("ddpm").plan(ef.schedules.Betas(betas), 20)
    for k in range(19):
        i = 19 - k
        mean, deviation, _ = plan.transition(k)
        variance = (1 - bar[i - 1]) / (1 - bar[i]) * betas[i]
        of_x = torch.sqrt(1 - betas[i]) * (1 - bar[i - 1]) / (1 - bar[i])
        of_x0 = torch.sqrt(bar[i - 1]) * betas[i] / (1 - bar[i])
        assert deviation**2 == pytest.approx(variance.item(), rel=1e-8)
        assert mean["x0"] == pytest.approx(of_x.item(), rel=1e-8)
        assert mean["D"] == pytest.approx(of_x0.item(), rel=1e-8)
    assert plan.transition(19) == ({"x0": 0.0, "D": 1.0}, 0.0, 19)


def bdia(nodes: list[float], gamma: float = 0.8) -> Plan:
    """Bi-directional integration: x1 is the state before; each step also looks back."""
    alpha, sigma = COSINE.alpha(torch.tensor(nodes)), COSINE.sigma(torch.tensor(nodes))
    stages = []
    for k in range(len(nodes) - 1):
        a, a_back = sigma[k + 1] / sigma[k], sigma[max(k - 1, 0)] / sigma[k]
        b, b_back = alpha[k + 1] - alpha[k] * a, alpha[max(k - 1, 0)] - alpha[k] * a_back
        look = 0.0 if k == 0 else gamma
        row = {"x1": look, "x0": a - look * a_back, "D": b - look * b_back}
        if k == 0:
            row["x1"], row["x0"] = 0.5, row["x0"] - 0.5  # both registers hold the start
        numbers = {name: float(value) for name, value in row.items()}
        stages.append(Stage(nodes[k], {"x0": 1.0}, (numbers, {"x0": 1.0}), nodes[k + 1]))
    return Plan(COSINE, nodes[0], tuple(stages))


def edict(nodes: list[float], p: float = 0.93) -> Plan:
    """Coupled states that take each other's predictions and are then mixed."""
    alpha, sigma = COSINE.alpha(torch.tensor(nodes)), COSINE.sigma(torch.tensor(nodes))
    stages = []
    for k in range(len(nodes) - 1):
        a = float(sigma[k + 1] / sigma[k])
        b = float(alpha[k + 1] - alpha[k] * a)
        first = ({"x0": a, "D": b}, {"x1": 1.0})
        y = {"x1": a, "D": b}
        mixed = {"X": p, **{name: (1 - p) * c for name, c in y.items()}}
        other = {name: p * y.get(name, 0.0) + (1 - p) * mixed.get(name, 0.0) for name in mixed}
        stages.append(Stage(nodes[k], {"x1": 1.0}, first))
        stages.append(Stage(nodes[k], {"x0": 1.0}, (mixed, other), nodes[k + 1]))
    return Plan(COSINE, nodes[0], tuple(stages))


def check_round_trip(plan: Plan, back: Plan) -> None:
    x = (X, X + 0.1)
    there = plan.run(DENOISER, x)
    for found, expected in zip(back.run(DENOISER, there), x, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scheme", [bdia, edict])
def test_coupled_schemes_are_undone_exactly(scheme: Callable[[list[float]], Plan]) -> None:
    plan = scheme([0.9, 0.7, 0.6, 0.3, 0.2])
    back = plan.reverse()
    assert back.times == plan.times[::-1]
    assert back.nfe == plan.nfe and back.origin["reversed"] is True
    check_round_trip(plan, back)
    check_round_trip(back, plan)
    check_round_trip(plan, Plan.from_config(back.to_config()))
    for site in mutants.sites(back):
        with pytest.raises(AssertionError):
            check_round_trip(plan, mutants.scaled(back, site, mutants.SLIGHTLY))
            pytest.fail(f"{site} survives", pytrace=False)


@pytest.mark.parametrize(
    ("name", "times", "why"),
    [
        ("ddim", [0.5, 0.0], "singular"),
        ("ddim", [0.9, 0.5, 0.1], "implicit"),
        ("dpm-solver++2m", [0.9, 0.5, 0.1], "singular"),
        ("ddpm", [0.9, 0.5, 0.1], "noise"),
        ("edm-churn", [0.9, 0.5, 0.1], "noise"),
    ],
)
def test_what_has_no_explicit_inverse_is_refused(name: str, times: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=rf"stage \d .*{why}"):
        ef.solvers.get(name).plan(COSINE, times=times).reverse()


def test_an_inverse_keeps_the_constant() -> None:
    stage = Stage(0.5, {"x1": 2.0, "1": 0.3}, ({"x0": 0.5, "D": 1.0, "1": -2.0}, {"x1": 1.0}), 0.4)
    plan = Plan(COSINE, 0.5, (stage, replace(stage, time=0.4, node=0.3)))
    check_round_trip(plan, plan.reverse())
