"""Whether a plan and the pipeline that is to follow it speak of the same process and network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ebbflow.denoiser import CLOCKS
from ebbflow.files import exact_keys
from ebbflow.interop.diffusers.schedules import (
    FAMILIES,
    PREDICTIONS,
    Facts,
    library,
    schedule_of,
)
from ebbflow.plan import Plan
from ebbflow.schedules import VE, Betas, Linear, Schedule, from_config

OWN = ("plan", "facts", "seed", "scales_input")
"""The keys that `Scheduler` adds to the configuration of the scheduler whose place it takes."""

_ROUNDINGS = ("none", "nearest", "down", "ratio")


def facts_of(plan: Plan, like: Any, prediction_type: str | None) -> Facts:
    """What the network predicts and is told, by the scheduler that the pipeline had, or by default.

    Raises ValueError, naming the field, unless it agrees with the plan and `prediction_type`.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is a {type(plan).__name__}: a scheduler runs an ef.Plan, such as "
            'ef.solvers.get("dpm-solver++2m").plan(schedule, 10)'
        )
    if plan.times[-1] > plan.times[0]:
        raise ValueError(
            f"plan.times run from {plan.times[0]:g} to {plan.times[-1]:g}, towards noise; "
            "pipelines start from noise"
        )
    if plan.centred:
        raise ValueError(
            "plan.centred is true: its rows hold about the data's means, which a pipeline does not "
            "know; take a plan that is not centred"
        )
    if like is None:  # a schedule that was read from a scheduler knows
        like = plan.schedule.__dict__.get("facts")
    words = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if like is None and prediction_type is None:  # and so does a plan that was tuned
        prediction_type = words.get(plan.origin.get("model", {}).get("prediction"))
    facts = _usual(plan.schedule, prediction_type) if like is None else _known(like)
    _require_same(facts.schedule, plan.schedule)
    if prediction_type is not None and PREDICTIONS.get(prediction_type) != facts.prediction:
        raise ValueError(
            f"prediction_type is {prediction_type!r}, but the pipeline's scheduler says "
            f"{words.get(facts.prediction, facts.prediction)!r}"
        )
    return facts


def written(facts: Facts) -> dict[str, Any]:
    """JSON values from which, with the plan's schedule, `facts_of` makes equal facts."""
    return {name: value for name, value in asdict(facts).items() if name != "schedule"}


def others(like: Any) -> dict[str, Any]:
    """What else the configuration of the pipeline's scheduler says, which pipelines may read."""
    like = getattr(like, "scheduler", like)
    config = getattr(like, "config", like)
    if not isinstance(config, Mapping):
        return {}
    return {k: v for k, v in config.items() if k not in OWN and not k.startswith("_")}


class Stored(dict[str, Any]):
    """A plan in a configuration: its JSON values, and its tensors, which JSON does not hold."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.tensors = dict(tensors)


def times(plan: Plan, facts: Facts) -> tuple[Tensor, Tensor]:
    """What the network is told at each call, and the noise levels there and at the end.

    Whole indices are integers; levels are sigma of a flow and sigma/alpha of other processes.
    """
    schedule, stages = plan.schedule, plan.stages
    t = torch.tensor([*(stage.time for stage in stages), plan.times[-1]], dtype=torch.float64)
    told = facts.told(CLOCKS[facts.time](schedule, t[:-1]).float())
    if facts.time == "step" and bool((told == told.round()).all()):
        told = told.long()
    flow = isinstance(schedule, Linear)
    sigmas = schedule.sigma(t) if flow else torch.exp(-schedule.log_snr(t) / 2)
    return told, sigmas.float()


def time_of(schedule: Schedule, facts: Facts, told: Tensor) -> Tensor:
    """The times at which the network is told these, float64."""
    if isinstance(schedule, Betas):
        return (told + 1) / len(schedule.betas)
    return told / facts.scale if isinstance(schedule, Linear) else schedule.time(-8 * told)


def require_times(name: str, given: Any, own: Tensor) -> None:
    """Raise ValueError unless the caller's timesteps or sigmas are the plan's."""
    values, ours = torch.as_tensor(given).double().flatten().cpu(), own.double().cpu()
    if values.shape != ours.shape or not torch.allclose(values, ours, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"{name} are {values.tolist()!s:.60}, but the plan's are {ours.tolist()!s:.60}: a plan "
            f"brings its own times; leave {name} out, or compile the solver at those times"
        )


def _usual(schedule: Schedule, prediction_type: str | None) -> Facts:
    if not isinstance(schedule, Linear | Betas):
        raise ValueError(
            f"plan.schedule is {type(schedule).__name__}: networks of diffusers know time on Betas "
            "or Linear, and those of EDM on VE with like=pipeline.scheduler; compile the solver "
            "on schedule_of(pipeline.scheduler).schedule"
        )
    flow = isinstance(schedule, Linear)
    usual = "flow_prediction" if flow else "epsilon"
    name = usual if prediction_type is None else prediction_type
    if name not in PREDICTIONS:
        raise ValueError(f"prediction_type is {name!r:.40}; known: {', '.join(PREDICTIONS)}")
    if flow:
        return Facts(schedule, PREDICTIONS[name], "t", family="flow", scale=1000.0)
    return Facts(schedule, PREDICTIONS[name], "step")


def _known(like: Any) -> Facts:
    if isinstance(like, Facts):
        return like
    if hasattr(like, "components"):
        like = like.scheduler
    if not isinstance(like, Mapping) or like.get("facts") is None:
        return schedule_of(_named(like) if isinstance(like, Mapping) else like)
    values: Any = like["facts"]
    exact_keys(values, {f.name for f in fields(Facts)} - {"schedule"}, "config.facts")
    for name, known in {"rounding": _ROUNDINGS, "sign": (1.0, -1.0)}.items():
        if values[name] not in known:
            raise ValueError(f"config.facts.{name} is {values[name]!r:.40}; known: {known}")
    for name in ("scale", "limit", "sigma_data"):
        value = values[name]
        if value is not None and not (isinstance(value, int | float) and 0 < value < 1e9):
            raise ValueError(f"config.facts.{name} is {value!r:.40}, expected a positive number")
    stored: Any = like.get("plan")
    if not isinstance(stored, Mapping) or "schedule" not in stored:
        raise ValueError(f"config.plan is {stored!r:.40}, expected a plan with its schedule")
    return Facts(from_config(stored["schedule"]), **values)


def _named(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the name of the class, which only saved configurations have: by the keys that it takes.

    Kinds with the same keys are of one family.
    """
    diffusers = library("diffusers")
    keys = {key for key in config if not key.startswith("_")}
    for name in FAMILIES if config.get("_class_name") is None else ():
        if (
            set(signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}
            == keys
        ):
            return {**config, "_class_name": name}
    return config


def _require_same(theirs: Schedule, ours: Schedule) -> None:
    """Raise ValueError, naming the field, unless both are one process in single precision."""
    fix = "compile the solver on schedule_of(pipeline.scheduler).schedule"
    if type(theirs) is not type(ours):
        raise ValueError(
            f"plan.schedule is {type(ours).__name__}, but the pipeline's scheduler describes "
            f"{type(theirs).__name__}: {fix}"
        )
    if isinstance(theirs, Betas) and isinstance(ours, Betas):
        one, two = len(theirs.betas), len(ours.betas)
        if one != two:
            raise ValueError(
                f"num_train_timesteps is {one} in the pipeline's scheduler, {two} in the plan: "
                f"{fix}"
            )
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    plan, given = (torch.stack([s.alpha(t), s.sigma(t)]) for s in (ours, theirs))
    away = ((plan - given).abs() / given.abs().clamp(min=1)).amax(0)
    if away.max() > 1e-4:
        k = int(away.argmax())
        names = "beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr"
        names = "sigma_min, sigma_max" if isinstance(ours, VE) else names
        raise ValueError(
            f"{names}: at t = {t[k]:g} the pipeline's scheduler has alpha {given[0, k]:.6g} and "
            f"sigma {given[1, k]:.6g}, the plan alpha {plan[0, k]:.6g} and sigma "
            f"{plan[1, k]:.6g}: {fix}"
        )
