"""Plans whose coefficients differ by coordinate, in a basis: they are the plans they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.bases import Basis, cosines
from ebbflow.plan import Plan, Row, Stage
from ebbflow.schedules import Schedule

COSINE = ef.schedules.Cosine()
NODES = [0.95, 0.7, 0.4, 0.1, 0.0]


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


BASES = {
    "identity": lambda: Basis("identity", (2, 3, 4)),
    "cosine": lambda: Basis("cosine", (2, 3, 4)),
    "matrix": lambda: Basis("matrix", (24,), rotation(24)),
}


def lifted(plan: Plan, basis: Basis) -> Plan:
    """The same machine written with one number a coordinate."""

    def row(values: Row) -> Row:
        return {n: torch.full(basis.shape, v, dtype=torch.float64) for n, v in values.items()}

    stages = tuple(
        Stage(s.time, row(s.query), tuple(row(r) for r in s.update), s.node) for s in plan.stages
    )
    return replace(plan, stages=stages, basis=basis)


def denoiser(schedule: Schedule) -> ef.Denoiser:
    return ef.Denoiser(lambda x, t: torch.tanh(x + t[0].item()), schedule)


@pytest.mark.parametrize("basis", BASES)
def test_coordinates_are_orthonormal_and_invert(basis: str) -> None:
    axes, x = BASES[basis](), torch.randn(5, 2, 3, 4, dtype=torch.float64)
    z = axes.forward(x)
    torch.testing.assert_close(axes.inverse(z, x.shape), x)
    torch.testing.assert_close(z.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert axes == axes and axes != Basis("cosine", (1, 3, 4))


def test_cosines_of_a_wave_are_one_coefficient() -> None:
    i = torch.arange(8, dtype=torch.float64)
    wave = torch.cos(torch.pi / 8 * (i + 0.5) * 3)
    z = cosines(wave.expand(1, 1, 8, 8))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[0, 3] = wave.norm() * 8**0.5
    torch.testing.assert_close(z[0, 0], expected)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", ["dpm-solver++3m", "heun"])
def test_a_plan_in_a_basis_is_the_plan_itself(name: str, basis: str) -> None:
    plain = ef.solvers.get(name).plan(COSINE, times=NODES)
    plan = lifted(plain, BASES[basis]())
    x = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    model = denoiser(COSINE)
    torch.testing.assert_close(plan.run(model, x), plain.run(model, x), rtol=1e-12, atol=1e-12)
    ours, theirs = (list(p.execute(model, x)) for p in (plan, plain))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.prediction, two.prediction, rtol=1e-12, atol=1e-12)
        assert (one.state is None) == (two.state is None)
        if one.state is not None:
            torch.testing.assert_close(one.state, two.state, rtol=1e-12, atol=1e-12)
    single = plan.run(model, x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), plain.run(model, x), rtol=1e-4, atol=1e-5)


def test_coordinates_have_their_own_coefficients() -> None:
    """One stage by hand: Q diag(a) Qᵀ x + Q diag(b) Qᵀ D + Q c."""
    q, a, b, c = rotation(4), *torch.randn(3, 4, dtype=torch.float64)
    stage = Stage(0.5, {"x0": a}, ({"x0": b, "D": a * b, "1": c},), 0.25)
    plan = Plan(COSINE, 0.5, (stage,), basis=Basis("matrix", (4,), q))
    x = torch.randn(3, 4, dtype=torch.float64)
    clean = torch.tanh(x @ q @ torch.diag(a) @ q.T + 0.5)
    expected = x @ q @ torch.diag(b) @ q.T + clean @ q @ torch.diag(a * b) @ q.T + q @ c
    torch.testing.assert_close(plan.run(denoiser(COSINE), x), expected)


@pytest.mark.parametrize("name", ["dpm-solver++2m", "ddpm"])
def test_moments_and_dense_agree_with_the_plan_itself(name: str) -> None:
    plain = ef.solvers.get(name).plan(COSINE, times=NODES)
    q, variance = rotation(3), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    plan = lifted(plain, Basis("matrix", (3,), q))
    mean, covariance = torch.randn(3, dtype=torch.float64), q @ torch.diag(variance) @ q.T
    for one, two in zip(
        plan.moments(mean, covariance), plain.moments(mean, covariance), strict=True
    ):
        torch.testing.assert_close(one, two)
    for part, whole in zip(vars(plan.dense()).values(), vars(plain.dense()).values(), strict=True):
        torch.testing.assert_close(part, whole[..., None].expand_as(part))
    with pytest.raises(ValueError, match="not diagonal in the plan's basis"):
        plan.moments(mean, covariance + 0.1 * torch.ones(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("basis", BASES)
def test_a_file_holds_the_tensors_beside_it(basis: str, tmp_path: Path) -> None:
    plan = lifted(ef.solvers.get("dpm-solver++2m").plan(COSINE, times=NODES), BASES[basis]())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan != lifted(ef.solvers.get("ddim").plan(COSINE, times=NODES), BASES[basis]())
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"plan\.safetensors is missing"):
        Plan.load(tmp_path / "plan.json")


def test_what_does_not_fit_is_refused() -> None:
    row = {"x0": torch.ones(3, dtype=torch.float64)}
    stage = Stage(0.5, row, ({"D": 1.0},), 0.25)
    with pytest.raises(ValueError, match=r"shape \(3,\); a basis of shape None"):
        Plan(COSINE, 0.5, (stage,))
    with pytest.raises(ValueError, match=r"shape \(3,\); a basis of shape \(4,\)"):
        Plan(COSINE, 0.5, (stage,), basis=Basis("identity", (4,)))
    bad = {"x0": torch.tensor([1.0, float("nan"), 0.0], dtype=torch.float64)}
    with pytest.raises(ValueError, match="not finite"):
        Plan(COSINE, 0.5, (replace(stage, query=bad),), basis=Basis("identity", (3,)))
    with pytest.raises(ValueError, match="orthonormal"):
        Basis("matrix", (2,), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    plan = Plan(COSINE, 0.5, (stage,), basis=Basis("identity", (3,)))
    with pytest.raises(ValueError, match="basis is not reversed"):
        plan.reverse()


def test_a_network_that_breaks_is_located() -> None:
    plan = lifted(ef.solvers.get("ddim").plan(COSINE, times=NODES), Basis("identity", (3,)))
    broken = ef.Denoiser(lambda x, t: x / (t[0] - 0.4), COSINE)
    with pytest.raises(ef.NonFinite, match=r"step 3 of 4, t = 0\.4"):
        plan.run(broken, torch.randn(2, 3))
