"""Each scheduler that has an equivalent solver: the pipeline's own latents against ours.

The pipelines are real ones with random weights; both sides start from the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.interop import tiny
from tests.parity import problem

STEPS, PROMPTS = 10, ["a red cat", "dog"]
TRAILING = {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
BETWEEN = LINSPACE | {"num_train_timesteps": 105}  # at indices that are no integers
LEADING = {"timestep_spacing": "leading"}
KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = {"use_exponential_sigmas": True}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
WHOLE = {"clip_sample": False}
LEVEL = {"lower_order_final": False}  # to a level above zero, ours keeps its order
ENDS = {"final_sigmas_type": "sigma_min"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCALED = {"beta_schedule": "scaled_linear"}
ZERO = {"rescale_betas_zero_snr": True}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
FULL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, **SCALED}
TRAINED = [0.01 + 1e-4 * i for i in range(100)]

CHAIN: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", WHOLE | TRAILING, "ddim"),
    ("DDIMScheduler", WHOLE | LEADING | {"steps_offset": 1, "set_alpha_to_one": False}, "ddim"),
    ("DDIMScheduler", WHOLE | TRAILING | V, "ddim"),
    ("DDIMScheduler", WHOLE | TRAILING | X0, "ddim"),
    ("DDIMScheduler", WHOLE | TRAILING | V | ZERO, "ddim"),
    ("DDIMScheduler", WHOLE | TRAILING | SCALED, "ddim"),
    ("DDIMScheduler", WHOLE | TRAILING | V | COSINE, "ddim"),
    ("DDIMScheduler", WHOLE | TRAILING | {"trained_betas": TRAINED}, "ddim"),
    ("DPMSolverMultistepScheduler", TRAILING, "dpm-solver++2m"),
    ("DPMSolverMultistepScheduler", LINSPACE, "dpm-solver++2m"),
    ("DPMSolverMultistepScheduler", KARRAS, "dpm-solver++2m"),
    ("DPMSolverMultistepScheduler", EXPONENTIAL, "dpm-solver++2m"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "dpm-solver++2m"),
    ("DPMSolverMultistepScheduler", KARRAS | V | COSINE, "dpm-solver++2m"),
    ("DPMSolverMultistepScheduler", FLOW, "dpm-solver++2m"),
    (
        "DPMSolverMultistepScheduler",
        TRAILING | LEVEL | ENDS | {"algorithm_type": "dpmsolver"},
        "dpm-solver-2m",
    ),
    ("DPMSolverMultistepScheduler", FULL | KARRAS | V, "dpm-solver++2m"),
    # With ZERO its state x/alpha starts at 4096 and single precision loses 4e-5 of it.
    ("EulerDiscreteScheduler", FULL | TRAILING | V, "ddim"),
    ("DDIMScheduler", WHOLE | FULL | TRAILING | V | ZERO, "ddim"),
    ("DEISMultistepScheduler", TRAILING | LEVEL, "deis-logrhoab1"),
    ("DEISMultistepScheduler", KARRAS | LEVEL, "deis-logrhoab1"),
    ("DEISMultistepScheduler", TRAILING | LEVEL | {"solver_order": 3}, "dpm-solver-3m"),
    ("UniPCMultistepScheduler", TRAILING, "unipc-b2-2"),
    ("UniPCMultistepScheduler", KARRAS, "unipc-b2-2"),
    ("UniPCMultistepScheduler", TRAILING | LEVEL | ENDS | {"solver_type": "bh1"}, "unipc-b1-2"),
    ("UniPCMultistepScheduler", TRAILING | LEVEL | ENDS | {"solver_order": 3}, "unipc-b2-3"),
    ("UniPCMultistepScheduler", FLOW, "unipc-b2-2"),
    ("PNDMScheduler", TRAILING, "f-pndm"),
    ("HeunDiscreteScheduler", TRAILING, "edm"),
    ("HeunDiscreteScheduler", BETWEEN, "edm"),
    ("HeunDiscreteScheduler", KARRAS, "edm"),
    ("EulerDiscreteScheduler", TRAILING, "ddim"),
    ("EulerDiscreteScheduler", BETWEEN, "ddim"),
    ("EulerDiscreteScheduler", LEADING | {"steps_offset": 1}, "ddim"),
    ("EulerDiscreteScheduler", KARRAS | V, "ddim"),
    ("EulerDiscreteScheduler", EXPONENTIAL, "ddim"),
    ("EulerDiscreteScheduler", TRAILING | ENDS, "ddim"),
    ("EDMEulerScheduler", {}, "ddim"),
    ("EDMEulerScheduler", V | ENDS | {"sigma_max": 3.0}, "ddim"),
    ("EDMDPMSolverMultistepScheduler", {}, "dpm-solver++2m"),
    ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}, "dpm-solver++2m"),
]


def named(case: tuple[str, dict[str, Any], Any]) -> str:
    name, options, _ = case
    values = (k if v is True else f"{v}"[:20] for k, v in options.items() if v is not False)
    return "-".join((name.removesuffix("Scheduler"), *values))


@pytest.fixture(scope="module")
def pipeline(diffusers: Any, transformers: Any) -> Any:
    return tiny.stable_diffusion(diffusers, transformers, diffusers.DDIMScheduler())


def scheduler(diffusers: Any, name: str, options: dict[str, Any]) -> Any:
    base = {} if name.startswith("EDM") else tiny.MILD
    return getattr(diffusers, name)(**{**base, **options})


def theirs(pipeline: Any, noise: Tensor, **more: Any) -> Tensor:
    return pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        latents=noise,
        output_type="latent",
        height=16,
        width=16,
        **{"guidance_scale": 1.0, **more},
    ).images


def ours(pipeline: Any, noise: Tensor, solver: Any, **more: Any) -> Tensor:
    denoiser = ef.interop.diffusers.load(pipeline)
    nodes = denoiser.nodes(STEPS)
    family = denoiser.facts.family
    ends_at_zero = pipeline.scheduler.config.get("final_sigmas_type", "zero") == "zero"
    x = ef.sample(
        denoiser,
        noise.shape,
        solver=solver,
        times=nodes,
        x_init=denoiser.start(noise, STEPS),
        denoise=family == "edm" and ends_at_zero,
        **denoiser.condition(PROMPTS),
        **more,
    )
    # A scheduler of sigma/alpha keeps x/alpha.
    last = denoiser.schedule.alpha(nodes[-1]).item()
    return x / last if family == "ratio" else x


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert 0.1 < theirs.abs().max() < 20
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CHAIN, ids=named)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_deterministic(
    diffusers: Any, pipeline: Any, case: tuple[str, dict[str, Any], str]
) -> None:
    name, options, solver = case
    pipeline.scheduler = scheduler(diffusers, name, options)
    noise = tiny.normal(2, 4, 8, 8)
    agree(ours(pipeline, noise, solver), theirs(pipeline, noise))


STOCHASTIC: list[tuple[str, dict[str, Any], Any]] = [
    ("DDPMScheduler", WHOLE | TRAILING | {"variance_type": "fixed_small"}, "ddpm"),
    ("DDPMScheduler", TRAILING | {"clip_sample": True, "clip_sample_range": 0.8}, "ddpm"),
    ("DDIMScheduler", WHOLE | TRAILING, ("ddim", 0.5)),
    ("EulerAncestralDiscreteScheduler", TRAILING, ("ddim", 1.0)),
    (
        "DPMSolverMultistepScheduler",
        TRAILING | {"algorithm_type": "sde-dpmsolver++"},
        "sde-dpm-solver++2m",
    ),
]


@pytest.mark.parametrize("case", STOCHASTIC, ids=named)
def test_stochastic_with_the_same_noise(
    diffusers: Any, pipeline: Any, case: tuple[str, dict[str, Any], Any], monkeypatch: Any
) -> None:
    name, options, solver = case
    pipeline.scheduler = scheduler(diffusers, name, options)

    def draws() -> Iterator[Tensor]:
        for step in range(STEPS):
            yield ef.noise.normal(5, range(2), step + 1, (4, 8, 8), torch.float32)

    stream = draws()
    module = type(pipeline.scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *shape, **rest: next(stream))
    noise = tiny.normal(2, 4, 8, 8)
    eta = {}
    if isinstance(solver, tuple):
        eta = {"eta": solver[1]} if name.startswith("DDIM") else {}
        solver = ef.solvers.get(solver[0], eta=solver[1])
    agree(ours(pipeline, noise, solver, seed=5), theirs(pipeline, noise, **eta))


@pytest.mark.parametrize(("order", "solver"), [(1, "ddim"), (2, "deis-rhoab1"), (3, "deis-rhoab2")])
def test_lms(diffusers: Any, order: int, solver: str) -> None:
    """On an exact denoiser, since no pipeline passes an order; up to the step to sigma = 0."""
    lms = diffusers.LMSDiscreteScheduler(**tiny.MILD, **TRAILING)
    schedule = ef.interop.diffusers.schedule_of(lms).schedule
    nodes = ef.interop.diffusers.nodes(lms, STEPS)
    f, x = problem.denoiser(schedule), problem.start(schedule, nodes[0])
    alpha, sigma = problem.levels(schedule, nodes)
    lms.set_timesteps(STEPS)
    y = x / alpha[0]
    for k, t in enumerate(lms.timesteps[:-1]):
        lms.scale_model_input(y, t)
        state = y * alpha[k]
        y = lms.step((state - alpha[k] * f(state, nodes[k])) / sigma[k], t, y, order).prev_sample
    end = ef.solvers.get(solver).plan(schedule, times=nodes[:-1]).run(f, x)
    torch.testing.assert_close(end / alpha[-2], y, rtol=1e-5, atol=1e-6)


def test_a_grid_off_by_one_index_is_seen(diffusers: Any, pipeline: Any) -> None:
    """The mutant of the comparisons above: index i at t = i / T."""
    pipeline.scheduler = scheduler(diffusers, "DDIMScheduler", WHOLE | TRAILING)
    noise = tiny.normal(2, 4, 8, 8)
    denoiser = ef.interop.diffusers.load(pipeline)
    nodes = [max(t - 0.01, 0) for t in denoiser.nodes(STEPS)]
    condition = denoiser.condition(PROMPTS)
    shifted = ef.sample(
        denoiser, noise.shape, solver="ddim", times=nodes, x_init=noise, **condition
    )
    with pytest.raises(AssertionError):
        agree(shifted, theirs(pipeline, noise))


FLOWS: list[tuple[str, str, dict[str, Any]]] = [
    ("Euler", "euler", {}),
    ("Euler", "euler", {"shift": 3.0}),
    ("Euler", "euler", {"shift": 2.0, **KARRAS}),
    ("Heun", "heun", {}),
    ("Heun", "heun", {"shift": 3.0}),
]


@pytest.mark.parametrize(("name", "solver", "options"), FLOWS, ids=str)
def test_flow_matching(
    diffusers: Any, transformers: Any, name: str, solver: str, options: dict[str, Any]
) -> None:
    kind = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")
    pipe = tiny.stable_diffusion_3(diffusers, transformers, kind(**options))
    noise = tiny.normal(2, 4, 8, 8)
    agree(ours(pipe, noise, solver), theirs(pipe, noise))


def test_shifts_by_the_size_of_the_picture(diffusers: Any, transformers: Any) -> None:
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    shifting = kind(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    pipe = tiny.stable_diffusion_3(diffusers, transformers, shifting)
    noise = tiny.normal(2, 4, 8, 8)
    agree(ours(pipe, noise, "euler"), theirs(pipe, noise))
    denoiser = ef.interop.diffusers.load(pipe)
    assert denoiser.nodes(STEPS, shape=(4, 16, 16)) != denoiser.nodes(STEPS)


@pytest.mark.parametrize("shifting", [True, False])
def test_flux(diffusers: Any, transformers: Any, shifting: bool) -> None:
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    pipe = tiny.flux_pipeline(
        diffusers, transformers, kind(use_dynamic_shifting=shifting, shift=2.0)
    )
    noise = tiny.normal(2, 4, 8, 8)
    packed = pipe._pack_latents(noise, 2, 4, 8, 8)
    end = pipe(
        PROMPTS,
        num_inference_steps=STEPS,
        latents=packed,
        output_type="latent",
        height=16,
        width=16,
        guidance_scale=2.5,
    ).images
    denoiser = ef.interop.diffusers.load(pipe, shape=(4, 8, 8))
    x = ef.sample(
        denoiser,
        noise.shape,
        solver="euler",
        times=denoiser.nodes(STEPS),
        x_init=denoiser.start(noise, STEPS),
        **denoiser.condition(PROMPTS, guidance=2.5),
    )
    agree(x, pipe._unpack_latents(end, 16, 16, pipe.vae_scale_factor))
