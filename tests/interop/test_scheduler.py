"""`Scheduler(plan)` inside diffusers' own pipelines against `ef.sample` on the same network."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.interop import tiny

diffusers: Any = pytest.importorskip("diffusers", reason="runs diffusers' pipelines")
transformers: Any = pytest.importorskip("transformers", reason="runs text-to-image pipelines")

from ebbflow.interop.diffusers import load, nodes, schedule_of  # noqa: E402
from ebbflow.interop.diffusers.scheduler import Scheduler  # noqa: E402
from ebbflow.interop.diffusers.stepping import Run  # noqa: E402

NAMES = [
    "ddim",
    "dpm-solver++2m",
    "unipc-b2-3",
    "heun",
    "edm",
    "dpm-solver++3s",
    "f-pndm",
    "ddpm",
    "sde-dpm-solver++2m",
    "edm-churn",
    "unit-residual",
]
PIXELS, LATENTS = (3, 8, 8), (4, 8, 8)
# Made anew: a schedule that was read from a scheduler also knows what its network predicts.
CHAIN = ef.schedules.Betas(
    schedule_of(diffusers.DDPMScheduler(clip_sample=False, **tiny.MILD)).schedule.betas
)


def tame(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **tiny.MILD, **options})


def compiled(name: str, schedule: Any = CHAIN, steps: int | None = 4, **rest: Any) -> ef.Plan:
    plan = ef.solvers.get(name).plan(schedule, None if "times" in rest else steps, **rest)
    assert isinstance(plan, ef.Plan)
    return plan


def informed(shape: tuple[int, ...], kind: str, schedule: Any = CHAIN, steps: int = 4) -> ef.Plan:
    """Its coefficients are tensors, and its first query is not the initial state."""
    data = 0.7 * tiny.normal(40, *shape, seed=3).cumsum(-1) / 2 + 0.3
    return compiled(
        "gaussian-residual",
        schedule,
        steps,
        statistics=ef.Statistics.from_data(data, kind=kind),
    )


def ran(pipeline: Any, **call: Any) -> tuple[Tensor, list[Tensor]]:
    """What the last step returned, and what each call of the network was told as time."""
    scheduler, kept, told = pipeline.scheduler, [], []
    step = scheduler.step

    @functools.wraps(step)
    def spy(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        told.append(torch.as_tensor(args[1]))
        kept.append(result[0])
        return result

    with mock.patch.object(scheduler, "step", spy):
        pipeline(**call)
    return kept[-1], told


@torch.no_grad()
def close(one: Tensor, two: Tensor) -> bool:
    assert bool(torch.isfinite(two).all()) and two.abs().max() < 50
    return bool((one - two).abs().max() <= 1e-5 * max(1.0, float(two.abs().max())))


def pixels(scheduler: Any, kind: str = "DDPMPipeline", **options: Any) -> Any:
    unet = tiny.unet(diffusers, **options)
    pipeline = tiny.quiet(getattr(diffusers, kind)(unet=unet, scheduler=diffusers.DDIMScheduler()))
    pipeline.scheduler = scheduler  # DDIMPipeline makes a DDIMScheduler of what it is built with
    return pipeline


def wrapped(unet: Any, prediction: str = "noise", schedule: Any = CHAIN) -> ef.Denoiser:
    return ef.Denoiser(lambda x, t: unet(x, t).sample, schedule, prediction, time="step")


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize("name", NAMES)
def test_pixels(name: str, kind: str) -> None:
    plan = compiled(name)
    pipeline = pixels(Scheduler(plan, seed=5), kind)
    call = {"batch_size": 3, "num_inference_steps": 4, "output_type": "pt"}
    first, told = ran(pipeline, **call, generator=torch.manual_seed(1))
    again, _ = ran(pipeline, **call, generator=torch.manual_seed(1))
    x_init = torch.randn((3, *PIXELS), generator=torch.manual_seed(1))
    ours = ef.sample(wrapped(pipeline.unet), (3, *PIXELS), plan=plan, x_init=x_init, seed=5)
    assert close(first, ours)
    assert torch.equal(first, again)
    assert len(told) == plan.nfe


@pytest.mark.parametrize("kind", ["exact", "cosine"])
def test_tensor_coefficients_in_a_pipeline_that_does_not_scale_its_input(kind: str) -> None:
    plan = informed(PIXELS, kind)
    pipeline = pixels(Scheduler(plan))
    call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "pt"}
    end, told = ran(pipeline, **call, generator=torch.manual_seed(1))
    x_init = torch.randn((2, *PIXELS), generator=torch.manual_seed(1))
    assert close(end, plan.run(wrapped(pipeline.unet), x_init))
    assert len(told) == plan.nfe + 1
    pipeline.scheduler = Scheduler(plan, scales_input=True)
    with pytest.raises(ValueError, match="scales_input is True, but the pipeline did not call"):
        pipeline(**call)


def test_a_first_query_with_noise() -> None:
    plan = compiled("edm-churn", times=(0.9, 0.6, 0.3, 0.0))
    assert "Z" in plan.stages[0].query
    pipeline = pixels(Scheduler(plan, seed=2))
    end, _ = ran(pipeline, num_inference_steps=3, generator=torch.manual_seed(1))
    x_init = torch.randn((1, *PIXELS), generator=torch.manual_seed(1))
    assert close(end, plan.run(wrapped(pipeline.unet), x_init, seed=2))
    with pytest.raises(ValueError, match="scales_input is True, but the plan's first query draws"):
        Scheduler(plan, scales_input=True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions_by_the_configuration_of_the_pipelines_scheduler(prediction_type: str) -> None:
    old = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **tiny.MILD)
    plan = compiled("unipc-b2-2")
    pipeline = pixels(Scheduler.from_config(old.config, plan=plan))
    end, _ = ran(pipeline, num_inference_steps=4, generator=torch.manual_seed(2))
    x_init = torch.randn((1, *PIXELS), generator=torch.manual_seed(2))
    names = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
    ours = plan.run(wrapped(pipeline.unet, names[prediction_type]), x_init)
    assert close(end, ours)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    assert torch.equal(end, ran(pixels(Scheduler(plan, prediction_type)), **_like_last())[0])


def _like_last() -> dict[str, Any]:
    return {"num_inference_steps": 4, "generator": torch.manual_seed(2)}


def test_a_scheduler_that_clips_clips_here_as_in_load() -> None:
    old = diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=0.4, **tiny.MILD)
    pipeline = pixels(old)
    denoiser = load(pipeline)
    plan = compiled("dpm-solver++2m", denoiser.schedule)
    x_init = torch.randn((1, *PIXELS), generator=torch.manual_seed(2))
    for like in (old, old.config, pipeline, denoiser):
        scheduler = Scheduler(plan, like=like)
        assert scheduler.config.clip_sample_range == 0.4
        later = pixels(scheduler)
        end, _ = ran(later, num_inference_steps=4, generator=torch.manual_seed(2))
        assert close(end, plan.run(denoiser, x_init))
        assert end.abs().max() <= 0.4 + 1e-6
    pipeline.scheduler = Scheduler(plan, "epsilon", like=schedule_of(tame()))
    assert ran(pipeline, num_inference_steps=4, generator=torch.manual_seed(2))[0].abs().max() > 0.4


def test_a_schedule_carries_the_facts_of_its_network() -> None:
    facts = schedule_of(tame(prediction_type="v_prediction"))
    plan = compiled("ddim", facts.schedule)
    assert Scheduler(plan).facts == facts
    with pytest.raises(ValueError, match=r"prediction_type is 'epsilon'.*'v_prediction'"):
        Scheduler(plan, "epsilon")


def test_learned_variances_are_dropped() -> None:
    old = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, **tiny.MILD)
    plan = compiled("ddim")
    pipeline = pixels(Scheduler(plan, like=old), out_channels=6)
    end, _ = ran(pipeline, num_inference_steps=4, generator=torch.manual_seed(2))
    x_init = torch.randn((1, *PIXELS), generator=torch.manual_seed(2))
    unet = pipeline.unet
    net = ef.Denoiser(lambda x, t: unet(x, t).sample[:, :3], CHAIN, "noise", time="step")
    assert close(end, plan.run(net, x_init))


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales_input", [False, True])
@pytest.mark.parametrize("name", ["ddim", "unipc-b2-3", "heun", "ddpm", "gaussian-residual"])
def test_classes_with_guidance(name: str, scales_input: bool) -> None:
    shape = (4, 4, 4)
    plan = informed(shape, "cosine") if name == "gaussian-residual" else compiled(name)
    dit = tiny.dit(diffusers)
    pipeline = tiny.quiet(
        diffusers.DiTPipeline(
            transformer=dit,
            vae=tiny.vae(diffusers),
            scheduler=Scheduler(plan, scales_input=scales_input),
        )
    )
    labels, scale = [3, 77], 2.5
    end, told = ran(
        pipeline,
        class_labels=labels,
        guidance_scale=scale,
        num_inference_steps=4,
        generator=torch.manual_seed(4),
    )
    net = ef.Denoiser(
        lambda x, t, label: dit(x, t, class_labels=label).sample[:, :4],
        CHAIN,
        "noise",
        time="step",
    )
    guided = ef.guidance.ClassifierFree(net, scale, {"label": 1000})
    x_init = torch.randn((2, *shape), generator=torch.manual_seed(4))
    ours = ef.sample(guided, (2, *shape), plan=plan, x_init=x_init, label=torch.tensor(labels))
    assert close(end[:2], ours)
    assert len(told) == plan.nfe + (name == "gaussian-residual" and not scales_input)


# --- text -----------------------------------------------------------------------------------------


def prompt_net(pipeline: Any, text: str) -> Callable[..., Tensor]:
    """The network of Stable Diffusion on one prompt, guided as the pipeline guides it."""
    with torch.no_grad():
        some, none = pipeline.encode_prompt(text, "cpu", 1, True, "")

    def net(x: Tensor, t: Tensor) -> Tensor:
        def one(prompt: Tensor) -> Tensor:
            states = prompt.expand(len(x), -1, -1)
            return pipeline.unet(x, t, encoder_hidden_states=states).sample

        return torch.lerp(one(none), one(some), 3.0)

    return net


TEXT = {"prompt": "a red cat", "guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.mark.parametrize("name", [*NAMES, "gaussian-residual"])
def test_text_to_latents(name: str) -> None:
    plan = informed(LATENTS, "cosine") if name == "gaussian-residual" else compiled(name)
    scheduler = Scheduler(plan, scales_input=True)
    pipeline = tiny.stable_diffusion(diffusers, transformers, scheduler)
    x_init = tiny.normal(1, *LATENTS)
    call = {**TEXT, "num_inference_steps": 4, "latents": x_init}
    end = pipeline(**call, output_type="latent").images
    net = ef.Denoiser(prompt_net(pipeline, "a red cat"), CHAIN, "noise", time="step")
    assert close(end, ef.sample(net, end.shape, plan=plan, x_init=x_init))
    picture = pipeline(**call, output_type="pt").images
    decoded = pipeline.vae.decode(end / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(picture, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_text_on_the_betas_of_stable_diffusion_2() -> None:
    old = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = tiny.stable_diffusion(diffusers, transformers, old)
    schedule = schedule_of(old).schedule
    plan = compiled("dpm-solver++3m", schedule, 6)
    pipeline.scheduler = Scheduler.from_config(pipeline.scheduler.config, plan=plan)
    x_init = tiny.normal(1, *LATENTS)
    call = {**TEXT, "num_inference_steps": 6, "latents": x_init, "output_type": "latent"}
    end = pipeline(**call).images
    net = ef.Denoiser(prompt_net(pipeline, "a red cat"), schedule, "v", time="step")
    assert close(end, plan.run(net, x_init))


# --- flows ----------------------------------------------------------------------------------------

FLOW = ef.schedules.Linear()


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++2m", "heun", "ddpm", "unit-residual"])
def test_stable_diffusion_3(name: str) -> None:
    plan = compiled(name, FLOW)
    sd3 = tiny.sd3(diffusers)
    old = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = tiny.quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=sd3,
            scheduler=Scheduler.from_config(old.config, plan=plan),
            vae=tiny.vae(diffusers),
            **{f"text_encoder{i}": None for i in ("", "_2", "_3")},
            **{f"tokenizer{i}": None for i in ("", "_2", "_3")},
        )
    )
    names = ["prompt_embeds", "negative_prompt_embeds"]
    pooled = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    text = {key: tiny.normal(1, 5, 32, seed=i) for i, key in enumerate(names)}
    text |= {key: tiny.normal(1, 24, seed=i) for i, key in enumerate(pooled)}
    x_init = tiny.normal(1, *LATENTS)
    size = 8 * pipeline.vae_scale_factor
    call = {"height": size, "width": size, "guidance_scale": 2.0, "num_inference_steps": 4}
    end, told = ran(pipeline, **call, **text, latents=x_init, output_type="latent")

    def net(x: Tensor, t: Tensor) -> Tensor:
        some, none = (
            sd3(x, text[one], pooled_projections=text[two], timestep=1000 * t).sample
            for one, two in zip(names, pooled, strict=True)
        )
        return torch.lerp(none, some, 2.0)

    assert close(
        end, ef.sample(ef.Denoiser(net, FLOW, "velocity"), end.shape, plan=plan, x_init=x_init)
    )
    moves = name == "unit-residual"
    times = [stage.time for stage in plan.stages]
    assert told[moves:] == pytest.approx([1000 * t for t in times], rel=1e-6)


@pytest.mark.parametrize("name", ["ddim", "unipc-b2-3", "unit-residual"])
def test_flux(name: str) -> None:
    plan = compiled(name, FLOW)
    flux = tiny.flux(diffusers)
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    old = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = tiny.quiet(
        diffusers.FluxPipeline(
            transformer=flux,
            scheduler=Scheduler(plan, like=old),
            vae=tiny.vae(diffusers),
            **dict.fromkeys(parts),
        )
    )
    text = {"prompt_embeds": tiny.normal(1, 5, 16), "pooled_prompt_embeds": tiny.normal(1, 16)}
    size = 8 * pipeline.vae_scale_factor
    x_init = tiny.normal(1, 16, 16)
    call = {"height": size, "width": size, "num_inference_steps": 4, "guidance_scale": 3.5}
    end = pipeline(**call, **text, latents=x_init, output_type="latent").images
    places = pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return flux(
            x,
            timestep=t,
            guidance=torch.full([1], 3.5),
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled_prompt_embeds"],
            txt_ids=torch.zeros(5, 3),
            img_ids=places,
        ).sample

    assert close(end, plan.run(ef.Denoiser(net, FLOW, "velocity"), x_init))


@pytest.mark.parametrize(("prediction_type", "sign"), [("epsilon", 1.0), ("v_prediction", -1.0)])
def test_preconditioned_networks(prediction_type: str, sign: float) -> None:
    old = diffusers.EDMEulerScheduler(
        sigma_min=0.01, sigma_max=20.0, sigma_data=0.6, prediction_type=prediction_type
    )
    schedule = schedule_of(old).schedule
    plan = compiled("edm", schedule)
    scheduler = Scheduler(plan, like=old)
    unet = tiny.unet(diffusers)
    scheduler.set_timesteps(4)
    x_init = tiny.normal(2, *PIXELS) * scheduler.init_noise_sigma
    assert scheduler.init_noise_sigma == pytest.approx(20.0)
    x = x_init
    with torch.no_grad():
        for t in scheduler.timesteps:  # as a pipeline does
            output = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
    net = ef.Denoiser(
        lambda x, t: sign * unet(x, t).sample,
        schedule,
        "edm",
        time="quarter_log_sigma",
        sigma_data=0.6,
    )
    assert close(x, ef.sample(net, x.shape, plan=plan, x_init=x_init))


# --- noise and state ------------------------------------------------------------------------------


def test_noise_from_the_pipelines_generator() -> None:
    plan = compiled("ddpm")
    pipeline = pixels(Scheduler(plan, seed=None))
    call = {"num_inference_steps": 4, "batch_size": 2}
    one, _ = ran(pipeline, **call, generator=torch.manual_seed(1))
    seed = pipeline.scheduler.run_seed
    two, _ = ran(pipeline, **call, generator=torch.manual_seed(1))
    assert torch.equal(one, two) and pipeline.scheduler.run_seed == seed
    x_init = torch.randn((2, *PIXELS), generator=torch.manual_seed(1))
    ours = ef.sample(wrapped(pipeline.unet), one.shape, plan=plan, x_init=x_init, seed=seed)
    assert close(one, ours)
    ran(pipeline, **call, generator=torch.manual_seed(2))
    assert pipeline.scheduler.run_seed != seed
    with pytest.raises(ValueError, match="generator is a list of 2"):
        pipeline(**call, generator=[torch.manual_seed(1), torch.manual_seed(2)])


def loop(scheduler: Any, net: Callable[..., Tensor], x: Tensor, stop: int | None = None) -> Tensor:
    with torch.no_grad():
        for t in scheduler.timesteps[:stop]:
            x = scheduler.step(net(x, t), t, x).prev_sample
    return x


def test_runs_are_begun_anew_and_copies_stand_alone() -> None:
    plan = compiled("dpm-solver++3s")
    scheduler = Scheduler(plan)
    x = tiny.normal(2, *PIXELS)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + 0.01 * t.reshape(-1, 1, 1, 1))

    scheduler.set_timesteps(4)
    loop(scheduler, net, x, stop=2)  # interrupted
    other = copy.deepcopy(scheduler)
    for one in (other, scheduler):
        one.set_timesteps(4)
    halves = [loop(one, net, x) for one in (scheduler, other)]
    denoiser = ef.Denoiser(net, CHAIN, "noise", time="step")
    assert torch.equal(halves[0], halves[1])
    assert repr(scheduler) == "Scheduler(dpm-solver++3s, 4 steps, 10 calls, noise)"
    assert ef.interop.diffusers.Scheduler is Scheduler
    assert close(halves[0], plan.run(denoiser, x))
    with pytest.raises(ValueError, match="call set_timesteps before step, all 10 calls are done"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dpm-solver++2m", "gaussian-residual"])
def test_half_precision_latents_keep_registers_in_single_precision(
    name: str, dtype: torch.dtype
) -> None:
    plan = informed(PIXELS, "cosine") if name == "gaussian-residual" else compiled(name)
    scheduler = Scheduler(plan)
    scheduler.set_timesteps(4)
    x = tiny.normal(2, *PIXELS).to(dtype)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x.float() + 0.01 * t.reshape(-1, 1, 1, 1)).to(dtype)

    end = loop(scheduler, net, x)
    denoiser = ef.Denoiser(lambda x, t: net(x.to(dtype), t), CHAIN, "noise", time="step")
    assert end.dtype == dtype
    assert torch.equal(end, plan.run(denoiser, x).to(dtype))


def test_a_callback_may_change_the_state_where_the_plan_asks_at_it() -> None:
    def halved(pipeline: Any, i: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": kept["latents"] * 0.5} if i == 1 else {}

    def run(name: str) -> Tensor:
        scheduler = Scheduler(compiled(name))
        pipeline = tiny.stable_diffusion(diffusers, transformers, scheduler)
        call = {**TEXT, "num_inference_steps": 4, "latents": x, "output_type": "latent"}
        end = pipeline(**call, callback_on_step_end=halved).images
        net = ef.Denoiser(prompt_net(pipeline, "a red cat"), CHAIN, "noise", time="step")
        plan = scheduler.plan
        parts = [compiled(name, times=nodes) for nodes in (plan.times[:3], plan.times[2:])]
        half = parts[0].run(net, x) * 0.5
        assert close(end, parts[1].run(net, half))
        return end

    x = tiny.normal(1, *LATENTS)
    run("ddim")
    with pytest.raises(ValueError, match="sample was changed after 2 of the plan's 10 calls"):
        run("dpm-solver++3s")


def test_what_a_pipeline_writes_on_its_latents_is_seen() -> None:
    scheduler = Scheduler(compiled("dpm-solver++3s"))
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2]
    x = tiny.normal(2, *PIXELS)
    held = scheduler.step(x, first, x, return_dict=False)[0]
    held.mul_(0.5)
    with pytest.raises(ValueError, match="sample was changed after 1 of the plan's 10 calls"):
        scheduler.step(x, second, held)


@pytest.mark.parametrize(
    "kind", ["StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"]
)
def test_pictures_that_begin_with_a_picture(kind: str) -> None:
    theirs = tame(timestep_spacing="trailing", steps_offset=1)
    plan = compiled("ddim", times=nodes(theirs, 4))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    call = {"image": tiny.normal(1, 3, 16, 16, seed=1).sigmoid(), "strength": 1.0}
    call |= {"mask_image": mask, "height": 16, "width": 16} if "Inpaint" in kind else {}
    ends = []
    for scheduler in (theirs, Scheduler(plan, like=theirs)):
        parts = tiny.stable_diffusion(diffusers, transformers, scheduler).components
        pipeline = tiny.quiet(getattr(diffusers, kind)(**parts, requires_safety_checker=False))
        more = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}
        more["generator"] = torch.manual_seed(0)
        ends.append(pipeline("a red cat", **call, **more).images)
    assert close(ends[1], ends[0])


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numbers", "exact", "cosine"])
def test_saved_and_loaded_with_the_pipeline(kind: str, tmp_path: Path) -> None:
    old = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **tiny.MILD)
    plan = compiled("unipc-b2-3") if kind == "numbers" else informed(PIXELS, kind)
    pipeline = pixels(Scheduler(plan, like=old, seed=7))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["ebbflow.interop.diffusers.scheduler", "Scheduler"]
    assert (tmp_path / "scheduler" / "plan.safetensors").exists() == (kind != "numbers")
    loaded = tiny.quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path))
    schedulers = [
        loaded.scheduler,
        Scheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        Scheduler.from_pretrained(tmp_path / "scheduler"),
        Scheduler.from_config(pipeline.scheduler.config),
        Scheduler.from_config(loaded.scheduler.config),
    ]
    ends = []
    for scheduler in [pipeline.scheduler, *schedulers]:
        assert scheduler.plan == plan and scheduler.facts == pipeline.scheduler.facts
        assert scheduler.config.seed == 7
        loaded.scheduler = scheduler
        call = {"num_inference_steps": 4, "generator": torch.manual_seed(3)}
        ends.append(ran(loaded, **call)[0])
    assert all(close(end, ends[0]) for end in ends)
    if kind != "exact":  # products of matrices round as these lie in memory
        assert all(torch.equal(end, ends[0]) for end in ends)


def test_the_configuration_leads_back_to_diffusers_own_schedulers() -> None:
    old = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **tiny.MILD)
    for scheduler in (
        Scheduler(compiled("ddim"), like=old),
        Scheduler(compiled("ddim"), "v_prediction"),
    ):
        back = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        assert back.config.prediction_type == "v_prediction"
        assert torch.allclose(back.alphas_cumprod, old.alphas_cumprod, rtol=1e-5)
        assert torch.allclose(scheduler.alphas_cumprod, old.alphas_cumprod, rtol=1e-5)
        assert schedule_of(scheduler) == scheduler.facts
        assert load(pixels(scheduler)).prediction == "v"


def test_files_that_were_cut_or_changed(tmp_path: Path) -> None:
    Scheduler(informed(PIXELS, "cosine")).save_pretrained(tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"plan\.safetensors is missing"):
        Scheduler.from_pretrained(tmp_path)
    Scheduler(compiled("ddim")).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"facts": {**config["facts"], "rounding": "up"}}, r"config\.facts\.rounding is 'up'"),
        ({"facts": {**config["facts"], "scale": -1}}, r"config\.facts\.scale is -1"),
        ({"facts": {**config["facts"], "clip": 1}}, r"config\.facts: unknown key 'clip'"),
        ({"facts": {**config["facts"], "prediction": "w"}}, "unknown prediction 'w'"),
        ({"plan": {**config["plan"], "version": 9}}, "plan version 9"),
        ({"plan": None}, r"config\.plan is missing"),
    ]:
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            Scheduler.from_pretrained(tmp_path)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Scheduler(p, like=tame(num_train_timesteps=90)), "num_train_timesteps is 90"),
        (lambda p: Scheduler(p, like=tame(beta_end=0.05)), "beta_start, beta_end"),
        (lambda p: Scheduler(p, like=tame(beta_schedule="scaled_linear")), "beta_schedule"),
        (lambda p: Scheduler(p, "sample", like=tame()), "prediction_type is 'sample'.*'epsilon'"),
        (lambda p: Scheduler(p, "noise"), "prediction_type is 'noise'; known: epsilon"),
        (
            lambda p: Scheduler(p, like=diffusers.FlowMatchEulerDiscreteScheduler()),
            "plan.schedule is Betas, but the pipeline's scheduler describes Linear",
        ),
        (lambda p: Scheduler(compiled("ddim", ef.schedules.VP())), "plan.schedule is VP"),
        (lambda p: Scheduler(compiled("ddim", times=(0.2, 0.9))), "towards noise"),
        (lambda p: Scheduler(replace(p, centred=True)), "plan.centred is true"),
        (lambda p: Scheduler.from_config(tame().config), r"config\.plan is missing"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    plan = compiled("ddim", times=(0.9, 0.5, 0.2))
    with pytest.raises(ValueError, match=message):
        make(plan)


def test_a_walk_is_refused() -> None:
    walk: Any = ef.solvers.get("langevin-corrector").plan(CHAIN, 4)
    with pytest.raises(TypeError, match=r"plan is a .*: a scheduler runs an ef.Plan"):
        Scheduler(walk)


def test_refused_while_it_runs() -> None:
    scheduler = Scheduler(compiled("heun"))
    x = tiny.normal(2, *PIXELS)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 99, x)
    with pytest.raises(ValueError, match=r"num_inference_steps is 50.* 4 steps of 7 network calls"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match=r"timesteps are .*a plan brings its own times"):
        scheduler.set_timesteps(timesteps=[99, 50, 20, 10])
    with pytest.raises(ValueError, match=r"sigmas are .*a plan brings its own times"):
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.5, 0.2])
    scheduler.set_timesteps(7)
    scheduler.set_timesteps(timesteps=scheduler.timesteps.tolist())
    scheduler.set_timesteps(4)
    first = scheduler.timesteps[0]
    with pytest.raises(ValueError, match=r"strength=1\.0"):
        scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match=r"timestep is .* at call 1 of 7, expected 99"):
        scheduler.step(x, scheduler.timesteps[2], x)
    with pytest.raises(ValueError, match=r"eta is 0\.5"):
        scheduler.step(x, first, x, eta=0.5)
    with pytest.raises(ValueError, match=r"model_output .* has shape \(2, 6, 8, 8\)"):
        scheduler.step(torch.cat([x, x], 1), first, x)
    with pytest.raises(ef.NonFinite, match="model_output of call 1 of 7 is not finite"):
        scheduler.step(x / 0, first, x)
    held = scheduler.step(x, first, x).prev_sample
    with pytest.raises(ValueError, match=r"sample has shape \(1, 3, 8, 8\), at the last call \(2"):
        scheduler.step(x[:1], scheduler.timesteps[1], held[:1])
    scheduler = Scheduler(informed(PIXELS, "cosine"))
    scheduler.set_timesteps(4)
    small = x[..., :4]
    with pytest.raises(ValueError, match=r"coefficients are for samples of shape \(3, 8, 8\)"):
        scheduler.step(small, scheduler.timesteps[0], small)


def test_a_pipeline_that_starts_in_the_middle_is_refused() -> None:
    scheduler = Scheduler(compiled("ddim"))
    parts = tiny.stable_diffusion(diffusers, transformers, scheduler).components
    pipeline = tiny.quiet(
        diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    )
    image = tiny.normal(1, 3, 16, 16).sigmoid()
    with pytest.raises(ValueError, match=r"begin_index is 2: .*strength=1\.0"):
        pipeline("a cat", image=image, strength=0.5, num_inference_steps=4)


# --- noise for training ---------------------------------------------------------------------------


def test_noise_is_added_as_diffusers_adds_it() -> None:
    x, z = tiny.normal(3, *PIXELS, seed=1), tiny.normal(3, *PIXELS, seed=2)
    theirs, scheduler = tame(), Scheduler(compiled("ddim"))
    for t in (torch.tensor([0, 40, 99]), torch.tensor([7])):
        assert torch.allclose(scheduler.add_noise(x, z, t), theirs.add_noise(x, z, t), atol=2e-6)
        ours = scheduler.get_velocity(x, z, t)
        assert torch.allclose(ours, theirs.get_velocity(x, z, t), atol=2e-6)
    scheduler = Scheduler(compiled("unit-residual"))
    scheduler.set_timesteps(4)
    begin = scheduler.timesteps[:1]  # the first call's time is not that of the initial state
    assert torch.allclose(scheduler.add_noise(x, z, begin), CHAIN.add_noise(x, 1.0, z), atol=2e-6)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(5)
    scheduler = Scheduler(compiled("ddim", FLOW))
    t = flow.timesteps[2:3]
    assert torch.allclose(scheduler.scale_noise(x, t, z), flow.scale_noise(x, t, z), atol=2e-6)


# --- what the tests above would catch -------------------------------------------------------------


def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tiny.normal(2, *PIXELS)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + 0.01 * t.reshape(-1, 1, 1, 1))

    def away(name: str) -> float:
        plan = compiled(name)
        scheduler = Scheduler(plan)
        scheduler.set_timesteps(4)
        ours = plan.run(ef.Denoiser(net, CHAIN, "noise", time="step"), x)
        return float((loop(scheduler, net, x) - ours).abs().max())

    assert away("heun") == away("ddim") == 0
    with monkeypatch.context() as patch:  # hand out the state where a stage asks elsewhere
        patch.setattr(Run, "asked", property(lambda run: run.state, _keep_state), raising=False)
        assert away("heun") > 1e-2
    with monkeypatch.context() as patch:  # tell the network the index after the right one
        facts = type(schedule_of(tame()))
        told = facts.told
        patch.setattr(facts, "told", lambda self, clock: told(self, clock) + 1)
        assert away("ddim") > 1e-3


def _keep_state(run: Any, asked: Tensor) -> None:
    held = run.registers[0] if run.registers else None
    run.state = asked if held is None else held


def test_a_plan_on_a_loaded_schedule_knows_prediction_and_clipping():
    """DDPMScheduler clips by default and may predict v: nothing but the plan says so."""
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=50, prediction_type="v_prediction", clip_sample=True
    )
    pipeline = diffusers.DDPMPipeline(tiny.unet(diffusers), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = ef.interop.diffusers.load(pipeline)
    plan = ef.solvers.get("dpm-solver++2m").plan(denoiser.schedule, 5)
    noise = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(1))
    ours = ef.sample(denoiser, noise.shape, plan=plan, x_init=noise)
    pipeline.scheduler = ef.interop.diffusers.Scheduler(plan)
    generator = torch.Generator().manual_seed(1)
    images = pipeline(2, generator, num_inference_steps=5, output_type="np").images
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    assert (ours.clamp(-1, 1) - theirs).abs().max() < 1e-5
