"""A diffusers pipeline as a `Denoiser`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow import noise
from ebbflow.denoiser import Denoiser, Frozen, convert
from ebbflow.interop.diffusers import conditions, folders, grid
from ebbflow.interop.diffusers.adapters import ADAPTERS, Adapter, Flux
from ebbflow.interop.diffusers.schedules import Facts, refuse, schedule_of, scheduler_of
from ebbflow.schedules import TimeLike, along, as_time

ROLES = ("unet", "transformer")
"""Where a pipeline keeps its denoising network."""


def load(
    source: Any, scheduler: Any = None, *, shape: tuple[int, ...] | None = None
) -> PipelineDenoiser:
    """A denoiser that computes what a diffusers pipeline computes at each of its timesteps.

    Args:
        source: a folder that `save_pretrained` wrote, a pipeline, or a network (or the folder of
            one) together with its scheduler.
        scheduler: what replaces the pipeline's own: a scheduler or its configuration.
        shape: of one sample (for latent models, of its latents), (channels, height, width); the
            network's own unless given, and any where it states none.

    Of a folder only safetensors weights are read; nothing is downloaded, no code of it is run.
    Raises FileNotFoundError or ValueError, naming the part and its field, for a folder that is
    incomplete, unknown parts, parts that do not fit each other, and unknown prediction types.
    """
    pipeline: Any = None
    if isinstance(source, str | Path):
        alone = scheduler is not None and not (Path(source) / "model_index.json").is_file()
        source = folders.network_of(source) if alone else folders.pipeline_of(source)
    if isinstance(source, nn.Module):
        role, network, vae = "network", source, None
    else:
        pipeline = source
        parts = getattr(source, "components", None)
        if not isinstance(parts, dict):
            raise TypeError(
                f"load takes a folder, a diffusers pipeline or a network, got {source!r:.60}"
            )
        role = next((r for r in ROLES if parts.get(r) is not None), None)
        if role is None:
            raise ValueError(f"{type(source).__name__} has none of the parts {', '.join(ROLES)}")
        network, vae = parts[role], parts.get("vae")
        scheduler = parts.get("scheduler") if scheduler is None else scheduler
    name = type(network).__name__
    if name not in ADAPTERS:
        refuse(f"{role}._class_name", name, ADAPTERS)
    if scheduler is None:
        raise ValueError(f"a {name} alone does not say what it predicts: give scheduler=…")
    if not hasattr(scheduler, "config"):
        scheduler = scheduler_of(scheduler)
    facts = schedule_of(scheduler)
    adapter = ADAPTERS[name](network, facts, role)
    _fit(adapter, vae, pipeline)
    return PipelineDenoiser(adapter, facts, scheduler, shape or adapter.shape, vae, pipeline)


class PipelineDenoiser(Denoiser):
    """`E[x_0 | x_t]` by a diffusers network, with what its pipeline knows besides.

    Where the scheduler clips x_0 (`clip_sample`), so does this, and what follows from x_0 follows
    from the clipped one (diffusers' DDIM does so with `use_clipped_model_output=True`).
    `net` is the adapter, `net.network` the diffusers model; `vae` the autoencoder or None.
    """

    def __init__(
        self,
        net: Adapter,
        facts: Facts,
        scheduler: Any,
        shape: tuple[int, ...] | None,
        vae: nn.Module | None,
        pipeline: Any,
    ) -> None:
        super().__init__(
            net,
            facts.schedule,
            facts.prediction,
            shape,
            time=facts.time,
            sigma_data=facts.sigma_data,
        )
        self.facts = facts
        self.scheduler = scheduler
        self.vae = vae
        self.pipeline = pipeline
        parts = getattr(pipeline, "components", {})
        encoders = {k: m for k, m in parts.items() if k.startswith("text_encoder") and m}
        self.encoders = nn.ModuleDict(encoders)  # they move with the network

    @property
    def adapter(self) -> Adapter:
        assert isinstance(self.net, Adapter)
        return self.net

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device  # pyright: ignore

    # --- the model -----------------------------------------------------------------------------

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        if self.facts.limit is None:
            return super().at(t, x, target)
        return self._clipped(super().at(t, x), t, x, target)

    def prepare(self, times: tuple[float, ...], x: Tensor, target: str = "x0") -> list[Frozen]:
        if self.facts.limit is None:
            return super().prepare(times, x, target)
        plain = super().prepare(times, x)
        return [self._clipped(f, t, x, target) for f, t in zip(plain, times, strict=True)]

    def _clipped(self, frozen: Frozen, t: TimeLike, x: Tensor, target: str) -> Frozen:
        limit = self.facts.limit
        a, b = convert("x0", target, self.schedule, as_time(t), self.sigma_data)
        a, b = (along(value, x).to(x.device, x.dtype) for value in (a, b))

        def clipped(x: Tensor, **condition: Any) -> Tensor:
            x0 = frozen(x, **condition).clamp(-limit, limit)  # pyright: ignore
            return x0 if target == "x0" else a * x + b * x0

        return clipped

    def save(self, folder: str | Path) -> None:
        raise ValueError(
            "a diffusers model is saved by its pipeline, pipeline.save_pretrained(folder), and "
            "ef.interop.diffusers.load(folder) reads it back"
        )

    # --- its grid ------------------------------------------------------------------------------

    def nodes(self, steps: int, shape: Sequence[int] | None = None) -> tuple[float, ...]:
        """The times through which the pipeline goes in `steps` steps; see `grid.nodes`.

        shape: of one sample, where a shift depends on it and this denoiser states none.
        """
        return grid.nodes(self.scheduler, steps, **self._told(steps, shape))

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """The state at the first node that the pipeline makes of standard normal noise."""
        told = self._told(steps, noise.shape[1:])
        return grid.start(self.scheduler, noise, steps, **told)

    def _told(self, steps: int, shape: Sequence[int] | None) -> dict[str, Any]:
        """What the pipeline tells its scheduler besides the number of steps."""
        config, told = self.scheduler.config, {}
        if config.get("use_dynamic_shifting"):
            size = self.shape if shape is None else shape
            if size is None or not hasattr(self.net, "tokens"):
                raise ValueError(
                    "scheduler.use_dynamic_shifting is True: the nodes depend on the size of the "
                    "sample; give shape=(channels, height, width)"
                )
            tokens = self.net.tokens(*size[-2:])  # pyright: ignore
            told["mu"] = grid.shift_of(self.scheduler, tokens)
        if isinstance(self.net, Flux) and not config.get("use_flow_sigmas"):
            told["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        return told

    # --- conditions ----------------------------------------------------------------------------

    def condition(
        self,
        prompts: str | int | Sequence[Any] | Tensor,
        size: tuple[int, int] | None = None,
        guidance: float = 3.5,
    ) -> dict[str, Tensor]:
        """The condition of prompts, or of class labels, by the pipeline's own encoders.

        size: (height, width) of the picture, for models that are told it; that of `shape` unless
        given. guidance: for models that are told a guidance scale. Returns tensors of one row each,
        to be passed as `denoiser(x, t, **condition)` or `ef.sample(denoiser, …, **condition)`.
        """
        if "text" not in self.adapter.fields:
            return conditions.of_labels(self.adapter, self.pipeline, prompts, self.device)  # pyright: ignore
        if size is None and self.shape is not None:
            factor = getattr(self.pipeline, "vae_scale_factor", 1)
            size = (self.shape[-2] * factor, self.shape[-1] * factor)
        return conditions.of_prompts(
            self.adapter,
            self.pipeline,
            prompts,  # pyright: ignore
            self.device,
            size,
            guidance,
        )

    def null(self, negative: str | None = None) -> dict[str, Tensor]:
        """The condition of none, of one row, for `ef.guidance.ClassifierFree(…, null=…)`.

        negative: a prompt to be guided away from.
        """
        if "text" in self.adapter.fields:
            return conditions.of_nothing(self.adapter, self.pipeline, negative, self.device)
        config = self.adapter.config
        if config.get("num_embeds_ada_norm") is None:
            raise ValueError(
                f"{type(self.adapter.network).__name__} has no class that stands for none; give "
                "ClassifierFree the label with which this model was trained for it"
            )
        return {"label": torch.tensor([config["num_embeds_ada_norm"]], device=self.device)}

    # --- latents -------------------------------------------------------------------------------

    def encode(self, images: Tensor, seed: int | None = None) -> Tensor:
        """Latents of images (B, C, H, W) in [-1, 1]: `(z - shift_factor) scaling_factor`.

        z is the mean of the autoencoder's posterior, or with a seed a draw from it.
        """
        vae, scale, shift = self._autoencoder()
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        z = posterior.mean
        if seed is not None:
            draw = noise.normal(seed, range(len(z)), 0, z.shape[1:], z.dtype, z.device)
            z = z + posterior.std * draw
        return ((z - shift) * scale).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], not clipped, of latents: `z / scaling_factor + shift_factor`."""
        vae, scale, shift = self._autoencoder()
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample.to(latents.dtype)

    def _autoencoder(self) -> tuple[Any, float, float]:
        if self.vae is None:
            raise ValueError("this model has no autoencoder: its samples are images already")
        config: Any = self.vae.config
        return self.vae, config["scaling_factor"], config.get("shift_factor") or 0.0


def _fit(adapter: Adapter, vae: Any, pipeline: Any) -> None:
    """Raise ValueError, naming both fields, for parts that do not fit each other."""
    if vae is not None:
        name = type(vae).__name__
        if name not in folders.AUTOENCODERS:
            refuse("vae._class_name", name, folders.AUTOENCODERS)
        if vae.config["latent_channels"] != adapter.channels:
            raise ValueError(
                f"vae.latent_channels is {vae.config['latent_channels']} and the state of "
                f"{adapter.role} has {adapter.channels} channels: they must be equal"
            )
        if vae.config.get("latents_mean") is not None:
            raise ValueError("vae.latents_mean is set: latents scaled by channel are not read")
    encoder: Any = getattr(pipeline, "text_encoder", None)
    alone = getattr(pipeline, "text_encoder_2", None) is None
    if encoder is not None and alone and "text" in adapter.fields:
        width, told = encoder.config.hidden_size, adapter.fields["text"][-1]
        if width != told:
            raise ValueError(
                f"text_encoder.hidden_size is {width} and {adapter.role}.cross_attention_dim "
                f"{told}: they must be equal"
            )
