"""What a diffusers scheduler says about the model: its forward process, prediction and clock.

A scheduler mixes the facts of the model (betas, prediction type, what the network is told as time)
with a sampler. Here the facts are taken out, into a `Schedule`, a prediction and a clock of
`ebbflow.denoiser`; `nodes` takes out where its sampler steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ebbflow import schedules
from ebbflow.schedules import VE, Betas, Linear, Schedule

FAMILIES = {
    "DDIMScheduler": "chain",
    "DDIMParallelScheduler": "chain",
    "DDPMScheduler": "chain",
    "DDPMParallelScheduler": "chain",
    "DEISMultistepScheduler": "chain",
    "DPMSolverMultistepScheduler": "chain",
    "DPMSolverSinglestepScheduler": "chain",
    "PNDMScheduler": "chain",
    "SASolverScheduler": "chain",
    "UniPCMultistepScheduler": "chain",
    "DPMSolverSDEScheduler": "ratio",
    "EulerAncestralDiscreteScheduler": "ratio",
    "EulerDiscreteScheduler": "ratio",
    "HeunDiscreteScheduler": "ratio",
    "KDPM2AncestralDiscreteScheduler": "ratio",
    "KDPM2DiscreteScheduler": "ratio",
    "LMSDiscreteScheduler": "ratio",
    "EDMDPMSolverMultistepScheduler": "edm",
    "EDMEulerScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
}
"""The schedulers that are known. "chain": the state is `x_t` of a chain of betas; "ratio": the
same chain, and the state is `x_t / alpha`; "edm": preconditioned, variance-exploding; "flow": the
straight path."""

PREDICTIONS = {
    "epsilon": "noise",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "velocity",
}
"""diffusers' `prediction_type` in the words of `ebbflow.denoiser.PREDICTIONS`."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
RESHAPED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@dataclass(frozen=True)
class Facts:
    """What a scheduler says about the model, in the arguments of `Denoiser`, and a little more.

    Args:
        schedule, prediction, time, sigma_data: as `Denoiser` takes them.
        family: of the scheduler, a value of `FAMILIES`.
        sign: what the network's output is multiplied by (EDM's v is minus its F).
        scale: what the clock is multiplied by before the network is told it.
        rounding: of what the network is told: "none", "nearest", "down", or "ratio", where places
            between two indices are linear in sigma/alpha and not in its logarithm.
        limit: x_0 is clipped to [-limit, limit], or None.
    """

    schedule: Schedule
    prediction: str
    time: str
    sigma_data: float | None = None
    family: str = "chain"
    sign: float = 1.0
    scale: float = 1.0
    rounding: str = "none"
    limit: float | None = None

    def told(self, clock: Tensor) -> Tensor:
        """The timestep that the pipeline hands to the network, from the denoiser's clock."""
        clock = clock * self.scale if self.scale != 1.0 else clock
        if self.rounding == "none":
            return clock
        nearest = clock.round()
        if self.rounding == "nearest":
            return nearest
        # An index within the round-off of single precision is meant as it is.
        at_index = (clock - nearest).abs() <= 3e-7 * (1 + clock.abs())
        if self.rounding == "down":
            return torch.where(at_index, nearest, clock.floor())
        assert isinstance(self.schedule, Betas)
        steps = len(self.schedule.betas)
        low = clock.double().floor().clamp(0, max(steps - 2, 0))
        places = torch.stack([low, clock.double(), low + 1]) + 1
        ratio = torch.exp(-self.schedule.log_snr((places / steps).clamp(0, 1)) / 2)
        share = (ratio[1] - ratio[0]) / (ratio[2] - ratio[0])
        return torch.where(at_index, nearest, (low + share).to(clock))


def library(name: str) -> Any:
    """The library `name`; raises ImportError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'ebbflow[peers]' installs {name}") from error


def schedule_of(scheduler: Any) -> Facts:
    """The facts of a diffusers scheduler, or of its configuration (with `_class_name`).

    Their schedule keeps them, so that a plan compiled on it knows what its network predicts.

    Raises ValueError, naming the field, for a scheduler, a beta schedule or a prediction type that
    is not known, for keys that no scheduler has, and for contradictions: noise cannot be predicted
    where there is no signal (`rescale_betas_zero_snr` with "epsilon").
    """
    facts = getattr(scheduler, "facts", None)
    if isinstance(facts, Facts):
        return facts
    facts = _facts(scheduler)
    object.__setattr__(facts.schedule, "facts", facts)
    return facts


def _facts(scheduler: Any) -> Facts:
    if isinstance(scheduler, Mapping):
        scheduler = scheduler_of(scheduler)
    name = type(scheduler).__name__
    if name not in FAMILIES or not hasattr(scheduler, "config"):
        refuse("scheduler._class_name", name, FAMILIES)
    config, family = scheduler.config, FAMILIES[name]
    _check(config)
    if family == "edm":
        return _edm(config)
    if family == "flow" or config.get("use_flow_sigmas"):
        return _flow(config, family)
    return _chain(scheduler, config, family)


def scheduler_of(config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler from its configuration; `_class_name` must be a known one.

    Raises ValueError, naming the field, for unknown kinds and keys and for values that the
    scheduler itself refuses.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        refuse("scheduler._class_name", name, FAMILIES)
    keys = {key for kind in FAMILIES for key in _parameters(getattr(library("diffusers"), kind))}
    for key in config:
        if key not in keys and not key.startswith("_"):
            near = get_close_matches(key, keys, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"scheduler.{key} is a key that no scheduler has{hint}")
    _check(config)
    kind: Any = getattr(library("diffusers"), str(name))
    own = {key: value for key, value in config.items() if key in _parameters(kind)}
    try:
        return kind(**own)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"scheduler: {name} refuses its configuration: {error}") from error


def options_of(
    schedule: Schedule, prediction: str = "noise", sigma_data: float | None = None
) -> dict[str, Any]:
    """The configuration keys by which diffusers describes this process and prediction.

    Betas give `trained_betas`, the straight path `shift` (a flow-matching scheduler, or one with
    `use_flow_sigmas`), a variance-exploding process with prediction "edm" the keys of the EDM
    schedulers. Raises ValueError for what diffusers has no words for.
    """
    if isinstance(schedule, VE) and prediction == "edm":
        ends = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        return {**ends, "sigma_data": sigma_data, "prediction_type": "epsilon"}
    words = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if isinstance(schedule, Linear) and prediction == "velocity":
        return {"num_train_timesteps": 1000, "shift": 1.0}
    if not isinstance(schedule, Betas) or prediction not in words or prediction == "velocity":
        raise ValueError(
            f"{type(schedule).__name__} with prediction {prediction!r} has no diffusers scheduler; "
            "these have: Betas with noise, v or x0, Linear with velocity, VE with edm"
        )
    return {
        "num_train_timesteps": len(schedule.betas),
        "trained_betas": list(schedule.betas),
        "prediction_type": words[prediction],
    }


def _parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}


def refuse(field: str, value: Any, known: Any) -> None:
    near = get_close_matches(str(value), list(known), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{field} is {value!r:.60}{hint}; known: {', '.join(known)}")


def _check(config: Mapping[str, Any]) -> None:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        refuse("scheduler.prediction_type", prediction, PREDICTIONS)
    trained = config.get("trained_betas")
    if trained is None:
        betas = config.get("beta_schedule", "linear")
        if betas not in BETA_SCHEDULES:
            refuse("scheduler.beta_schedule", betas, BETA_SCHEDULES)
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"scheduler.num_train_timesteps is {steps!r:.40}, expected a positive integer"
        )
    if trained is not None and len(trained) != steps:
        raise ValueError(
            f"scheduler.trained_betas has {len(trained)} entries, and "
            f"scheduler.num_train_timesteps is {steps}: they must be equal"
        )
    if config.get("interpolation_type", "linear") != "linear":
        refuse("scheduler.interpolation_type", config["interpolation_type"], ["linear"])
    if config.get("invert_sigmas"):
        raise ValueError("scheduler.invert_sigmas is True: time that runs from data is not read")
    if config.get("timestep_type", "discrete") != "discrete":
        refuse("scheduler.timestep_type", config["timestep_type"], ["discrete"])


def _edm(config: Mapping[str, Any]) -> Facts:
    prediction = config["prediction_type"]
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if prediction not in signs:
        refuse("scheduler.prediction_type", prediction, signs)
    try:
        schedule = schedules.VE(float(config["sigma_min"]), float(config["sigma_max"]))
    except ValueError as error:
        raise ValueError(f"scheduler.sigma_min, scheduler.sigma_max: {error}") from error
    data = float(config["sigma_data"])
    if not 0 < data < math.inf:
        raise ValueError(f"scheduler.sigma_data is {data:g}, expected a positive number")
    return Facts(schedule, "edm", "quarter_log_sigma", data, "edm", signs[prediction])


def _flow(config: Mapping[str, Any], family: str) -> Facts:
    prediction = config.get("prediction_type", "flow_prediction")
    rounding = "none" if family == "flow" else "down"
    return Facts(
        Linear(),
        PREDICTIONS[prediction],
        "t",
        family="flow",
        scale=float(config["num_train_timesteps"]),
        rounding=rounding,
        limit=_limit(config),
    )


def _chain(scheduler: Any, config: Mapping[str, Any], family: str) -> Facts:
    prediction = config["prediction_type"]
    if prediction == "flow_prediction":
        raise ValueError(
            "scheduler.prediction_type is 'flow_prediction' but scheduler.use_flow_sigmas is not "
            "True: a flow has no betas; set both"
        )
    kept = scheduler.alphas_cumprod.double().cpu()  # what the pipeline itself computes with
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    if kept[-1] > before[-1]:
        raise ValueError(
            f"scheduler.rescale_betas_zero_snr: {type(scheduler).__name__} puts {kept[-1]:.3g} for "
            f"the last of alphas_cumprod, above the one before it, {before[-1]:.3g}; a scheduler "
            "that keeps the zero, such as DDIMScheduler.from_config(…), has a process"
        )
    try:
        schedule = Betas(1 - kept / before)
    except ValueError as error:
        fields = "scheduler.trained_betas, scheduler.beta_start, scheduler.beta_end"
        raise ValueError(f"{fields}: {error}") from error
    if kept[-1] == 0 and prediction == "epsilon":
        raise ValueError(
            "scheduler.prediction_type is 'epsilon' with scheduler.rescale_betas_zero_snr: the "
            "last step has no signal, so that predicted noise says nothing about the data; such "
            "models predict 'v_prediction' or 'sample'"
        )
    rounding = _rounding(type(scheduler).__name__, config, family)
    limit = _limit(config)
    return Facts(
        schedule, PREDICTIONS[prediction], "step", None, family, rounding=rounding, limit=limit
    )


def _rounding(name: str, config: Mapping[str, Any], family: str) -> str:
    """What the schedulers do to the index between two entries of their table.

    Where the grid lies on the table, every rule is the same; "ratio" is for grids of fractional
    indices, whose sigmas diffusers interpolates, and the others for grids of sigmas.
    """
    reshaped = next((key for key in RESHAPED if config.get(key)), None)
    if family == "ratio":
        linspace = config.get("timestep_spacing", "linspace") == "linspace"
        return "ratio" if reshaped is None and linspace else "none"
    if reshaped is None:
        return "none"
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    cut = reshaped in ("use_exponential_sigmas", "use_beta_sigmas")
    cut = cut or (cosine and name == "DPMSolverMultistepScheduler")
    return "down" if cut else "nearest"


def _limit(config: Mapping[str, Any]) -> float | None:
    if config.get("thresholding"):
        raise ValueError(
            "scheduler.thresholding is True: dynamic thresholds are not part of the model; "
            "set it to False, or clip_sample for a fixed range"
        )
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
