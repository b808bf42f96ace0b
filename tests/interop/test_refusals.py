"""What does not fit is refused, before anything is read of it, by the name of its field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ebbflow as ef
from tests.interop import tiny

load = ef.interop.diffusers.load


def ddim(diffusers: Any, **options: Any) -> Any:
    return diffusers.DDIMScheduler(**{**tiny.MILD, **options})


@pytest.fixture
def folder(diffusers: Any, tmp_path: Path) -> Path:
    """A pipeline of pixels on disk, which `load` takes as it is."""
    diffusers.DDIMPipeline(tiny.unet(diffusers), ddim(diffusers)).save_pretrained(tmp_path)
    assert load(tmp_path).shape == (3, 8, 8)
    return tmp_path


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes them out."""
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


SCHEDULER: list[tuple[dict[str, Any], str]] = [
    ({"prediction_type": "foo"}, "scheduler.prediction_type is 'foo'; known: epsilon, v_pred"),
    ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'?"),
    ({"beta_schedule": "cosine"}, "scheduler.beta_schedule is 'cosine'; known: linear, scaled"),
    (
        {"beta_scheduel": "linear"},
        "scheduler.beta_scheduel is a key that no scheduler has; did you",
    ),
    (
        {"beta_end": 3.0},
        "scheduler.trained_betas, scheduler.beta_start, scheduler.beta_end: betas[",
    ),
    ({"num_train_timesteps": -5}, "scheduler.num_train_timesteps is -5"),
    ({"rescale_betas_zero_snr": True}, "scheduler.rescale_betas_zero_snr: the last step has no"),
    ({"trained_betas": [0.1, 0.2]}, "scheduler.trained_betas has 2 entries, and scheduler.num_tr"),
    ({"beta_start": "low"}, "scheduler: DDIMScheduler refuses its configuration"),
    ({"thresholding": True}, "scheduler.thresholding is True"),
    ({"_class_name": "DDPMScheduler"}, "scheduler._class_name is 'DDPMScheduler'"),
    ({"prediction_type": "flow_prediction"}, "scheduler.use_flow_sigmas is not True"),
]


@pytest.mark.parametrize(("values", "message"), SCHEDULER, ids=lambda v: str(v)[:40])
def test_scheduler_fields(folder: Path, values: dict[str, Any], message: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


INDEX: list[tuple[dict[str, Any], str]] = [
    (
        {"_class_name": "MyPipeline"},
        "model_index._class_name is 'MyPipeline'; did you mean 'DDPMPipeline'?",
    ),
    ({"_class_name": ["code", "MyPipeline"]}, "model_index._class_name is ['code', 'MyPipeline']"),
    ({"unet": ["code", "UNet"]}, "model_index.unet is ['code', 'UNet']; known: diffusers.UNet2D"),
    ({"unet": ["diffusers", "UNet1DModel"]}, "model_index.unet is ['diffusers', 'UNet1DModel']"),
    ({"scheduler": ["diffusers", "LCMScheduler"]}, "model_index.scheduler is"),
    (
        {"unet": ["diffusers", "DDIMScheduler"]},
        "model_index.unet is ['diffusers', 'DDIMScheduler']",
    ),
    ({"scheduler": ["diffusers", "UNet2DModel"]}, "known: diffusers.DDIMScheduler"),
    ({"unet": None}, "lacks ['unet'], which DDIMPipeline needs"),
    ({"unet": ["diffusers", "UNet2DConditionModel"]}, "unet._class_name is 'UNet2DModel'"),
]


@pytest.mark.parametrize(("values", "message"), INDEX, ids=lambda v: str(v)[:40])
def test_index_fields(folder: Path, values: dict[str, Any], message: str) -> None:
    edit(folder / "model_index.json", **values)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def test_no_pipeline_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        load(tmp_path)
    with pytest.raises(TypeError, match="load takes a folder, a diffusers pipeline or a network"):
        load(3)


def test_a_network_alone(folder: Path, diffusers: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"load\(folder, scheduler=…\)"):
        load(folder / "unet")
    with pytest.raises(ValueError, match="UNet2DModel alone does not say what it predicts"):
        load(tiny.unet(diffusers))
    with pytest.raises(ValueError, match=r"network\._class_name is 'Linear'; known: UNet2DModel"):
        load(torch.nn.Linear(2, 2), scheduler=ddim(diffusers))


def test_missing_parts(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler has no scheduler_config\.json"):
        load(folder)


def pickled(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, unet / "diffusion_pytorch_model.bin")


def cut_short(unet: Path) -> None:
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_a_tensor(unet: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = unet / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.weight"]
    save_file(tensors, path)


def with_a_stranger(unet: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = unet / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "stranger": torch.zeros(2)}, path)


def elsewhere(unet: Path) -> None:
    target = unet.parent.parent / "elsewhere"
    unet.rename(target)
    unet.symlink_to(target)


def shards_elsewhere(unet: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "../../secret.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def wider(unet: Path) -> None:
    edit(unet / "config.json", block_out_channels=[8, 32])


def adapted(unet: Path) -> None:
    (unet / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')


WEIGHTS: list[tuple[Callable[[Path], None], str]] = [
    (pickled, "pickled weights only (diffusion_pytorch_model.bin)"),
    (cut_short, "unet: UNet2DModel cannot be read"),
    (without_a_tensor, "missing ['conv_out.weight']"),
    (with_a_stranger, "unknown ['stranger']"),
    (elsewhere, "leads out of"),
    (shards_elsewhere, 'weight_map names "../../secret.safetensors"'),
    (adapted, "adapter_config.json names another model"),
    (wider, "unet"),
]


@pytest.mark.parametrize(("spoil", "message"), WEIGHTS, ids=lambda v: getattr(v, "__name__", ""))
def test_weights(
    diffusers: Any, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    diffusers.DDIMPipeline(tiny.unet(diffusers), ddim(diffusers)).save_pretrained(folder)
    spoil(folder / "unet")
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def test_half_precision_variants_are_found(diffusers: Any, tmp_path: Path) -> None:
    pipe = diffusers.DDIMPipeline(tiny.unet(diffusers), ddim(diffusers))
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert load(tmp_path).shape == (3, 8, 8)


def test_parts_that_do_not_fit_each_other(diffusers: Any, transformers: Any) -> None:
    pipe = tiny.stable_diffusion(diffusers, transformers, ddim(diffusers))
    pipe.vae = tiny.vae(diffusers, latent_channels=8)
    with pytest.raises(ValueError, match=r"vae\.latent_channels is 8 and the state of unet has 4"):
        load(pipe)
    pipe.vae = tiny.vae(diffusers)
    pipe.unet = tiny.text_unet(diffusers, cross_attention_dim=32)
    with pytest.raises(ValueError, match=r"text_encoder\.hidden_size is 16 and unet\.cross_att"):
        load(pipe)
    pipe.unet = tiny.text_unet(diffusers, in_channels=9)
    with pytest.raises(ValueError, match=r"unet\.in_channels is 9 and unet\.out_channels 4"):
        load(pipe)
    pipe.unet = tiny.text_unet(diffusers, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match=r"unet\.time_cond_proj_dim is 8; known: \(None,\)"):
        load(pipe)


def test_conditions(diffusers: Any, transformers: Any) -> None:
    pipe = tiny.stable_diffusion(diffusers, transformers, ddim(diffusers))
    denoiser, x = load(pipe), tiny.normal(2, 4, 8, 8)
    text = denoiser.condition(["a cat", "dog"])["text"]
    where = "the condition of UNet2DConditionModel"
    with pytest.raises(ValueError, match=f"{where} lacks 'text'; denoiser.condition"):
        denoiser(x, 0.5)
    with pytest.raises(ValueError, match=f"{where}: unknown key 'txt'; did you mean 'text'?"):
        denoiser(x, 0.5, txt=text)
    with pytest.raises(ValueError, match=r"'text' is \(2, 8, 9\), expected shape \(2, any, 16\)"):
        denoiser(x, 0.5, text=text[..., :9])
    with pytest.raises(ValueError, match=r"'text' is \(3, 8, 16\), expected shape \(2, any, 16\)"):
        denoiser(x, 0.5, text=torch.cat([text, text[:1]]))
    with pytest.raises(ValueError, match="'text' is \\('str',\\), expected shape"):
        denoiser(x, 0.5, text="a cat")
    with pytest.raises(ValueError, match="shape"):
        denoiser(tiny.normal(2, 3, 8, 8), 0.5, text=text)


def test_labels(diffusers: Any) -> None:
    denoiser = load(tiny.dit_pipeline(diffusers, ddim(diffusers)))
    with pytest.raises(ValueError, match="label 1000 lies outside 0 … 999"):
        denoiser.condition([3, 1000])
    with pytest.raises(ValueError, match="label 'cat' is not one of the pipeline's 3 names"):
        denoiser.condition("cat")
    network = tiny.unet(diffusers, num_class_embeds=5)
    classes = load(network, scheduler=ddim(diffusers))
    with pytest.raises(ValueError, match="UNet2DModel has no class that stands for none"):
        classes.null()
    with pytest.raises(ValueError, match="no autoencoder"):
        classes.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="takes no class labels"):
        load(tiny.unet(diffusers), scheduler=ddim(diffusers)).condition([1])
    with pytest.raises(ValueError, match="saved by its pipeline"):
        classes.save("anywhere")


def test_grids_that_no_plan_has(diffusers: Any) -> None:
    nodes = ef.interop.diffusers.nodes
    with pytest.raises(
        ValueError, match=r"timestep_spacing is 'linspace': at 10 of 100 steps DDIM"
    ):
        nodes(ddim(diffusers, timestep_spacing="linspace"), 10)
    with pytest.raises(
        ValueError, match=r"timestep_spacing is 'trailing': at 30 of 100 steps DDIM"
    ):
        nodes(ddim(diffusers, timestep_spacing="trailing"), 30)
    with pytest.raises(ValueError, match="KDPM2DiscreteScheduler are not the nodes"):
        nodes(diffusers.KDPM2DiscreteScheduler(), 10)
    with pytest.raises(ValueError, match=r"steps must be an integer of at least 1, got 0"):
        nodes(ddim(diffusers), 0)
    with pytest.raises(ValueError, match=r"use_dynamic_shifting is True: give mu"):
        nodes(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 10)
    beyond = diffusers.EulerDiscreteScheduler(sigma_max=1e4, use_karras_sigmas=True)
    with pytest.raises(
        ValueError, match=r"scheduler\.sigma_max, scheduler\.sigma_min: the grid has"
    ):
        nodes(beyond, 10)


def test_a_signal_that_rises_towards_noise(diffusers: Any) -> None:
    """Some schedulers put 2^-24 for the zero at the end, which can lie above the last but one."""
    rising = diffusers.EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    assert rising.alphas_cumprod[-1] > rising.alphas_cumprod[-2]
    with pytest.raises(ValueError, match=r"scheduler\.rescale_betas_zero_snr: EulerDiscrete"):
        ef.interop.diffusers.schedule_of(rising)
    zero = diffusers.DDIMScheduler.from_config(rising.config)
    schedule = ef.interop.diffusers.schedule_of(zero).schedule
    assert schedule.log_snr(1.0) == -torch.inf
