"""DPM-Solver-v3 and the statistics that it is fitted with, against closed forms and limits."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import ebbflow as ef
from ebbflow.plan import Stage
from ebbflow.solvers import DPMSolverV3, Levels
from ebbflow.solvers.multistep import Multistep, polynomial
from tests.laws import cases, reference

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
DEVIATION = torch.tensor([1.1, 0.3], dtype=torch.float64)
COUPLED = torch.tensor([[1.3, 0.5], [0.5, 0.4]], dtype=torch.float64)


def gaussian(covariance: Tensor) -> ef.oracles.GaussianMixture:
    return ef.oracles.GaussianMixture(MEAN[None], covariance[None], torch.ones(1))


def execute(stages: list[Stage], denoiser: ef.Denoiser, x: Tensor) -> Tensor:
    """The rows as written, term by term: no executor of the package."""

    def form(row: Any, values: dict[str, Any]) -> Any:
        return sum(c * values[name] for name, c in row.items()) if row else None

    registers: dict[str, Any] = {f"x{i}": x for i in range(len(stages[0].update))}
    for stage in stages:
        values = registers | {"1": torch.ones_like(x)}
        values["X"] = form(stage.query, values)
        values["D"] = denoiser(values["X"], stage.time)
        registers = {f"x{i}": form(row, values) for i, row in enumerate(stage.update)}
    return registers["x0"]


def compiled(solver: DPMSolverV3, schedule: str, nodes: list[float]) -> list[Stage]:
    return list(solver.stages(Levels.of(cases.SCHEDULES[schedule], nodes)))


def constant(l: float, s: float, b: float) -> ef.ModelStatistics:  # noqa: E741
    return ef.ModelStatistics.constant(l, s, b, (2,))


@functools.cache
def measured(law: str) -> ef.ModelStatistics:
    """On one schedule; the tests use them on all."""
    known = cases.oracle(law)
    denoiser = known.denoiser(cases.SCHEDULES["Cosine"])
    return ef.ModelStatistics.from_model(
        denoiser, known.sample(400), points=60, sigma_max=100.0, batch=400
    )


def ratios(statistics: ef.ModelStatistics) -> Tensor:
    """(sigma/alpha)² at the grid, (P, 1)."""
    return torch.exp(-2 * statistics.lambda_)[:, None]


def test_statistics_of_an_uncoupled_gaussian_are_the_closed_form() -> None:
    known = gaussian(torch.diag(DEVIATION**2))
    for schedule in (ef.schedules.VP(), ef.schedules.Linear()):
        errors = []
        for points in (20, 80):
            found = ef.ModelStatistics.from_model(known.denoiser(schedule), known.sample(4), points)
            noise, data = ratios(found), DEVIATION**2
            total = data + noise
            assert (found.l - noise / total).abs().max() < 1e-12
            assert (found.s == 0).all(), "f does not depend on x: there is no line"
            # f = -noise/total m and d noise / dlambda = -2 noise; the slope of l is the spline's.
            exact = 2 * noise * data / total**2 * MEAN
            inner = slice(points // 4, -points // 4)
            errors.append((found.b - exact)[inner].abs().max().item())
        assert errors[1] < 1e-3 and errors[1] < errors[0] / 20


def test_statistics_of_a_coupled_gaussian_are_the_closed_form() -> None:
    known = gaussian(COUPLED)
    samples = 20_000
    denoiser = known.denoiser(ef.schedules.Cosine())
    found = ef.ModelStatistics.from_model(
        denoiser, known.sample(samples), points=12, sigma_min=0.05, sigma_max=5.0, batch=samples
    )
    slopes = found.at(found.lambda_, derivative=True)[0]
    eye = torch.eye(2, dtype=torch.float64)
    for k, lambda_ in enumerate(found.lambda_.tolist()):
        noise = math.exp(-2 * lambda_)
        total = torch.linalg.inv(COUPLED + noise * eye)
        gain = COUPLED @ total  # D = m + gain (y - m)
        assert (found.l[k] - (1 - gain.diagonal())).abs().max() < 1e-12
        # f = A y + …, and f' = (A' - A (1 - gain)) y + … along the ODE; y ~ N(m, C + noise).
        a = gain.diagonal().diag() - gain
        a_rate = -slopes[k].diag() - 2 * noise * gain @ total
        b = a_rate - a @ (eye - gain)
        spread = COUPLED + noise * eye
        exact = ((b @ spread) * a).sum(1) / ((a @ spread) * a).sum(1)
        offset = a @ MEAN - (eye - gain) @ MEAN  # E f = (1 - l) m - m
        rates = -slopes[k] * MEAN  # E f' = -l' m, since E D and E y' do not move
        assert torch.allclose(offset, -found.l[k] * MEAN)
        assert (found.s[k] - exact).abs().max() < 0.03 * (1 + exact.abs().max())
        assert (found.b[k] - (rates + found.s[k] * found.l[k] * MEAN)).abs().max() < 0.03


def test_statistics_of_a_mixture_are_those_of_quadrature() -> None:
    law = reference.Mixture(
        np.array([[-1.0], [0.8]]), np.array([[[0.04]], [[0.2]]]), np.array([0.4, 0.6])
    )
    known = ef.oracles.GaussianMixture(
        *map(torch.tensor, (law.means, law.covariances, law.weights))
    )
    denoiser = known.denoiser(ef.schedules.VP())
    found = ef.ModelStatistics.from_model(
        denoiser, known.sample(20_000), points=9, sigma_min=0.2, sigma_max=4.0, batch=20_000
    )
    slopes = found.at(found.lambda_, derivative=True)[0, :, 0].tolist()
    y = np.linspace(-25, 25, 20_001)[:, None]

    def clean(y: np.ndarray, lambda_: float) -> np.ndarray:
        return law.posterior_mean(y, 1.0, math.exp(-lambda_))[:, 0]

    for k, lambda_ in enumerate(found.lambda_.tolist()):
        density = np.exp(law.log_density(y, 1.0, math.exp(-lambda_)))
        weight = density / density.sum()
        tiny = 1e-5
        slope = (clean(y + tiny, lambda_) - clean(y - tiny, lambda_)) / (2 * tiny)
        l = 1 - weight @ slope  # noqa: E741
        D = clean(y, lambda_)
        tangent = (D - y[:, 0])[:, None]
        up, down = (clean(y + e * tangent, lambda_ + e) for e in (tiny, -tiny))
        f = (1 - l) * y[:, 0] - D
        rate = (1 - l) * tangent[:, 0] - slopes[k] * y[:, 0] - (up - down) / (2 * tiny)
        mean, mean_rate = weight @ f, weight @ rate
        s = (weight @ (f * rate) - mean * mean_rate) / (weight @ (f * f) - mean**2)
        assert found.l[k].item() == pytest.approx(l, abs=0.02)
        assert found.s[k].item() == pytest.approx(s, abs=0.05 * (1 + abs(s)))
        assert found.b[k].item() == pytest.approx(mean_rate - s * mean, abs=0.05)


def test_many_coordinates_are_probed() -> None:
    """Random signs estimate the diagonal; on a diagonal Jacobian they are exact."""
    scale = torch.linspace(0.2, 2.0, 20, dtype=torch.float64)
    known = ef.oracles.GaussianMixture(
        torch.zeros(1, 20), torch.diag(scale**2)[None], torch.ones(1)
    )
    denoiser = known.denoiser(ef.schedules.Cosine())
    found = ef.ModelStatistics.from_model(denoiser, known.sample(8), points=5)
    noise = ratios(found)
    assert (found.l - noise / (noise + scale**2)).abs().max() < 1e-12


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
@pytest.mark.parametrize("history", (1, 2, 3))
def test_the_data_prediction_s_solver_is_a_limit(history: int, schedule: str) -> None:
    nodes = cases.uneven(7)
    denoiser, x = (
        cases.denoiser("mixture", schedule),
        cases.tensor(cases.start("mixture", schedule)),
    )
    solver = DPMSolverV3.of(constant(1.0, 0.0, 0.0), history, corrector=False)
    plain = Multistep("plain", history, history, "", polynomial, history)
    expected = plain.plan(cases.SCHEDULES[schedule], times=nodes).run(denoiser, x)
    found = execute(compiled(solver, schedule, nodes), denoiser, x)
    assert (found - expected).abs().max() < 1e-11


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_the_noise_prediction_s_solver_is_a_limit(schedule: str) -> None:
    """`x_t = alpha_t/alpha_s x_s - alpha_t ∫ e^{-lambda} eps dlambda`, eps a line through the last
    two values; the integrals by an adaptive rule."""
    nodes = cases.uneven(7)
    denoiser, x = (
        cases.denoiser("mixture", schedule),
        cases.tensor(cases.start("mixture", schedule)),
    )
    levels = Levels.of(cases.SCHEDULES[schedule], nodes)
    lam, state, past = levels.lambda_, x, None
    for k, (t, _) in enumerate(pairwise(nodes)):
        now = (state - levels.alpha[k] * denoiser(state, t)) / levels.sigma[k]

        def moment(power: int, k: int = k) -> float:
            start = lam[k]
            return quad(lambda u: math.exp(-u) * (u - start) ** power, start, lam[k + 1])[0]

        total = moment(0) * now
        if past is not None:
            total = total + moment(1) * (now - past) / (lam[k] - lam[k - 1])
        state = levels.alpha[k + 1] * (state / levels.alpha[k] - total)
        past = now
    solver = DPMSolverV3.of(constant(0.0, -1.0, 0.0), 2, corrector=False)
    found = execute(compiled(solver, schedule, nodes), denoiser, x)
    assert (found - state).abs().max() < 1e-9 * state.abs().max()


def exact_statistics(points: int) -> ef.ModelStatistics:
    """Of the uncoupled Gaussian, in closed form."""
    lambda_ = torch.linspace(-5, 7, points, dtype=torch.float64)
    noise, data = torch.exp(-2 * lambda_)[:, None], DEVIATION**2
    l = noise / (noise + data)  # noqa: E741
    b = 2 * noise * data / (noise + data) ** 2 * MEAN
    return ef.ModelStatistics(lambda_, l, torch.zeros_like(l), b)


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_one_step_is_exact_on_a_gaussian(schedule: str) -> None:
    known = gaussian(torch.diag(DEVIATION**2))
    denoiser = known.denoiser(cases.SCHEDULES[schedule])
    nodes = [0.9, 0.1]
    levels = Levels.of(cases.SCHEDULES[schedule], nodes)
    x = torch.randn(6, 2, dtype=torch.float64) * 2
    spread = [
        torch.sqrt(a**2 * DEVIATION**2 + s**2)
        for a, s in zip(levels.alpha, levels.sigma, strict=True)
    ]
    exact = levels.alpha[1] * MEAN + (x - levels.alpha[0] * MEAN) / spread[0] * spread[1]
    found = {}
    for points in (50, 400):
        solver = DPMSolverV3.of(exact_statistics(points), 1, corrector=False)
        found[points] = (
            (execute(compiled(solver, schedule, nodes), denoiser, x) - exact).abs().max()
        )
    assert found[400] < 1e-6 and found[400] < found[50] / 50
    (stage,) = compiled(DPMSolverV3.of(exact_statistics(400), 1, corrector=False), schedule, nodes)
    for name in stage.update[0]:
        row = {**stage.update[0], name: stage.update[0][name] * (1 + 1e-3)}
        wrong = execute([Stage(stage.time, stage.query, (row,), stage.node)], denoiser, x)
        assert (wrong - exact).abs().max() > 1e-5, name


def slopes(solver: DPMSolverV3, schedule: str, law: str, change=None) -> float:
    denoiser, x = cases.denoiser(law, schedule), cases.tensor(cases.start(law, schedule))
    errors = []
    for n in (48, 96):
        stages = compiled(solver, schedule, cases.interior(n))
        stages = [change(s) for s in stages] if change else stages
        errors.append(
            np.linalg.norm(execute(stages, denoiser, x).numpy() - cases.exact_end(law, schedule))
        )
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
@pytest.mark.parametrize(
    ("history", "corrector"), ((1, False), (1, True), (2, False), (2, True), (3, True))
)
def test_the_stated_order_is_observed(history: int, corrector: bool, schedule: str) -> None:
    solver = DPMSolverV3.of(measured("mixture"), history, corrector)
    assert slopes(solver, schedule, "mixture") > solver.order - 0.25


def test_a_wrong_coefficient_loses_the_order() -> None:
    """All but the constant, which is of the error's own order: one step on a Gaussian sees it."""
    solver = DPMSolverV3.of(measured("mixture"))
    names = {"x0.D", "x0.X", "x0.x1", "x0.x3", "x1.X", "x1.D", "x3.x3", "x3.D", "x3.x1"}
    seen = set()
    for site in sorted(names):
        register, name = site.split(".")
        place = int(register[1:])

        def change(stage: Stage, place: int = place, name: str = name) -> Stage:
            row = dict(stage.update[place])
            if name in row:
                seen.add(f"x{place}.{name}")
                row[name] = row[name] * (1 + 1e-3)
            update = (*stage.update[:place], row, *stage.update[place + 1 :])
            return Stage(stage.time, stage.query, update, stage.node)

        assert slopes(solver, "Linear", "mixture", change) < solver.order - 0.25, site
    assert seen == names


def test_fewer_errors_than_the_data_prediction_s_solver_at_few_steps() -> None:
    plain = ef.solvers.get("dpm-solver++2m")
    solver = DPMSolverV3.of(measured("mixture"))
    for schedule in cases.SCHEDULES:
        denoiser = cases.denoiser("mixture", schedule)
        x, exact = (
            cases.tensor(cases.start("mixture", schedule)),
            cases.exact_end("mixture", schedule),
        )
        nodes = cases.interior(10)
        ours = execute(compiled(solver, schedule, nodes), denoiser, x).numpy() - exact
        theirs = plain.plan(denoiser.schedule, times=nodes).run(denoiser, x).numpy() - exact
        assert np.linalg.norm(ours) < 0.7 * np.linalg.norm(theirs)


def test_whole_runs_start_and_end_at_the_ends() -> None:
    for name, schedule in cases.SCHEDULES.items():
        denoiser = cases.oracle("mixture").denoiser(schedule)
        x = torch.randn(4, 2, dtype=torch.float64) * schedule.sigma(1.0).item()
        for history, corrector in ((1, True), (2, False), (3, True)):
            solver = DPMSolverV3.of(measured("mixture"), history, corrector)
            ends = []
            for n in (20, 60):
                nodes = ef.grids.angle(schedule, n)
                ends.append(execute(compiled(solver, name, list(nodes)), denoiser, x))
            assert torch.isfinite(ends[1]).all()
            assert (ends[0] - ends[1]).abs().max() < 0.2


def test_the_plan_runs_as_its_rows_say(tmp_path: Path) -> None:
    schedule = cases.SCHEDULES["Linear"]
    denoiser = cases.oracle("mixture").denoiser(schedule)
    solver = DPMSolverV3.of(measured("mixture"))
    x = torch.randn(3, 2, dtype=torch.float64)
    plan = solver.plan(schedule, 12)
    assert plan.nfe == 12
    rows = execute(list(plan.stages), denoiser, x)
    end = plan.run(denoiser, x)
    assert (end - rows).abs().max() < 1e-11
    assert torch.equal(ef.sample(denoiser, (3, 2), solver=solver, steps=12, x_init=x), end)
    plan.save(tmp_path / "plan.json")
    assert torch.equal(ef.Plan.load(tmp_path / "plan.json").run(denoiser, x), plan.run(denoiser, x))
    at_once = ef.parallel(denoiser, (3, 2), plan=plan, x_init=x, tolerance=0.0)
    assert (at_once.samples - rows).abs().max() < 1e-11


def test_files_round_trip_and_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    known = exact_statistics(12)
    path = tmp_path / "statistics.safetensors"
    known.save(path)
    again = ef.ModelStatistics.load(path)
    for name in ("lambda_", "l", "s", "b"):
        assert torch.equal(getattr(again, name), getattr(known, name))
    save_file({"l": known.l.contiguous()}, path)
    with pytest.raises(ValueError, match="expected lambda"):
        ef.ModelStatistics.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="safetensors"):
        ef.ModelStatistics.load(path)


def test_mistakes_are_refused() -> None:
    known = exact_statistics(12)
    with pytest.raises(ValueError, match="history"):
        DPMSolverV3.of(known, 4)
    with pytest.raises(ValueError, match=r"ModelStatistics\.from_model"):
        list(DPMSolverV3("v3", 3, 3, "").stages(Levels.of(ef.schedules.Cosine(), [0.9, 0.1])))
    with pytest.raises(ValueError, match="rising"):
        ef.ModelStatistics(known.lambda_.flip(0), known.l, known.s, known.b)
    with pytest.raises(ValueError, match="expected"):
        ef.ModelStatistics(known.lambda_, known.l, known.s[:, :1], known.b)
    with pytest.raises(ValueError, match="infinite"):
        ef.ModelStatistics(known.lambda_, known.l * math.inf, known.s, known.b)
