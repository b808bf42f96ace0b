"""diffusers' networks behind one call: `net(x, clock, **condition)` in the words of this library.

Conditions are tensors whose first axis is the batch: `label` (B,), a class; `text` (B, L, D), the
tokens of a prompt as its encoder gives them; `pooled` (B, D), the whole prompt; `sizes` (B, 6), the
picture sizes that SDXL is told; `guidance` (B,), the scale that guidance-distilled models are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow.files import exact_keys
from ebbflow.interop.diffusers.schedules import Facts


class Adapter(nn.Module):
    """A diffusers network that is told the time and the condition as its pipeline tells it.

    Outputs with twice the channels also predict a variance, which is cut off.

    Args:
        network: the diffusers model.
        facts: of its scheduler.
        role: its name in the pipeline, for messages.
    """

    def __init__(self, network: nn.Module, facts: Facts, role: str) -> None:
        super().__init__()
        self.network = network
        self.facts = facts
        self.role = role
        self.fields: Mapping[str, tuple[int | None, ...]] = {}
        """What the network may be told, and the shape of it after the batch (None: any size)."""
        self.required: frozenset[str] = frozenset()
        config: Any = network.config
        self.channels: int = config["in_channels"]
        out = config.get("out_channels") or self.channels
        if out not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"{role}.in_channels is {self.channels} and {role}.out_channels {out}: a denoiser "
                "returns as many channels as its state has, or twice as many with a variance"
            )

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one sample, as the network's configuration has it."""
        size = self.config.get("sample_size")
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels, height, width

    def forward(self, x: Tensor, clock: Tensor, **condition: Tensor) -> Tensor:
        rows = self.check(condition, len(x))
        output = self.call(x, self.facts.told(clock), rows)[:, : x.shape[1]]
        return -output if self.facts.sign < 0 else output

    def call(self, x: Tensor, told: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The network's output as it is, for timesteps (B,)."""
        raise NotImplementedError

    def check(self, condition: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
        """The condition with one row a sample; a single row stands for all of them.

        Raises ValueError, naming the field, for a condition that the network does not take.
        """
        where = f"the condition of {type(self.network).__name__}"
        exact_keys(condition, list(self.fields), where, optional=True)
        rows = {}
        for name in self.fields:
            value = condition.get(name)
            if value is None and name in self.required:
                raise ValueError(
                    f"{where} lacks {name!r}; denoiser.condition(…) makes it from prompts or labels"
                )
            if value is not None:
                shape = tuple(value.shape) if isinstance(value, Tensor) else (type(value).__name__,)
                known = (batch, *self.fields[name])
                pairs = zip(known[1:], shape[1:], strict=False)
                fits = len(shape) == len(known) and shape[0] in (1, batch)
                if not fits or any(size not in (None, own) for size, own in pairs):
                    sizes = ", ".join("any" if size is None else str(size) for size in known)
                    raise ValueError(f"{where}: {name!r} is {shape}, expected shape ({sizes})")
                rows[name] = value.expand(batch, *value.shape[1:])
        return rows


class UNet(Adapter):
    """UNet2DModel: pixels, and a class label where it was trained with one."""

    def __init__(self, network: nn.Module, facts: Facts, role: str) -> None:
        super().__init__(network, facts, role)
        _only(self.config, role, class_embed_type=(None, "timestep"))
        if getattr(network, "class_embedding", None) is not None:
            self.fields, self.required = {"label": ()}, frozenset(["label"])

    def call(self, x: Tensor, told: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        network: Any = self.network
        if self.config.get("time_embedding_type") == "learned":
            told = told.round().long()
        return network(x, told, class_labels=condition.get("label"), return_dict=False)[0]


class TextUNet(Adapter):
    """UNet2DConditionModel: a prompt by cross-attention; SDXL's pooled prompt and sizes."""

    def __init__(self, network: nn.Module, facts: Facts, role: str) -> None:
        super().__init__(network, facts, role)
        config = self.config
        _only(
            config,
            role,
            class_embed_type=(None,),
            addition_embed_type=(None, "text_time"),
            encoder_hid_dim_type=(None,),
            time_cond_proj_dim=(None,),
        )
        width = config["cross_attention_dim"]
        fields: dict[str, tuple[int | None, ...]] = {
            "text": (None, width if isinstance(width, int) else width[0])
        }
        if config.get("num_class_embeds") is not None:
            fields["label"] = ()
        if config.get("addition_embed_type") == "text_time":
            sizes = 6
            pooled = config["projection_class_embeddings_input_dim"]
            fields["pooled"] = (pooled - sizes * config["addition_time_embed_dim"],)
            fields["sizes"] = (sizes,)
        self.fields, self.required = fields, frozenset(fields)

    def call(self, x: Tensor, told: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        network: Any = self.network
        added = None
        if "pooled" in self.fields:
            added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]}
        return network(
            x,
            told,
            encoder_hidden_states=condition["text"],
            class_labels=condition.get("label"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class DiT(Adapter):
    """DiTTransformer2DModel: a class label; the label after the last one is the null class."""

    def __init__(self, network: nn.Module, facts: Facts, role: str) -> None:
        super().__init__(network, facts, role)
        self.fields, self.required = {"label": ()}, frozenset(["label"])

    def call(self, x: Tensor, told: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        network: Any = self.network
        return network(x, timestep=told, class_labels=condition["label"], return_dict=False)[0]


class SD3(Adapter):
    """SD3Transformer2DModel: a prompt's tokens and its pooled form."""

    def __init__(self, network: nn.Module, facts: Facts, role: str) -> None:
        super().__init__(network, facts, role)
        config = self.config
        self.fields = {
            "text": (None, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }
        self.required = frozenset(self.fields)

    def tokens(self, height: int, width: int) -> int:
        patch = self.config["patch_size"]
        return (height // patch) * (width // patch)

    def call(self, x: Tensor, told: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        network: Any = self.network
        return network(
            hidden_states=x,
            timestep=told,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]


class Flux(Adapter):
    """FluxTransformer2DModel: as `SD3`, on patches of 2 by 2 with their places.

    The state is the picture of latents (B, C, H, W), H and W even, not the list of patches.
    """

    def __init__(self, network: nn.Module, facts: Facts, role: str) -> None:
        super().__init__(network, facts, role)
        config = self.config
        fields: dict[str, tuple[int | None, ...]] = {
            "text": (None, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }
        if config["guidance_embeds"]:
            fields["guidance"] = ()
        self.fields, self.required = fields, frozenset(fields)
        self.channels //= 4

    def tokens(self, height: int, width: int) -> int:
        return (height // 2) * (width // 2)

    def call(self, x: Tensor, told: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        network: Any = self.network
        batch, channels, height, width = x.shape
        if height % 2 or width % 2:
            raise ValueError(f"latents of {height} by {width}: Flux takes even sizes")
        rows, columns = height // 2, width // 2
        patches = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)
        text = condition["text"]
        output = network(
            hidden_states=patches.reshape(batch, rows * columns, 4 * channels),
            timestep=told.to(x.dtype) / 1000,
            guidance=condition.get("guidance"),
            pooled_projections=condition["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=text.dtype),
            img_ids=places.reshape(-1, 3),
            return_dict=False,
        )[0]
        output = output.reshape(batch, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(batch, -1, height, width)


ADAPTERS: Mapping[str, type[Adapter]] = {
    "UNet2DModel": UNet,
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": DiT,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
}
"""The networks that `load` knows, by the name of their class."""


def _only(config: Any, role: str, **known: tuple[Any, ...]) -> None:
    for key, values in known.items():
        if config.get(key) not in values:
            raise ValueError(f"{role}.{key} is {config[key]!r}; known: {values}")
