"""What `load` makes of real pipelines: the network's output, conditions, latents, statistics."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.interop import tiny

PROMPTS = ["a red cat", "dog"]
TIMES = torch.tensor([0.31, 1.0], dtype=torch.float64)


def ddim(diffusers: Any, **options: Any) -> Any:
    options = {"clip_sample": False, "timestep_spacing": "trailing", **options}
    return diffusers.DDIMScheduler(**{**tiny.MILD, **options})


def loaded(pipeline: Any, folder: Path) -> tuple[Any, Any]:
    """The denoisers of a pipeline and of the folder that it was saved to."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    return ef.interop.diffusers.load(pipeline), ef.interop.diffusers.load(folder)


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_pixels(diffusers: Any, tmp_path: Path) -> None:
    network = tiny.unet(diffusers)
    pipe = diffusers.DDIMPipeline(network, ddim(diffusers))
    x = tiny.normal(2, 3, 8, 8)
    with torch.no_grad():
        theirs = network(x, torch.tensor([30, 99])).sample
        for denoiser in loaded(pipe, tmp_path):
            assert denoiser.shape == (3, 8, 8)
            assert torch.equal(denoiser.noise(x, TIMES), theirs)


def test_a_class_label(diffusers: Any, tmp_path: Path) -> None:
    network = tiny.unet(diffusers, num_class_embeds=5)
    pipe = diffusers.DDPMPipeline(network, ddim(diffusers))
    x = tiny.normal(2, 3, 8, 8)
    with torch.no_grad():
        theirs = network(x, torch.tensor([30, 99]), torch.tensor([4, 0])).sample
        for denoiser in loaded(pipe, tmp_path):
            assert torch.equal(denoiser.noise(x, TIMES, **denoiser.condition([4, 0])), theirs)


def test_a_network_alone_with_its_scheduler(diffusers: Any, tmp_path: Path) -> None:
    network, x = tiny.unet(diffusers), tiny.normal(2, 3, 8, 8)
    network.save_pretrained(tmp_path)
    scheduler = ddim(diffusers, prediction_type="v_prediction")
    with torch.no_grad():
        theirs = network(x, torch.tensor([30, 99])).sample
        for source in (network, tmp_path):
            for facts in (scheduler, dict(scheduler.config, _class_name="DDIMScheduler")):
                denoiser = ef.interop.diffusers.load(source, scheduler=facts)
                assert torch.equal(denoiser.v(x, TIMES), theirs)


@pytest.mark.parametrize("variance", [True, False])
def test_dit_with_guidance(diffusers: Any, tmp_path: Path, variance: bool) -> None:
    channels = {} if variance else {"out_channels": 4}
    pipe = tiny.dit_pipeline(diffusers, ddim(diffusers), **channels)
    torch.manual_seed(0)
    theirs = pipe([7, 0], 3.0, num_inference_steps=5, output_type="pt").images
    torch.manual_seed(0)
    noise = torch.randn(2, 4, 4, 4)
    for denoiser in loaded(pipe, tmp_path):
        guided = ef.guidance.ClassifierFree(denoiser, 3.0, null=denoiser.null())
        condition = denoiser.condition(["cock", 0])
        assert condition["label"].tolist() == [7, 0]
        nodes, x = denoiser.nodes(5), denoiser.start(noise, 5)
        latents = ef.sample(guided, noise.shape, solver="ddim", times=nodes, x_init=x, **condition)
        with torch.no_grad():
            images = denoiser.decode(latents)
        torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-5, atol=1e-5)


KINDS = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", [None, "blue dog"])
def test_prompts_with_guidance(
    diffusers: Any, transformers: Any, tmp_path: Path, kind: str, negative: str | None
) -> None:
    flow = kind.endswith("3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0) if flow else ddim(diffusers)
    pipe = getattr(tiny, kind)(diffusers, transformers, scheduler)
    noise = tiny.normal(2, 4, 8, 8)
    theirs = pipe(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=noise,
        output_type="pt",
        height=16,
        width=16,
    ).images
    solver = "euler" if flow else "ddim"
    for denoiser in loaded(pipe, tmp_path):
        guided = ef.guidance.ClassifierFree(denoiser, 3.0, null=denoiser.null(negative))
        condition = denoiser.condition(PROMPTS, size=(16, 16))
        nodes, x = denoiser.nodes(5), denoiser.start(noise, 5)
        for batch in (None, 1):
            latents = ef.sample(
                guided, noise.shape, solver=solver, times=nodes, x_init=x, batch=batch, **condition
            )
            with torch.no_grad():
                images = (denoiser.decode(latents) / 2 + 0.5).clamp(0, 1)
            torch.testing.assert_close(images, theirs, rtol=1e-5, atol=1e-5)


def test_flux_from_a_folder(diffusers: Any, transformers: Any, tmp_path: Path) -> None:
    """Its loop is compared in test_schedulers.py; here the folder is, and the packing."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = tiny.flux_pipeline(diffusers, transformers, scheduler)
    one, two = loaded(pipe, tmp_path)
    condition = one.condition(PROMPTS, guidance=2.5)
    assert equal(condition, two.condition(PROMPTS, guidance=2.5))
    assert equal(one.null("blue dog"), two.null("blue dog"))
    x = tiny.normal(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(one(x, TIMES, **condition), two(x, TIMES, **condition))
        theirs = pipe.transformer(
            hidden_states=pipe._pack_latents(x, 2, 4, 8, 8),
            timestep=TIMES.float(),
            guidance=condition["guidance"],
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["text"],
            txt_ids=torch.zeros(condition["text"].shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        ).sample
        theirs = pipe._unpack_latents(theirs, 16, 16, pipe.vae_scale_factor)
    torch.testing.assert_close(one.velocity(x, TIMES, **condition), theirs, rtol=1e-6, atol=1e-6)


def test_clipped_predictions(diffusers: Any) -> None:
    network = tiny.calm(tiny.unet(diffusers), "conv_out", share=1.0)
    scheduler = ddim(diffusers, clip_sample=True, clip_sample_range=0.8)
    pipe = tiny.quiet(diffusers.DDIMPipeline(network, scheduler))
    options = {"num_inference_steps": 5, "output_type": "pt", "use_clipped_model_output": True}
    torch.manual_seed(0)
    theirs = torch.as_tensor(2 * pipe(2, **{**options, "output_type": "np"}).images - 1)
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 8, 8)
    denoiser = ef.interop.diffusers.load(pipe)
    x = ef.sample(denoiser, noise.shape, solver="ddim", times=denoiser.nodes(5), x_init=noise)
    assert (x.abs() == 0.8).any() and (x.abs() < 0.7).any()
    torch.testing.assert_close(x.permute(0, 2, 3, 1), theirs, rtol=1e-5, atol=1e-5)
    x0, eps = denoiser(noise, 0.5), denoiser.noise(noise, 0.5)
    alpha, sigma = denoiser.schedule.alpha(0.5).item(), denoiser.schedule.sigma(0.5).item()
    torch.testing.assert_close(alpha * x0 + sigma * eps, noise)


def test_half_precision_runs_as_the_pipeline_does(diffusers: Any) -> None:
    network = tiny.unet(diffusers).to(torch.bfloat16)
    denoiser = ef.interop.diffusers.load(network, scheduler=ddim(diffusers))
    x = tiny.normal(2, 3, 8, 8)
    with torch.no_grad():
        theirs = network(x.to(torch.bfloat16), torch.tensor([30, 99])).sample.float()
        assert torch.equal(denoiser.noise(x, TIMES), theirs)


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents(diffusers: Any, shift: float | None) -> None:
    pipe = tiny.dit_pipeline(diffusers, ddim(diffusers))
    pipe.vae = tiny.vae(diffusers, shift_factor=shift)
    denoiser = ef.interop.diffusers.load(pipe)
    images = tiny.normal(2, 3, 8, 8).clamp(-1, 1)
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
        latents = denoiser.encode(images)
        torch.testing.assert_close(latents, (posterior.mean - (shift or 0)) * 0.7)
        draw = denoiser.encode(images, seed=3) - latents
        z = ef.noise.normal(3, range(2), 0, draw.shape[1:], torch.float32)
        torch.testing.assert_close(draw, 0.7 * posterior.std * z)
        torch.testing.assert_close(denoiser.decode(latents), pipe.vae.decode(posterior.mean).sample)


def test_statistics_of_a_loaded_model(diffusers: Any) -> None:
    """A network that says v = 0 describes a standard normal law: x_0 = alpha x_t is its answer."""
    network = tiny.unet(diffusers)
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    denoiser = ef.interop.diffusers.load(network, scheduler=scheduler)
    statistics = ef.Statistics.from_model(denoiser)
    torch.testing.assert_close(statistics.mean, torch.zeros(3, 8, 8).double())
    unit = torch.eye(192, dtype=torch.float64)
    torch.testing.assert_close(statistics.covariance(), unit, rtol=1e-3, atol=1e-3)


def test_statistics_under_a_prompt(diffusers: Any, transformers: Any) -> None:
    """One row of a condition stands for all probes: a constant answer has its own mean."""
    pipe = tiny.stable_diffusion(diffusers, transformers, ddim(diffusers, prediction_type="sample"))
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, 0.3)
    denoiser = ef.interop.diffusers.load(pipe)
    statistics = ef.Statistics.from_model(denoiser, **denoiser.condition("a red cat"))
    torch.testing.assert_close(statistics.mean, torch.full((4, 8, 8), 0.3).double())
    assert statistics.variance.max() < 1e-4


def test_a_plan_as_the_scheduler_of_a_folder(diffusers: Any, tmp_path: Path) -> None:
    """`load` reads the model's facts from it as from the scheduler whose place it took."""
    own = pytest.importorskip("ebbflow.interop.diffusers.scheduler", reason="needs diffusers")
    old, network = ddim(diffusers, prediction_type="v_prediction"), tiny.unet(diffusers)
    before = ef.interop.diffusers.load(network, scheduler=old)
    plan = ef.solvers.get("dpm-solver++2m").plan(before.schedule, 4)
    pipe = diffusers.DDPMPipeline(network, own.Scheduler(plan, like=old))
    x = tiny.normal(2, 3, 8, 8)
    with torch.no_grad():
        for denoiser in loaded(pipe, tmp_path):
            assert denoiser.prediction == "v"
            assert torch.equal(denoiser(x, TIMES), before(x, TIMES))
            assert ef.sample(denoiser, x.shape, plan=plan, x_init=x).shape == x.shape


def test_the_example_of_the_package(diffusers: Any, transformers: Any) -> None:
    code, other = re.findall(r"```python\n(.*?)```", ef.interop.diffusers.__doc__, re.DOTALL)
    assert "Scheduler(plan)" in other  # tests/interop/test_scheduler.py
    pipe = tiny.stable_diffusion(diffusers, transformers, ddim(diffusers))
    names = {"ef": ef, "pipeline": pipe, "noise": tiny.normal(2, 4, 8, 8)}
    exec(code, names)
    assert names["images"].shape == (2, 3, 16, 16)
    prompts = {"guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
    theirs = pipe(
        ["a cat", "a red dog"], num_inference_steps=10, latents=names["noise"], **prompts
    ).images
    torch.testing.assert_close(names["again"], theirs, rtol=1e-5, atol=1e-5)


def test_nothing_of_diffusers_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, ebbflow as ef\n"
        "for name in ('load', 'nodes', 'schedule_of', 'start'): "
        "getattr(ef.interop.diffusers, name)\n"
        "print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
