"""Endpoints of the families against their published updates, written out on whole arrays.

Polynomials are fitted here by linear solves and integrated by quadrature, where the library expands
Lagrange's form: the two share no formula. This folder's other files compare with other libraries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.schedules import Schedule
from tests.parity.problem import agree, denoiser, levels, ours, start
from tests.parity.test_formulas import CHAIN, SCHEDULES, TIMES

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(60)


def eps_at(schedule: Schedule, x: Tensor, t: float) -> Tensor:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (x - alpha * denoiser(schedule)(x, t)) / sigma


def integrals(
    schedule: Schedule, variable: Callable[[Tensor], Tensor], nodes: list[float], ends: list[float]
) -> list[float]:
    """∫ l_j d(sigma/alpha) over a step, by quadrature in lambda and a Vandermonde solve."""
    lambda_ = schedule.log_snr(torch.tensor(ends, dtype=torch.float64)) / 2
    half = (lambda_[1] - lambda_[0]) / 2
    inner = lambda_[0] + half * (torch.tensor(POINTS) + 1)
    measure = -half * torch.tensor(WEIGHTS) * torch.exp(-inner)
    u = variable(schedule.time(2 * inner))
    at = variable(torch.tensor(nodes, dtype=torch.float64))
    u, at = (u - at[0]) / (at[0] - u[-1]), (at - at[0]) / (at[0] - u[-1])
    powers = torch.arange(len(nodes))[:, None]
    moments = (measure * u**powers).sum(1)
    return torch.linalg.solve(at**powers, moments).tolist()


def adams(schedule: Schedule, variable: Callable[[Tensor], Tensor], history: int) -> Tensor:
    x, past = start(schedule, TIMES[0]), []
    alpha, _ = levels(schedule, TIMES)
    for k in range(len(TIMES) - 1):
        past = [eps_at(schedule, x, TIMES[k]), *past][:history]
        nodes = [TIMES[k - j] for j in range(len(past))]
        weights = integrals(schedule, variable, nodes, [TIMES[k], TIMES[k + 1]])
        step = torch.stack([w * e for w, e in zip(weights, past, strict=True)]).sum(0)
        x = alpha[k + 1] * (x / alpha[k] + step)
    return x


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("name", "variable", "history"),
    [
        ("deis-tab1", "t", 2),
        ("deis-tab2", "t", 3),
        ("deis-tab3", "t", 4),
        ("deis-rhoab1", "rho", 2),
        ("deis-rhoab2", "rho", 3),
        ("deis-rhoab3", "rho", 4),
        ("deis-logrhoab1", "lambda", 2),
        ("dpm-solver-3m", "lambda", 3),
    ],
)
def test_adams(name: str, variable: str, history: int, schedule: Schedule) -> None:
    """DEIS, equations 14-15; multistep DPM-Solver with the exact integral."""
    variables: dict[str, Callable[[Tensor], Tensor]] = {
        "t": lambda t: t,
        "rho": lambda t: schedule.sigma(t) / schedule.alpha(t),
        "lambda": lambda t: schedule.log_snr(t) / 2,
    }
    solver = ef.solvers.get(name, corrected_start=False)
    agree(ours(solver, schedule, TIMES), adams(schedule, variables[variable], history))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_dpm_solver_2m(schedule: Schedule) -> None:
    """The noise form of 2M: `-sigma' (e^h - 1) (eps + (eps - eps_old) / 2r)`."""
    alpha, sigma = levels(schedule, TIMES)
    lambda_ = torch.log(alpha / sigma)
    x, old = start(schedule, TIMES[0]), None
    for k in range(len(TIMES) - 1):
        eps, h = eps_at(schedule, x, TIMES[k]), lambda_[k + 1] - lambda_[k]
        e = eps
        if old is not None:
            e = eps + (eps - old) * h / (2 * (lambda_[k] - lambda_[k - 1]))
        x = alpha[k + 1] / alpha[k] * x - sigma[k + 1] * torch.expm1(h) * e
        old = eps
    agree(ours(ef.solvers.get("dpm-solver-2m"), schedule, TIMES), x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("name", "calls", "noise"),
    [
        ("dpm-solver-2", 2, True),
        ("dpm-solver-3", 3, True),
        ("dpm-solver++2s", 2, False),
        ("dpm-solver++3s", 3, False),
    ],
)
def test_singlestep(name: str, calls: int, noise: bool, schedule: Schedule) -> None:
    """DPM-Solver, algorithms 1 and 2, with r = 1/2 and (1/3, 2/3); DPM-Solver++ in data."""
    x = start(schedule, TIMES[0])

    def predict(x: Tensor, t: float) -> Tensor:
        return eps_at(schedule, x, t) if noise else denoiser(schedule)(x, t)

    for k in range(len(TIMES) - 1):
        lambda_ = schedule.log_snr(torch.tensor(TIMES[k : k + 2], dtype=torch.float64)) / 2
        h = (lambda_[1] - lambda_[0]).item()
        parts = [j / calls for j in range(1, calls)]
        inner = [schedule.time(2 * (lambda_[0] + r * h)).item() for r in parts]
        alpha, sigma = levels(schedule, [TIMES[k], *inner, TIMES[k + 1]])
        keep, scale, z = (alpha, sigma, h) if noise else (sigma, alpha, -h)
        first = predict(x, TIMES[k])
        u, difference = torch.zeros_like(x), torch.zeros_like(x)
        for i, r in enumerate([*parts, 1.0], start=1):
            u = keep[i] / keep[0] * x - scale[i] * np.expm1(r * z) * first
            if i > 1 and calls == 2:
                u = u - scale[i] * np.expm1(z) / (2 * parts[0]) * difference
            elif i > 1:
                factor = r / parts[i - 2] * (np.expm1(r * z) / (r * z) - 1)
                u = u - scale[i] * factor * difference
            if i < calls:
                difference = predict(u, inner[i - 1]) - first
        x = u
    agree(ours(ef.solvers.get(name), schedule, TIMES), x)


TABLEAUX = {
    "deis-rho-midpoint": ([0.5], [[0.5], [0, 1]]),
    "deis-rho-kutta3": ([0.5, 1], [[0.5], [-1, 2], [1 / 6, 2 / 3, 1 / 6]]),
    "deis-rho-rk4": ([0.5, 0.5, 1], [[0.5], [0, 0.5], [0, 0, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]]),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", TABLEAUX)
def test_runge_kutta_in_rho(name: str, schedule: Schedule) -> None:
    """The classical methods on dy/d rho = eps with y = x/alpha."""
    parts, rows = TABLEAUX[name]
    alpha, sigma = levels(schedule, TIMES)
    rho, y = sigma / alpha, start(schedule, TIMES[0]) / alpha[0]

    def slope(y: Tensor, r: Tensor) -> Tensor:
        t = schedule.time(-2 * torch.log(r)).item()
        return eps_at(schedule, schedule.alpha(t) * y, t)

    for k in range(len(TIMES) - 1):
        step = rho[k + 1] - rho[k]
        slopes = [slope(y, rho[k])]
        for part, row in zip(parts, rows, strict=False):
            moved = torch.stack([a * s for a, s in zip(row, slopes, strict=True)]).sum(0)
            slopes.append(slope(y + step * moved, rho[k] + part * step))
        y = y + step * torch.stack([a * s for a, s in zip(rows[-1], slopes, strict=True)]).sum(0)
    agree(ours(ef.solvers.get(name), schedule, TIMES), alpha[-1] * y)


CONSTANT = {
    1: [1.0],
    2: [1.5, -0.5],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def pseudo(schedule: Schedule, times: tuple[float, ...], history: int, kind: str) -> Tensor:
    """PNDM with its start ("pndm"), or with weights that grow with the past ("improved")."""
    x, past = start(schedule, times[0]), []

    def move(x: Tensor, e: Tensor, t: float, s: float) -> Tensor:
        (a, b), (c, d) = levels(schedule, [t, s])
        return b / a * x + (d - b / a * c) * e

    for k in range(len(times) - 1):
        t, s = times[k], times[k + 1]
        e = first = eps_at(schedule, x, t)
        if kind == "pndm" and history == 2 and k == 0:
            e = (first + eps_at(schedule, move(x, first, t, s), s)) / 2
        elif kind == "pndm" and history == 4 and k < 3:
            m = (t + s) / 2
            e2 = eps_at(schedule, move(x, first, t, m), m)
            e3 = eps_at(schedule, move(x, e2, t, m), m)
            e4 = eps_at(schedule, move(x, e3, t, s), s)
            e = (first + 2 * e2 + 2 * e3 + e4) / 6
        else:
            seen = [first, *past][:history]
            e = torch.stack([w * v for w, v in zip(CONSTANT[len(seen)], seen, strict=True)]).sum(0)
        past = [first, *past]
        x = move(x, e, t, s)
    return x


@pytest.mark.parametrize("schedule", [*SCHEDULES, CHAIN], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("name", "history", "kind"),
    [
        ("s-pndm", 2, "pndm"),
        ("f-pndm", 4, "pndm"),
        ("ipndm2", 2, "improved"),
        ("ipndm3", 3, "improved"),
        ("ipndm4", 4, "improved"),
    ],
)
def test_pndm(name: str, history: int, kind: str, schedule: Schedule) -> None:
    """Pseudo Numerical Methods for Diffusion Models on Manifolds, equations 9 to 13."""
    theirs = pseudo(schedule, TIMES, history, kind)
    agree(ours(ef.solvers.get(name), schedule, TIMES), theirs)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("history", [2, 3, 4])
def test_no_momentum_is_ipndm(history: int, schedule: Schedule) -> None:
    plain = ours(ef.solvers.get(f"ghvb{history}", damping=1.0), schedule, TIMES)
    agree(plain, ours(ef.solvers.get(f"ipndm{history}"), schedule, TIMES))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_heavy_ball(schedule: Schedule) -> None:
    """Diffusion Sampling with Momentum …, equation 11: y moves by the damped mean of eps."""
    alpha, sigma = levels(schedule, TIMES)
    y, v = start(schedule, TIMES[0]) / alpha[0], None
    for k in range(len(TIMES) - 1):
        eps = eps_at(schedule, alpha[k] * y, TIMES[k])
        v = eps if v is None else 0.2 * v + 0.8 * eps
        y = y + (sigma[k + 1] / alpha[k + 1] - sigma[k] / alpha[k]) * v
    agree(ours(ef.solvers.get("heavy-ball"), schedule, TIMES), alpha[-1] * y)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("form", ["b1", "b2"])
@pytest.mark.parametrize("history", [2, 3])
def test_unipc(history: int, form: str, schedule: Schedule) -> None:
    """UniPC, algorithms 1 and 2, by its linear systems R a = b in the paper's letters."""
    alpha, sigma = levels(schedule, TIMES)
    lambda_, f = torch.log(alpha / sigma), denoiser(schedule)
    x, past = start(schedule, TIMES[0]), []

    def system(r: list[float], hh: float, big: float, pinned: float) -> list[float]:
        """a with sum_m a_m r_m^(n-1) = n! hh phi_{n+1}(hh) / B; one unknown is pinned at 1/2."""
        if len(r) == 1:
            return [pinned]
        rows, right = [], []
        value, factorial = np.expm1(hh) / hh - 1, 1.0
        for n in range(1, len(r) + 1):
            rows.append([v ** (n - 1) for v in r])
            right.append(value * factorial / big)
            factorial *= n + 1
            value = value / hh - 1 / factorial
        return np.linalg.solve(rows, right).tolist()

    def combined(weights: list[float], terms: list[Tensor]) -> Tensor:
        zero = torch.zeros(4, 3, dtype=torch.float64)
        return sum((a * v for a, v in zip(weights, terms, strict=True)), zero)

    prediction = f(x, TIMES[0])
    for k in range(len(TIMES) - 1):
        past = [prediction, *past][:history]
        h = (lambda_[k + 1] - lambda_[k]).item()
        hh, base = -h, sigma[k + 1] / sigma[k] * x - alpha[k + 1] * np.expm1(-h) * prediction
        big = hh if form == "b1" else np.expm1(hh)
        r = [((lambda_[k - m] - lambda_[k]) / h).item() for m in range(1, len(past))]
        d = [(p - prediction) / v for p, v in zip(past[1:], r, strict=True)]

        scale = alpha[k + 1] * big
        guess = base - scale * combined(system(r, hh, big, 0.5) if r else [], d)
        if k == len(TIMES) - 2:
            x = guess
            break
        late = f(guess, TIMES[k + 1])
        x = base - scale * combined(system([*r, 1.0], hh, big, 0.5), [*d, late - prediction])
        prediction = late
    agree(ours(ef.solvers.get(f"unipc-{form}-{history}"), schedule, TIMES), x)
