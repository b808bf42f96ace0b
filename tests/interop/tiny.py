"""Real diffusers pipelines of a few thousand random weights, built here and never downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORDS = ("a", "cat", "dog", "red", "blue")
MILD = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.04}
"""Betas that leave a signal of 0.36 at the end, so that random networks give numbers of order 1."""


def calm(network: Any, last: str, share: float = 0.3) -> Any:
    """The network in evaluation mode with the output layer's weights turned down."""
    module = network.get_submodule(last)
    with torch.no_grad():
        module.weight.normal_(0, share / module.weight[0].numel() ** 0.5)
        if module.bias is not None:
            module.bias.normal_(0, 0.05)
    return network.eval()


def unet(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return calm(diffusers.UNet2DModel(**{**config, **options}), "conv_out")


def text_unet(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return calm(diffusers.UNet2DConditionModel(**{**config, **options}), "conv_out")


def dit(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 1000,
        "patch_size": 2,
    }
    return calm(diffusers.DiTTransformer2DModel(**{**config, **options}), "proj_out_2")


def sd3(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 16,
    }
    return calm(diffusers.SD3Transformer2DModel(**{**config, **options}), "proj_out")


def flux(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(4)
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return calm(diffusers.FluxTransformer2DModel(**{**config, **options}), "proj_out")


def vae(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.7,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**{**config, **options}).eval()


def tokenizer(transformers: Any) -> Any:
    """CLIP's, of the words of `WORDS` and single letters."""
    letters = sorted({letter for word in WORDS for letter in word})
    symbols = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges, known = [], list(symbols)
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            known += [parts[0]] if parts[0] not in known else []
    known += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(known)}
    merges = list(dict.fromkeys(merges))
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=8)


def text_encoder(transformers: Any, width: int = 16, projection: int | None = None) -> Any:
    torch.manual_seed(6)
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
    )
    kind = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    return getattr(transformers, kind)(config).eval()


def t5(transformers: Any, width: int = 16) -> Any:
    torch.manual_seed(7)
    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def stable_diffusion(diffusers: Any, transformers: Any, scheduler: Any) -> Any:
    return quiet(
        diffusers.StableDiffusionPipeline(
            vae=vae(diffusers),
            text_encoder=text_encoder(transformers),
            tokenizer=tokenizer(transformers),
            unet=text_unet(diffusers),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def normal(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stable_diffusion_3(diffusers: Any, transformers: Any, scheduler: Any) -> Any:
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=sd3(diffusers),
            scheduler=scheduler,
            vae=vae(diffusers, shift_factor=0.1),
            text_encoder=text_encoder(transformers, 16, 12),
            tokenizer=tokenizer(transformers),
            text_encoder_2=text_encoder(transformers, 16, 12),
            tokenizer_2=tokenizer(transformers),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux_pipeline(diffusers: Any, transformers: Any, scheduler: Any) -> Any:
    return quiet(
        diffusers.FluxPipeline(
            transformer=flux(diffusers),
            scheduler=scheduler,
            vae=vae(diffusers, shift_factor=0.1),
            text_encoder=text_encoder(transformers, 16),
            tokenizer=tokenizer(transformers),
            text_encoder_2=t5(transformers),
            tokenizer_2=tokenizer(transformers),
        )
    )


def stable_diffusion_xl(diffusers: Any, transformers: Any, scheduler: Any) -> Any:
    network = text_unet(
        diffusers,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(diffusers),
            text_encoder=text_encoder(transformers, 16),
            tokenizer=tokenizer(transformers),
            text_encoder_2=text_encoder(transformers, 16, 12),
            tokenizer_2=tokenizer(transformers),
            unet=network,
            scheduler=scheduler,
            add_watermarker=False,
        )
    )


def dit_pipeline(diffusers: Any, scheduler: Any, **options: Any) -> Any:
    names = {0: "tench, Tinca tinca", 7: "cock"}
    parts = (dit(diffusers, **options), vae(diffusers), scheduler)
    pipeline = diffusers.DiTPipeline(*parts, id2label=names)
    pipeline.register_to_config(id2label=names)
    return quiet(pipeline)
