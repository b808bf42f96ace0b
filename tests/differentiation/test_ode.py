from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ebbflow.differentiation import methods, odeint
from ebbflow.differentiation.methods import METHODS, Coupled, Method
from tests.differentiation.problems import START, coupled, exact, slope

EXPLICIT = [m for m in METHODS.values() if type(m) is methods.RungeKutta]
ALL = [*METHODS.values(), *(Coupled.around(m) for m in EXPLICIT)]


def observed(method: Method, sizes: tuple[int, ...], start: float, end: float) -> float:
    errors = []
    for n in sizes:
        y = odeint(coupled, exact(start), [start, end], method=method, steps=n)[-1]
        errors.append(float((y - exact(end)).norm()))
    return slope(errors)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_the_stated_order_is_the_observed_one(method: Method):
    # Where the leading error term leads, above rounding: the fifth-order pairs have small ones.
    start, end = (-1.0, 0.0) if method.name == "dopri5" else (0.0, 0.5)
    sizes = (20, 40) if method.name in ("kvaerno3", "esdirk4") else (40, 80)
    assert observed(method, sizes, start, end) == pytest.approx(method.order, abs=0.15)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_per_sample_steps_have_the_same_order_and_values(method: Method):
    ends = torch.tensor([0.9, 1.5], dtype=torch.float64)
    t = torch.stack([torch.zeros(2, dtype=torch.float64), ends])
    both = odeint(coupled, START.expand(2, 3), t, method=method, steps=8, batch_dims=1)[-1]
    for i in range(2):
        alone = odeint(coupled, START, [0.0, float(ends[i])], method=method, steps=8)[-1]
        torch.testing.assert_close(both[i], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5", "esdirk4"])
def test_adaptive_solutions_and_their_dense_output_keep_the_tolerance(name: str, backwards: bool):
    t = torch.linspace(0, 1.5, 40, dtype=torch.float64)
    y0 = START
    if backwards:
        t, y0 = t.flip(0), exact(1.5)
    truth = torch.stack([exact(float(x)) for x in t])
    errors = []
    for rtol in (1e-4, 1e-6):
        run = odeint(coupled, y0, t, method=name, rtol=rtol, atol=rtol, full=True)
        assert run.status == "done" and run.t == float(t[-1])
        # More outputs than steps: most of them are interpolated.
        assert rtol < 1e-5 or run.steps < 45
        errors.append(float((run.ys - truth).abs().max()))
        # Each step is within it; backwards the equation magnifies what is left.
        assert errors[-1] < 100 * rtol
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5", "esdirk4"])
def test_the_interpolant_is_as_accurate_as_it_states(name: str):
    from ebbflow.differentiation.fields import Field, Structure

    method = METHODS[name]
    assert isinstance(method, methods.RungeKutta)
    errors = []
    for h in (0.1, 0.05):
        f = Field(coupled, Structure(START, 0))
        step = method.step(f, 0.3, h, method.start(f, 0.3, exact(0.3)))
        assert step.dense is not None
        errors.append(float((step.dense(0.4) - exact(0.3 + 0.4 * h)).norm()))
    assert slope(errors) > method.tableau.dense_order + 1 - 0.4


def test_the_error_estimate_is_the_leading_term_on_a_linear_equation():
    """For y' = λy the estimate is a polynomial in z = λh that starts at z^(q + 1)."""
    from ebbflow.differentiation.fields import Field, Structure

    for name, q in (("bosh3", 2), ("dopri5", 4), ("tsit5", 4), ("reversible-heun", 1), ("alf", 1)):
        method = METHODS[name]
        y = torch.ones(1, dtype=torch.float64)
        sizes = []
        for h in (0.02, 0.01):
            f = Field(lambda t, y: -y, Structure(y, 0))
            error = method.step(f, 0.0, h, method.start(f, 0.0, y)).error
            assert error is not None
            sizes.append(float(error.abs()))
        assert slope(sizes) == pytest.approx(q + 1, abs=0.1)


@pytest.mark.parametrize("name", ["kvaerno3", "esdirk4"])
def test_an_implicit_pair_takes_few_steps_where_an_explicit_one_is_held_back(name: str):
    """Prothero's and Robinson's problem, y' = λ(y - cos t) - sin t, y = cos t, with λ = -1e5."""

    def stiff(t: Tensor, y: Tensor) -> Tensor:
        return -1e5 * (y - torch.cos(t)) - torch.sin(t)

    y0 = torch.ones(1, dtype=torch.float64)
    run = odeint(stiff, y0, [0.0, 1.0], method=name, rtol=1e-5, atol=1e-7, full=True)
    assert abs(float(run.ys[-1]) - math.cos(1.0)) < 1e-4
    assert run.steps < 60
    capped = odeint(stiff, y0, [0.0, 1.0], rtol=1e-5, atol=1e-7, max_steps=200, full=True)
    assert capped.status == "max_steps" and capped.t < 0.02


@pytest.mark.parametrize("name", ["esdirk4", "dopri5"])
def test_van_der_pol_agrees_with_scipy(name: str):
    scipy = pytest.importorskip("scipy.integrate")

    def f(t: Any, y: Any) -> list[Any]:
        return [y[1], 20 * ((1 - y[0] ** 2) * y[1]) - y[0]]

    truth = scipy.solve_ivp(f, (0, 3), [2.0, 0.0], method="Radau", rtol=1e-10, atol=1e-12).y[:, -1]
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    end = odeint(lambda t, y: torch.stack(f(t, y)), y0, [0.0, 3.0], method=name, rtol=1e-7)[-1]
    torch.testing.assert_close(end, torch.from_numpy(truth), rtol=1e-5, atol=1e-5)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return y[..., 1:] * torch.cat([-y[..., :1], torch.zeros_like(y[..., :1])], -1)


@pytest.mark.parametrize("compact", [False, True])
def test_a_stiff_sample_costs_its_neighbours_nothing(compact: bool):
    rates = torch.tensor([1.0, 500.0, 2.0], dtype=torch.float64)
    seen: list[int] = []

    def f(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        seen.append(y.shape[0])
        assert t.shape == (y.shape[0], 1)
        return -(rates if rows is None else rates[rows])[:, None] * (y - torch.cos(t))

    y0 = torch.ones(3, 1, dtype=torch.float64)
    run = odeint(f, y0, [0.0, 1.0], batch_dims=1, compact=compact, full=True, rtol=1e-5)
    for i in range(3):
        alone = odeint(
            lambda t, y, i=i: -rates[i] * (y - torch.cos(t)),
            y0[i],
            [0.0, 1.0],
            rtol=1e-5,
            full=True,
        )
        assert int(run.steps[i]) == alone.steps
        assert int(run.evaluations[i]) == alone.evaluations
        torch.testing.assert_close(run.ys[:, i], alone.ys, rtol=1e-12, atol=1e-12)
    assert int(run.evaluations[0]) < int(run.evaluations[1]) / 10
    if compact:
        # What is reported is what was evaluated.
        assert sum(seen) == int(run.evaluations.sum())


def test_each_sample_has_its_own_status_and_last_state():
    rates = torch.tensor([1.0, 3000.0], dtype=torch.float64)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -rates[:, None] * (y - torch.cos(t))

    y0 = torch.ones(2, 1, dtype=torch.float64)
    run = odeint(f, y0, [0.0, 0.5, 1.0], batch_dims=1, max_steps=60, full=True)
    assert run.status == ["done", "max_steps"]
    assert run.t[0] == 1.0 and run.t[1] < 0.5
    assert torch.equal(run.ys[1, 1], run.ys[2, 1]) and not torch.equal(run.ys[1, 0], run.ys[2, 0])


def test_a_solution_that_blows_up_is_reported(caplog: pytest.LogCaptureFixture):
    y0 = torch.ones(1, dtype=torch.float64)
    run = odeint(lambda t, y: y * y, y0, [0.0, 2.0], full=True)
    assert run.status == "stuck" and run.t == pytest.approx(1.0, abs=1e-3)
    odeint(lambda t, y: y * y, y0, [0.0, 2.0])
    assert "stuck" in caplog.text


def test_nested_states_solve_like_their_parts():
    y0 = {"p": START, "rest": (START[:2].float().reshape(1, 2), [START.reshape(3, 1)])}

    def f(t: Tensor, y: Any) -> Any:
        a, (b,) = y["rest"]
        assert a.dtype == torch.float32 and b.shape == (3, 1)
        return {"p": coupled(t, y["p"]), "rest": (-a, [coupled(t, b[:, 0])[:, None]])}

    ys = odeint(f, y0, [0.0, 0.5, 1.5], rtol=1e-8)
    assert ys["p"].shape == (3, 3) and ys["rest"][0].shape == (3, 1, 2)
    torch.testing.assert_close(ys["p"][-1], exact(1.5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ys["rest"][1][0][-1, :, 0], exact(1.5), rtol=1e-6, atol=1e-6)
    end = ys["rest"][0][-1, 0].double()
    torch.testing.assert_close(end, START[:2] * math.exp(-1.5), rtol=1e-5, atol=1e-6)


def test_complex_states():
    y0 = torch.tensor([1.0 + 0j], dtype=torch.complex128)
    end = odeint(lambda t, y: 1j * y, y0, [0.0, 1.0], rtol=1e-9)[-1]
    assert abs(complex(end) - complex(math.cos(1), math.sin(1))) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_states_that_cannot_hold_a_step_are_refused(dtype: torch.dtype):
    with pytest.raises(TypeError, match=r"y0\.float\(\)"):
        odeint(lambda t, y: -y, torch.ones(2, dtype=dtype), [0.0, 1.0])


def test_a_network_in_half_precision_keeps_the_state_in_single():
    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y.bfloat16()

    end = odeint(f, torch.ones(1), [0.0, 1.0], method="rk4", steps=1000)[-1]
    assert end.dtype == torch.float32
    assert float(end) == pytest.approx(math.exp(-1), abs=2e-3)


def test_arguments_out_of_range_say_what_is_in_range():
    y0 = torch.ones(2)
    cases: list[tuple[str, Any]] = [
        ("dopri5", {"method": "rk45"}),
        ("checkpoint", {"gradient": "none"}),
        ("batch_dims", {"batch_dims": 2}),
        ("not both", {"steps": 2, "step_size": 0.1}),
        ("at least 1", {"steps": 0}),
        ("positive", {"step_size": -1.0}),
        ("rtol", {"rtol": -1.0}),
        ("batch_dims=1", {"compact": True}),
        ("checkpoint", {"method": "esdirk4", "gradient": "adjoint"}),
    ]
    for match, arguments in cases:
        with pytest.raises(ValueError, match=match):
            odeint(lambda t, y: -y, y0, [0.0, 1.0], **arguments)
    for t in ([0.0], [0.0, 0.0], [0.0, 1.0, 0.5], [0.0, math.nan], 1.0):
        with pytest.raises(ValueError, match="t must"):
            odeint(lambda t, y: -y, y0, t)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        odeint(lambda t, y: y[:1], y0, [0.0, 1.0])
    with pytest.raises(TypeError, match="explicit"):
        odeint(lambda t, y: -y, y0, [0.0, 1.0], method="esdirk4", gradient="reversible")
