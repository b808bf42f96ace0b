"""Where a diffusers scheduler steps, as the nodes of a plan.

Through the same nodes from the same start, these end where the pipeline does:

| scheduler | solver |
|---|---|
| DDIM, EulerDiscrete, EDMEuler | "ddim" (with DDIM's eta) |
| DDPM | "ddpm" |
| EulerAncestralDiscrete | "ddim" with eta=1 |
| HeunDiscrete | "edm" |
| DPMSolverMultistep, EDMDPMSolverMultistep of order 2, "midpoint" | "dpm-solver++2m" |
| … with algorithm_type "dpmsolver", "sde-dpmsolver++" | "dpm-solver-2m", "sde-dpm-solver++2m" |
| DEISMultistep of order 2, 3 | "deis-logrhoab1", "dpm-solver-3m" |
| UniPCMultistep, bh1 or bh2, of order 2 or 3 | "unipc-b1-2", "unipc-b2-2", … |
| PNDM with Runge-Kutta steps | "f-pndm" |
| LMSDiscrete of order 2, 3, up to its last step | "deis-rhoab1", "deis-rhoab2" |
| FlowMatchEulerDiscrete, FlowMatchHeunDiscrete | "euler", "heun" |

To a last level above zero give the multistep schedulers `lower_order_final=False`. Their third
order of DPM-Solver++ has a coefficient that loses half of a term, and PNDM with `skip_prk_steps`
starts as no solver here does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ebbflow.interop.diffusers.schedules import FAMILIES, Facts, schedule_of, scheduler_of
from ebbflow.schedules import Betas

BETWEEN = (
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
"""Schedulers whose grid lists evaluations between nodes too, or that draw noise between them."""


def nodes(
    scheduler: Any,
    steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> tuple[float, ...]:
    """The times through which `steps` steps of a diffusers scheduler go, the first to the last.

    Index i of a chain lies at t = (i + 1) / T; spacing, offset, shifts, the shape of the sigmas and
    the last level (`set_alpha_to_one`, `final_sigmas_type`) decide the rest. An EDM scheduler ends
    at sigma_min here; where its own grid goes on to sigma = 0, `ef.sample(…, denoise=True)` does.

    scheduler: or its configuration. sigmas, mu: as the scheduler's `set_timesteps` takes them
    (`shift_of` gives mu). Raises ValueError for grids that no sequence of nodes describes.
    """
    return _grid(scheduler, steps, sigmas, mu)[0]


def start(
    scheduler: Any,
    noise: Tensor,
    steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Tensor:
    """The state at the first of `nodes` that a pipeline makes of standard normal noise."""
    (_, fresh, facts) = _grid(scheduler, steps, sigmas, mu)
    scale = float(getattr(fresh, "init_noise_sigma", 1.0))
    if facts.family == "ratio":
        scale /= math.sqrt(1 + float(fresh.sigmas[0]) ** 2)
    return noise * scale


def shift_of(scheduler: Any, tokens: int) -> float:
    """mu of `use_dynamic_shifting` for an image of this many tokens, linear in their number.

    From `base_shift` at `base_image_seq_len` tokens to `max_shift` at `max_image_seq_len`; Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis, section 5.3.2, in logarithms.
    """
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (last - first) / (high - low)
    return tokens * slope + (first - slope * low)


def _grid(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None
) -> tuple[tuple[float, ...], Any, Facts]:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if not hasattr(scheduler, "config"):
        scheduler = scheduler_of(scheduler)
    facts = schedule_of(scheduler)
    name, config = type(scheduler).__name__, scheduler.config
    if name not in FAMILIES or name in BETWEEN:
        raise ValueError(f"the steps of scheduler {name} are not the nodes of one plan")
    if config.get("use_dynamic_shifting") and mu is None:
        raise ValueError(
            "scheduler.use_dynamic_shifting is True: give mu, such as shift_of(scheduler, tokens)"
        )
    total = config.get("num_train_timesteps", 1000)
    if facts.time == "step" and steps > total:
        raise ValueError(f"{steps} steps: scheduler.num_train_timesteps is {total}")
    fresh = type(scheduler).from_config(config)
    given = {"sigmas": None if sigmas is None else list(sigmas), "mu": mu}
    given = {key: value for key, value in given.items() if value is not None}
    fresh.set_timesteps(**({} if sigmas is not None else {"num_inference_steps": steps}), **given)
    levels = getattr(fresh, "sigmas", None)
    if levels is None:
        times = _of_indices(fresh, name, steps)
    else:
        times = [_of_sigma(float(sigma), facts) for sigma in levels]
    if facts.family == "edm" and times[-1] == 0.0 and float(fresh.sigmas[-1]) == 0:
        times = times[:-1]
    distinct = [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
    if any(later >= earlier for earlier, later in pairwise(distinct)):
        raise ValueError(f"scheduler {name} does not step towards data throughout: {distinct}")
    return tuple(distinct), fresh, facts


def _of_indices(fresh: Any, name: str, steps: int) -> list[float]:
    """Nodes of the schedulers that know indices only, each with its own rule for the next one."""
    total = fresh.config.num_train_timesteps
    indices = fresh.timesteps.tolist()
    if name.startswith("PNDM"):
        indices = sorted({int(i) for i in fresh._timesteps}, reverse=True)
    if name.startswith("DDPM"):
        return [*((i + 1) / total for i in indices), 0.0]
    stride = total // steps
    for here, there in pairwise(indices):
        if here - stride != there:
            raise ValueError(
                f"scheduler.timestep_spacing is {fresh.config.timestep_spacing!r}: at {steps} of "
                f"{total} steps {name} steps from {here} to {here - stride} and goes on from "
                f"{there}, which no plan does; a number of steps that divides {total}, with "
                "'trailing' or 'leading', has nodes"
            )
    if indices[-1] - stride >= 0:
        raise ValueError(
            f"scheduler.steps_offset is {fresh.config.steps_offset}: {name} ends its {steps} steps "
            f"at index {indices[-1] - stride}, not at the data"
        )
    last = 0.0 if fresh.config.set_alpha_to_one else 1 / total
    return [*((i + 1) / total for i in indices), last]


def _of_sigma(sigma: float, facts: Facts) -> float:
    if facts.family == "flow":
        return sigma
    schedule = facts.schedule
    if sigma == 0:
        return 0.0
    log_snr = -2 * math.log(sigma)
    low, high = schedule.log_snr(1.0).item(), schedule.log_snr(0.0).item()
    slack = 1e-5  # single precision at the ends
    if not low - slack <= log_snr <= high + slack:
        raise ValueError(
            f"scheduler.sigma_max, scheduler.sigma_min: the grid has sigma {sigma:g}, and the "
            f"process spans {math.exp(-high / 2):g} to {math.exp(-low / 2):g}"
        )
    t = schedule.time(torch.tensor(min(max(log_snr, low), high), dtype=torch.float64)).item()
    if not isinstance(schedule, Betas):
        return float(round(t)) if abs(t - round(t)) < 1e-7 else t
    place = t * len(schedule.betas)
    # Single precision is off by up to 1e-4 of a place; an index is meant.
    return round(place) / len(schedule.betas) if abs(place - round(place)) < 1e-4 else t
