"""Denoising models of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from entries import BOTH, B, Built, entry, padding, values


def denoiser(name: str, kind: str, inputs: Callable[[], dict[str, Any]], **settings: Any) -> None:
    """``eager`` is diffusers' own AttnProcessor (softmax between baddbmm and bmm), ``sdpa`` its default."""

    @entry(name, "diffusers", *BOTH)
    def make(implementation: str) -> Built:
        import diffusers
        from diffusers.models.attention_processor import AttnProcessor

        model = getattr(diffusers, kind)(**settings)
        if implementation == "eager":
            for module in model.modules():
                if hasattr(module, "set_processor"):
                    module.set_processor(AttnProcessor())
        return model, (), inputs()


denoiser(
    "unet_2d_condition",
    "UNet2DConditionModel",
    lambda: {
        "sample": values(B, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": values(B, 7, 24),
        "encoder_attention_mask": padding("right", 7),
    },
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=24,
    attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
denoiser(
    "dit",
    "DiTTransformer2DModel",
    lambda: {
        "hidden_states": values(B, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    },
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
    norm_num_groups=4,
)
denoiser(
    "pixart",
    "PixArtTransformer2DModel",
    lambda: {
        "hidden_states": values(B, 4, 8, 8),
        "encoder_hidden_states": values(B, 7, 24),
        "encoder_attention_mask": padding("right", 7),
        "timestep": torch.tensor([3, 5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    cross_attention_dim=16,
    caption_channels=24,
    norm_num_groups=4,
    use_additional_conditions=False,
)


@entry("sd3", "diffusers", "sdpa")
def _sd3(implementation: str) -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    kwargs = {"hidden_states": values(B, 4, 8, 8), "encoder_hidden_states": values(B, 7, 24)}
    return model, (), {**kwargs, "pooled_projections": values(B, 16), "timestep": torch.tensor([3, 5])}


@entry("flux", "diffusers", "sdpa")
def _flux(implementation: str) -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    kwargs = {"hidden_states": values(B, 16, 4), "encoder_hidden_states": values(B, 7, 24)}
    kwargs |= {"pooled_projections": values(B, 16), "timestep": torch.tensor([0.3, 0.5])}
    return model, (), {**kwargs, "img_ids": values(16, 3), "txt_ids": torch.zeros(7, 3)}
