"""The levels, the clocks and the words of diffusers' schedulers, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ebbflow as ef
from ebbflow.denoiser import CLOCKS
from ebbflow.schedules import VE, VP, Betas, Linear, Schedule

TABLES: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"num_train_timesteps": 3, "trained_betas": [0.1, 0.5, 0.9]},
]


@pytest.mark.parametrize("options", TABLES, ids=str)
def test_levels_are_the_scheduler_s_own(diffusers: Any, options: dict[str, Any]) -> None:
    """Index i at t = (i + 1) / T, to the bits of single precision that the pipeline computes in."""
    scheduler = diffusers.DDIMScheduler(**options)
    schedule = ef.interop.diffusers.schedule_of(scheduler).schedule
    kept = scheduler.alphas_cumprod.double()
    t = torch.arange(1, len(kept) + 1, dtype=torch.float64) / len(kept)
    torch.testing.assert_close(schedule.alpha(t) ** 2, kept, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - kept, rtol=1e-9, atol=0)


RESHAPED = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_flow_sigmas")
NAMES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 10])
def test_the_network_is_told_the_pipeline_s_timesteps(
    diffusers: Any, name: str, spacing: str, steps: int
) -> None:
    kind = getattr(diffusers, name)
    takes = kind.__init__.__wrapped__.__code__.co_varnames
    for reshaped in (None, *(key for key in RESHAPED if key in takes)):
        options = {"timestep_spacing": spacing} if "timestep_spacing" in takes else {}
        if reshaped is not None:
            options[reshaped] = True
        if reshaped == "use_flow_sigmas":
            options["prediction_type"] = "flow_prediction"
        scheduler = kind(**options)
        try:
            nodes = ef.interop.diffusers.nodes(scheduler, steps)
        except ValueError as error:  # a grid that no plan has: see test_refusals.py
            assert name == "DDIMScheduler" and "timestep_spacing" in str(error)
            continue
        facts = ef.interop.diffusers.schedule_of(scheduler)
        clock = CLOCKS[facts.time](facts.schedule, torch.tensor(nodes, dtype=torch.float64))
        scheduler.set_timesteps(steps)
        theirs = torch.unique_consecutive(scheduler.timesteps).float()
        ours = facts.told(clock.float())[: len(theirs)]
        ulp = 2 * torch.finfo(torch.float32).eps * theirs.abs()
        assert bool(((ours - theirs).abs() <= ulp).all()), (reshaped, ours, theirs)
        if facts.rounding in ("nearest", "down"):
            assert torch.equal(ours, theirs)


BACK: list[tuple[str, Schedule, str, float | None]] = [
    ("DDIMScheduler", Betas([0.01, 0.1, 0.3]), "noise", None),
    ("UniPCMultistepScheduler", Betas([0.01, 0.1, 0.3]), "v", None),
    ("EulerDiscreteScheduler", Betas([0.01, 0.1, 0.3]), "x0", None),
    ("FlowMatchEulerDiscreteScheduler", Linear(), "velocity", None),
    ("EDMEulerScheduler", VE(0.01, 50.0), "edm", 0.7),
]


@pytest.mark.parametrize(("name", "schedule", "prediction", "data"), BACK)
def test_there_and_back(
    diffusers: Any, name: str, schedule: Schedule, prediction: str, data: float | None
) -> None:
    options = ef.interop.diffusers.options_of(schedule, prediction, data)
    facts = ef.interop.diffusers.schedule_of({"_class_name": name, **options})
    assert (facts.prediction, facts.sigma_data) == (prediction, data)
    t = torch.linspace(0.05, 1, 9, dtype=torch.float64)
    for level in ("alpha", "sigma"):
        ours = getattr(facts.schedule, level)(t)
        torch.testing.assert_close(ours, getattr(schedule, level)(t), rtol=1e-6, atol=1e-6)


def test_what_diffusers_has_no_words_for() -> None:
    with pytest.raises(ValueError, match="VP with prediction 'noise' has no diffusers scheduler"):
        ef.interop.diffusers.options_of(VP(), "noise")


def test_the_last_node(diffusers: Any) -> None:
    """What `set_alpha_to_one` and `final_sigmas_type` say."""
    nodes = ef.interop.diffusers.nodes
    for one, end in ((True, 0.0), (False, 1 / 1000)):
        assert nodes(diffusers.DDIMScheduler(set_alpha_to_one=one), 10)[-1] == end
    for kind, end in (("zero", 0.0), ("sigma_min", 1 / 1000)):
        solver = diffusers.DPMSolverMultistepScheduler(final_sigmas_type=kind)
        assert nodes(solver, 10)[-1] == end
    times = torch.tensor(nodes(diffusers.EDMEulerScheduler(), 6), dtype=torch.float64)
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(6)
    expected = theirs.sigmas[:-1].double()
    torch.testing.assert_close(VE().sigma(times), expected, rtol=1e-6, atol=0)
    assert times[0] == 1 and times[-1] == 0
