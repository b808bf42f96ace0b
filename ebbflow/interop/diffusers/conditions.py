"""Conditions from prompts and class labels, by the pipeline's own encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebbflow.interop.diffusers.adapters import Adapter, Flux


def of_labels(
    adapter: Adapter, pipeline: Any, labels: Sequence[int | str] | Tensor | int, device: Any
) -> dict[str, Tensor]:
    """`{"label": (B,)}`; names are looked up where the pipeline has them."""
    values = [labels] if isinstance(labels, int | str) else list(labels)
    names = [value for value in values if isinstance(value, str)]
    known = getattr(pipeline, "labels", {})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is not one of the pipeline's {len(known)} names")
    table = torch.tensor([known[v] if isinstance(v, str) else int(v) for v in values])
    count = classes(adapter)
    if not bool(((table >= 0) & (table < count)).all()):
        bad = table[(table < 0) | (table >= count)][0].item()
        raise ValueError(f"label {bad} lies outside 0 … {count - 1}, the classes of the network")
    return {"label": table.to(device)}


def classes(adapter: Adapter) -> int:
    """How many classes the network knows, its null class not counted."""
    config = adapter.config
    found = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if found is None:
        raise ValueError(f"{type(adapter.network).__name__} takes no class labels")
    return found


def of_prompts(
    adapter: Adapter,
    pipeline: Any,
    prompts: str | Sequence[str],
    device: Any,
    size: tuple[int, int] | None,
    guidance: float,
) -> dict[str, Tensor]:
    """The condition of prompts: `text`, and `pooled`, `sizes`, `guidance` where they are told."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encoded = _encode(adapter, pipeline, prompts, None, device)
    dtype = encoded[0]["text"].dtype
    return {**encoded[0], **_told(adapter, len(prompts), device, dtype, size, guidance)}


def of_nothing(
    adapter: Adapter, pipeline: Any, negative: str | None, device: Any
) -> dict[str, Tensor]:
    """The condition, of one row, of no prompt, or of one that is to be avoided."""
    return _encode(adapter, pipeline, [""], negative, device)[1]


@torch.no_grad()
def _encode(
    adapter: Adapter, pipeline: Any, prompts: list[str], negative: str | None, device: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pipeline makes of the prompts, and of their absence."""
    if pipeline is None or not hasattr(pipeline, "encode_prompt"):
        raise ValueError("no pipeline with text encoders was loaded: give the condition's tensors")
    if isinstance(adapter, Flux):  # has no null prompt of its own
        pairs = []
        for text in (prompts, [negative or ""]):
            tokens, pooled, _ = pipeline.encode_prompt(text, None, device=device)
            pairs.append({"text": tokens, "pooled": pooled})
        return pairs[0], pairs[1]
    negatives = None if negative is None else [negative] * len(prompts)
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if "pooled" not in adapter.fields:
        with_, without = pipeline.encode_prompt(prompts, negative_prompt=negatives, **options)
        return {"text": with_}, {"text": without[:1]}
    more = {"prompt_2": None, "negative_prompt": negatives}
    if "text_encoder_3" in getattr(pipeline, "components", {}):
        more["prompt_3"] = None
    with_, without, pooled, pooled_without = pipeline.encode_prompt(prompts, **more, **options)
    null = {"text": without[:1], "pooled": pooled_without[:1]}
    return {"text": with_, "pooled": pooled}, null


def _told(
    adapter: Adapter,
    batch: int,
    device: Any,
    dtype: torch.dtype,
    size: tuple[int, int] | None,
    guidance: float,
) -> dict[str, Tensor]:
    told: dict[str, Tensor] = {}
    if "sizes" in adapter.fields:
        if size is None:
            raise ValueError("give size=(height, width) of the picture: SDXL is told it")
        row = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=device)
        told["sizes"] = row.expand(batch, -1)
    if "guidance" in adapter.fields:
        told["guidance"] = torch.full((batch,), float(guidance), device=device)
    return told
