"""k-diffusion: samplers over a grid of sigma, in the frame alpha = 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebbflow.benchmark.measure import Case, Model
from ebbflow.benchmark.peers import imports
from ebbflow.benchmark.peers.levels import ends, lows, top

SAMPLERS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("euler", 1, {}),
    ("heun", 2, {}),
    ("dpm_2", 2, {}),
    ("lms", 1, {"order": 3}),
    ("lms", 1, {"order": 4}),
    ("dpmpp_2s_ancestral", 2, {"eta": 0.0}),
    ("dpmpp_2m", 1, {}),
    ("dpmpp_2m_sde", 1, {"eta": 0.0, "solver_type": "heun"}),
    ("dpmpp_3m_sde", 1, {"eta": 0.0}),
)
"""Name, evaluations a step (a last step to zero takes one), and options."""


def samplers(case: Case) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Every sampler over its grids and the ways to end them."""
    sampling = imports.k_diffusion()
    grids: dict[str, Callable[[int, float, float], Tensor]] = {
        "karras 7": sampling.get_sigmas_karras,
        "karras 3": partial(sampling.get_sigmas_karras, rho=3.0),
        "exponential": sampling.get_sigmas_exponential,
    }
    if case.problem.setting == "vp":
        grids["vp"] = lambda n, low, high: sampling.get_sigmas_vp(n, eps_s=0.1 * low)
    for name, cost, options in SAMPLERS:
        function = getattr(sampling, f"sample_{name}")
        if "eta" in options:
            options = {**options, "noise_sampler": lambda *sigmas: 0.0}
        shown = "".join(f" {k} {v}" for k, v in options.items() if k in ("order", "solver_type"))
        for end, low, zero in ends(case):
            for title, grid in grids.items():
                run = partial(_run, function, cost, options, grid, low, zero)
                yield name, f"{title}{end}{shown}", run
    # A grid of its own, uniform in log sigma.
    yield "dpm_fast", "", partial(_fast, sampling.sample_dpm_fast, lows(case)[0])


def _run(
    function: Callable[..., Tensor],
    cost: int,
    options: dict[str, Any],
    grid: Callable[[int, float, float], Tensor],
    low: float,
    zero: bool,
    case: Case,
    model: Model,
    budget: int,
) -> tuple[Tensor, float, float]:
    steps = (budget + cost - 1) // cost if zero else budget // cost
    sigmas = grid(steps if zero else steps + 1, low, top(case)).double()
    sigmas = sigmas if zero else sigmas[:-1]
    sigmas[0] = top(case)
    x = case.start(1.0, top(case)).double()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, 1.0, float(sigma[0]))

    return function(denoise, x, sigmas, disable=True, **options), 1.0, float(sigmas[-1])


def _fast(
    function: Callable[..., Tensor], low: float, case: Case, model: Model, budget: int
) -> tuple[Tensor, float, float]:
    high = torch.tensor(top(case), dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, 1.0, min(float(sigma.flatten()[0]), top(case)))

    x = case.start(1.0, top(case)).double()
    end = torch.tensor(low, dtype=torch.float64)
    return function(denoise, x, end, high, budget, disable=True), 1.0, low
