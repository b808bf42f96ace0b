"""azula: every sampler on every schedule; a schedule is a grid, with steps uniform in its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ebbflow.benchmark.measure import Case, Model
from ebbflow.benchmark.peers import imports
from ebbflow.benchmark.peers.levels import lows, top

SAMPLERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Euler", {}),
    *((name, {"order": k}) for name in ("zAB", "vAB", "zEAB", "xEAB") for k in (2, 3, 4)),
    *(("REAB", {"order": k}) for k in (2, 3)),
)
"""Name and options of those with one evaluation a step; Heun's method is k-diffusion's too."""


class Karras:
    """The grid of EDM as a schedule of azula's: sigma^(1/7) linear in t, alpha = 1."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        self.ends = sigma_min ** (1 / 7), sigma_max ** (1 / 7)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ends
        return torch.ones_like(t), (low + t * (high - low)) ** 7


class Asked:
    """What azula's samplers need of a denoiser: a schedule, and the mean of the posterior."""

    def __init__(self, model: Model, schedule: Any) -> None:
        self.model = model
        self.schedule = schedule

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        alpha, sigma = self.schedule(t)
        return SimpleNamespace(mean=self.model(x, float(alpha), float(sigma)))


def samplers(case: Case) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Every sampler and order on azula's five schedules and EDM's grid, at the case's levels."""
    library = imports.azula()
    noise, high = library.noise, top(case)
    low = lows(case)[0]
    # azula adds low² to the variance: this alpha makes the ratio at the start exactly `high`.
    alpha_min = math.hypot(1, low) / math.hypot(1, high)
    schedules = {
        "VE": noise.VESchedule(low, high),
        "VP": noise.VPSchedule(alpha_min, low),
        "cosine": noise.CosineSchedule(alpha_min, low),
        "rectified": noise.RectifiedSchedule(1 / high, low),
        "decay": noise.DecaySchedule(1 / high, low),
        "karras": Karras(low, high),
    }
    for name, options in SAMPLERS:
        kind = getattr(library.sample, f"{name}Sampler")
        order = f" order {options['order']}" if options else ""
        for title, schedule in schedules.items():
            yield name, f"{title}{order}", partial(_run, kind, options, schedule)


def _run(
    kind: Callable[..., Any],
    options: dict[str, Any],
    schedule: Any,
    case: Case,
    model: Model,
    budget: int,
) -> tuple[Tensor, float, float]:
    grid = {"steps": budget, "silent": True, "dtype": torch.float64}
    sampler = kind(Asked(model, schedule), **grid, **options)
    ends = [schedule(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0)]
    (alpha, sigma), (alpha_end, sigma_end) = ((float(a), float(s)) for a, s in ends)
    x = case.start(alpha, sigma).double()
    return sampler(x), alpha_end, sigma_end
