"""diffusers: schedulers over their own options, asked at their exact levels.

A scheduler is a loop of `step(output, t, x)`. What differs is the frame of its state and what it
takes as the output of a network; one small function a family converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

from ebbflow.benchmark.measure import Case, Model
from ebbflow.benchmark.peers import imports

Level = tuple[float, float]
"""alpha and sigma of a scheduler's state."""


def _of_chain(scheduler: Any, i: int) -> Level:
    if i == len(scheduler.timesteps):
        kept = float(scheduler.final_alpha_cumprod)
    else:
        kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
    return math.sqrt(kept), math.sqrt(1 - kept)


def _of_sigmas(scheduler: Any, i: int) -> Level:
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i].double())
    return float(alpha), float(sigma)


def _of_ratios(scheduler: Any, i: int) -> Level:
    return 1.0, float(scheduler.sigmas[i])


def _of_flow(scheduler: Any, i: int) -> Level:
    return 1 - float(scheduler.sigmas[i]), float(scheduler.sigmas[i])


def _of_angles(scheduler: Any, i: int) -> Level:
    return float(scheduler.alphas[i]), float(scheduler.betas[i])


def _noise(scheduler: Any, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return (x - level[0] * x0) / level[1]


def _data(scheduler: Any, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return x0


def _velocity(scheduler: Any, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return (x - x0) / level[1]


def _v(scheduler: Any, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """alpha eps - sigma x_0, finite at both ends of a circle: (alpha x - x_0) / sigma there."""
    return (level[0] * x - x0) / level[1]


def _edm(scheduler: Any, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    data, sigma = scheduler.config.sigma_data, level[1]
    total = sigma**2 + data**2
    return (x0 - data**2 / total * x) * math.sqrt(total) / (sigma * data)


LEVELS = {
    "chain": (_of_chain, _noise, {}),
    "sigmas": (_of_sigmas, _data, {"prediction_type": "sample"}),
    "ratios": (_of_ratios, _noise, {}),
    "edm": (_of_ratios, _edm, {}),
    "flow": (_of_flow, _velocity, {}),
    "angles": (_of_angles, _v, {}),
}
"""A family's levels, its network's output from x_0, and the option that says so."""

CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
SPACINGS = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]
SHAPES = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")]
LU = [{"use_lu_lambdas": True}]
SHIFTS = [{"shift": shift} for shift in (1.0, 2.0, 3.0)]
SHIFTED = [{"use_flow_sigmas": True, "flow_shift": shift} for shift in (1.0, 2.0, 3.0)]
ORDERS = [{"solver_order": order} for order in (2, 3)]
ENDS = [{"final_sigmas_type": end} for end in ("zero", "sigma_min")]
FORMS = [
    {"solver_order": 2, "solver_type": "midpoint"},
    {"solver_order": 2, "solver_type": "heun"},
    {"solver_order": 3},  # of one kind
]
HATS = [{"solver_type": "bh2"}, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}]
TARGETS = [{"predict_x0": value} for value in (True, False)]
ADAMS = [{"predictor_order": k, "corrector_order": k} for k in (2, 3)]
ONES = [{"set_alpha_to_one": value} for value in (True, False)]
WHOLE = [{"clip_sample": False}]
PNDM = [{"skip_prk_steps": True}]
EDM = [{"sigma_schedule": name, "rho": 7.0} for name in ("karras", "exponential")]
NOISE_FORM = [{"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}]
SPAN = [{"sigma_min": 0.002, "sigma_max": 80.0, "use_karras_sigmas": True}]

Options = list[dict[str, Any]]
SCHEDULERS: dict[str, tuple[tuple[str, str, tuple[Options, ...]], ...]] = {
    "vp": (
        ("DDIM", "chain", (WHOLE, SPACINGS, ONES)),
        ("PNDM", "chain", (PNDM, SPACINGS, ONES)),
        ("DPMSolverMultistep", "sigmas", (FORMS, ENDS, [*SPACINGS, *SHAPES, *LU])),
        ("DPMSolverMultistep", "sigmas", (ORDERS, NOISE_FORM, [*SPACINGS, *SHAPES[:2]])),
        ("DPMSolverSinglestep", "sigmas", (ORDERS, ENDS, [{}, *SHAPES])),
        ("UniPCMultistep", "sigmas", (ORDERS, HATS, [*SPACINGS, *SHAPES])),
        ("UniPCMultistep", "sigmas", (ORDERS, TARGETS[1:], [*SPACINGS, *SHAPES])),
        ("DEISMultistep", "sigmas", (ORDERS, [*SPACINGS, *SHAPES])),
        ("SASolver", "sigmas", (ADAMS, [*SPACINGS, *SHAPES])),
        ("EulerDiscrete", "ratios", ([*SPACINGS, *SHAPES],)),
        ("HeunDiscrete", "ratios", ([*SPACINGS, *SHAPES],)),
        ("IPNDM", "angles", ()),
    ),
    "edm": (
        ("EDMEuler", "edm", (EDM, ENDS)),
        ("EDMDPMSolverMultistep", "edm", (EDM, FORMS, ENDS)),
        ("UniPCMultistep", "sigmas", (SPAN, ORDERS, [*HATS, *ENDS[1:]], TARGETS)),
        ("IPNDM", "angles", ()),
    ),
    "flow": (
        ("FlowMatchEulerDiscrete", "flow", (SHIFTS, [{}, *SHAPES])),
        ("FlowMatchHeunDiscrete", "flow", (SHIFTS,)),
        ("DPMSolverMultistep", "sigmas", (FORMS, SHIFTED)),
        ("UniPCMultistep", "sigmas", (ORDERS, TARGETS, SHIFTED)),
        ("DEISMultistep", "sigmas", (ORDERS, SHIFTED)),
        ("SASolver", "sigmas", (ADAMS, SHIFTED)),
        ("IPNDM", "angles", ()),
    ),
}
"""For each setting: scheduler, family, and the options that are multiplied out."""


def samplers(case: Case) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """The schedulers made for this setting, each over the product of its options."""
    library = imports.diffusers()
    library.utils.logging.set_verbosity_error()
    for name, family, axes in SCHEDULERS.get(case.problem.setting, ()):
        for choice in product(*axes):
            options = {key: value for part in choice for key, value in part.items()}
            text = " ".join(f"{key}={value}" for key, value in options.items())
            if case.problem.setting == "vp" and family != "angles":
                options = {**CHAIN, **options}
            kind = getattr(library, f"{name}Scheduler")
            yield name, text, partial(_run, kind, family, options)


def _run(
    kind: Callable[..., Any],
    family: str,
    options: dict[str, Any],
    case: Case,
    model: Model,
    budget: int,
) -> tuple[Tensor, float, float]:
    level, output, told = LEVELS[family]
    if "predictor_order" in options:
        options = {**options, "tau_func": lambda t: 0.0}  # SA-Solver without its noise
    scheduler = kind(**options, **told)
    scheduler.set_timesteps(next(n for n in range(budget, 0, -1) if _fits(scheduler, n, budget)))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    alpha, sigma = level(scheduler, 0)
    x = case.start(alpha, sigma).double()
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = level(scheduler, i)
        said = output(scheduler, x, model(x, alpha, sigma), (alpha, sigma))
        x = scheduler.step(said, t, x).prev_sample.double()
    return x, *level(scheduler, len(scheduler.timesteps))


def _fits(scheduler: Any, steps: int, budget: int) -> bool:
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps) <= budget
