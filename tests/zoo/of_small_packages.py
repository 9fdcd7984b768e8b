"""Models of x-transformers, vit-pytorch and timm."""

from __future__ import annotations

import importlib
from typing import Any

from entries import BOTH, B, Built, N, V, entry, ids, padding, values


def lucid(name: str, layers: str, *implementations: str, **settings: Any) -> None:
    """A transformer of x-transformers; ``sdpa`` is its ``attn_flash``. The encoder's input is padded."""

    @entry(f"x-transformers, {name}", "x_transformers", *(implementations or BOTH))
    def make(implementation: str) -> Built:
        import x_transformers

        stack = getattr(x_transformers, layers)(
            dim=32, depth=2, heads=4, attn_dim_head=8, attn_flash=implementation == "sdpa", **settings
        )
        model = x_transformers.TransformerWrapper(num_tokens=V, max_seq_len=32, attn_layers=stack)
        kwargs = {} if layers == "Decoder" else {"mask": padding("right").bool()}
        return model, (ids(B, N),), kwargs


lucid("encoder", "Encoder")
lucid("decoder", "Decoder")
lucid("decoder, rotary, one key head", "Decoder", rotary_pos_emb=True, attn_one_kv_head=True)
lucid("decoder, alibi", "Decoder", alibi_pos_bias=True, alibi_num_heads=2)
lucid("decoder, memory keys", "Decoder", attn_num_mem_kv=3)
lucid("encoder, qk norm", "Encoder", attn_qk_norm=True)
lucid("encoder, relative bias", "Encoder", "eager", rel_pos_bias=True)


def patches(name: str, module: str, kind: str, **settings: Any) -> None:
    @entry(f"vit-pytorch, {name}", "vit_pytorch")
    def make(implementation: str) -> Built:
        model = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**settings)
        return model, (values(B, 3, 32, 32),), {}


LUCID = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
patches("vit", "vit", "ViT", **LUCID, dim_head=8)
patches("simple_vit", "simple_vit", "SimpleViT", **LUCID, dim_head=8)
patches("deepvit (talking heads)", "deepvit", "DeepViT", **LUCID, dim_head=8)
patches(
    "cait (talking heads)",
    "cait",
    "CaiT",
    **{k: v for k, v in LUCID.items() if k != "depth"},
    depth=1,
    cls_depth=1,
    dim_head=8,
)
patches("vit_for_small_dataset (learnt scale)", "vit_for_small_dataset", "ViT", **LUCID, dim_head=8)
patches("simple_vit_with_qk_norm", "simple_vit_with_qk_norm", "SimpleViT", **LUCID, dim_head=8)


def timmy(name: str, kind: str, module: str, **settings: Any) -> None:
    """timm switches between its two spellings by an environment variable or ``set_fused_attn``."""

    @entry(f"timm, {name}", "timm", *BOTH)
    def make(implementation: str) -> Built:
        import timm

        timm.layers.set_fused_attn(implementation == "sdpa")
        model = getattr(importlib.import_module(f"timm.models.{module}"), kind)(num_classes=5, **settings)
        return model, (values(B, 3, 32, 32),), {}


timmy("vit", "VisionTransformer", "vision_transformer", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
timmy(
    "swin",
    "SwinTransformer",
    "swin_transformer",
    img_size=32,
    patch_size=2,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    drop_path_rate=0.0,
)
timmy(
    "swinv2",
    "SwinTransformerV2",
    "swin_transformer_v2",
    img_size=32,
    patch_size=2,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    drop_path_rate=0.0,
)
timmy("beit", "Beit", "beit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, use_rel_pos_bias=True)
timmy("cait", "Cait", "cait", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
timmy("xcit", "Xcit", "xcit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
