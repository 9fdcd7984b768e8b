"""Models of transformers: encoders, decoders, both, pictures and sound."""

from __future__ import annotations

from typing import Any

import torch
from entries import BOTH, B, Built, N, V, entry, ids, padding, values
from torch import nn


def hugging(kind: str, implementation: str, head: str = "Model", **settings: Any) -> nn.Module:
    """``<kind><head>`` from ``<kind>Config(**settings)`` with this implementation of attention."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings)
    # a backbone within a model may know one implementation only
    config._attn_implementation = {"": implementation, "backbone_config": "eager"} if kind == "Detr" else implementation
    made = getattr(transformers, f"{kind}{head}", None) or getattr(transformers, f"{kind}LMHeadModel")
    model = made(config)
    assert model.config._attn_implementation == implementation
    return model


def encoder(name: str, kind: str, *implementations: str, **settings: Any) -> None:
    @entry(name, "transformers", *implementations)
    def make(implementation: str) -> Built:
        model = hugging(kind, implementation, vocab_size=V, **settings)
        return model, (), {"input_ids": ids(B, N), "attention_mask": padding("right")}


def decoder(name: str, kind: str, *implementations: str, **settings: Any) -> None:
    """Two entries: causal alone, and with left padding."""

    def make(implementation: str) -> Built:
        model = hugging(kind, implementation, "ForCausalLM", vocab_size=V, **settings)
        return model, (), {"input_ids": ids(B, N), "use_cache": False}

    entry(name, "transformers", *implementations)(make)

    @entry(f"{name}, padded", "transformers", *implementations)
    def padded(implementation: str) -> Built:
        model, args, kwargs = make(implementation)
        return model, args, {**kwargs, "attention_mask": padding("left")}


NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = {**SMALL, **NO_DROP, "max_position_embeddings": 32}

encoder("bert", "Bert", *BOTH, **BERT)
encoder("roberta", "Roberta", *BOTH, **BERT)
encoder(
    "distilbert", "DistilBert", *BOTH, n_layers=2, n_heads=4, dim=32, hidden_dim=48, dropout=0.0, attention_dropout=0.0
)
encoder("electra", "Electra", *BOTH, embedding_size=32, **BERT)
encoder("deberta-v2", "DebertaV2", "eager", **BERT)
encoder(
    "deberta-v2, relative",
    "DebertaV2",
    "eager",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    position_biased_input=False,
    **BERT,
)

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT |= {"attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32, **ENDS}

decoder("gpt2", "GPT2", *BOTH, **GPT)
decoder(
    "gpt_neo",
    "GPTNeo",
    "eager",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    max_position_embeddings=32,
    **ENDS,
)
decoder("gpt_neox", "GPTNeoX", *BOTH, **SMALL, max_position_embeddings=32, **ENDS)
decoder("gptj", "GPTJ", "eager", **GPT, rotary_dim=4)
decoder(
    "opt",
    "OPT",
    *BOTH,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=32,
    word_embed_proj_dim=32,
    dropout=0.0,
    **ENDS,
)
decoder("bloom", "Bloom", "eager", hidden_size=32, n_layer=2, n_head=4, **ENDS)
decoder("mpt", "Mpt", "eager", d_model=32, n_layers=2, n_heads=4, max_seq_len=32, **ENDS)
decoder("llama", "Llama", *BOTH, **GROUPED)
decoder("mistral", "Mistral", *BOTH, **GROUPED, sliding_window=None)
decoder("mistral, sliding window", "Mistral", *BOTH, **GROUPED, sliding_window=4)
decoder("mixtral", "Mixtral", *BOTH, **GROUPED, num_local_experts=4)
decoder("qwen2", "Qwen2", *BOTH, **GROUPED)
decoder("qwen3", "Qwen3", *BOTH, **GROUPED, head_dim=8)
decoder("gemma", "Gemma", *BOTH, **GROUPED, head_dim=8)
decoder("gemma2", "Gemma2", "eager", **GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
decoder("phi", "Phi", *BOTH, **GROUPED)


@entry("llama, one token after a cache", "transformers", *BOTH)
def _llama_cached(implementation: str) -> Built:
    from transformers import DynamicCache

    model = hugging("Llama", implementation, "ForCausalLM", vocab_size=V, **GROUPED)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, *past: torch.Tensor) -> torch.Tensor:
            cache = DynamicCache(config=model.config)
            for layer in range(2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            logits: torch.Tensor = self.model(input_ids, past_key_values=cache, use_cache=True).logits
            return logits

    return Step(), (ids(B, 1), *(values(B, 2, N - 1, 8) for _ in range(4))), {}


def both_sides(name: str, kind: str, **settings: Any) -> None:
    """Encoder and decoder: attention in both and across, with padding on the encoder's side."""

    @entry(name, "transformers", *BOTH)
    def make(implementation: str) -> Built:
        model = hugging(kind, implementation, "ForConditionalGeneration", vocab_size=V, **settings)
        kwargs = {"input_ids": ids(B, N), "attention_mask": padding("right"), "decoder_input_ids": ids(B, 7)}
        return model, (), {**kwargs, "use_cache": False}


SIDES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0}
SIDES |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
both_sides("t5", "T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
both_sides("bart", "Bart", **SIDES, max_position_embeddings=32)
both_sides("pegasus", "Pegasus", **SIDES, max_position_embeddings=32)


@entry("whisper", "transformers", *BOTH)
def _whisper(implementation: str) -> Built:
    ends = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = hugging(
        "Whisper",
        implementation,
        "ForConditionalGeneration",
        vocab_size=V,
        num_mel_bins=8,
        max_source_positions=N,
        max_target_positions=16,
        **SIDES,
        **ends,
    )
    return model, (), {"input_features": values(B, 8, 2 * N), "decoder_input_ids": ids(B, 7), "use_cache": False}


def picture(name: str, kind: str, head: str = "Model", size: int = 32, **settings: Any) -> None:
    @entry(name, "transformers", *BOTH)
    def make(implementation: str) -> Built:
        return hugging(kind, implementation, head, **settings), (), {"pixel_values": values(B, 3, size, size)}


PATCHES = {**SMALL, **NO_DROP, "image_size": 32, "patch_size": 8}
picture("vit", "ViT", **PATCHES)
picture("deit", "DeiT", **PATCHES)
picture("beit", "Beit", **PATCHES, use_relative_position_bias=True, drop_path_rate=0.0)
picture("beit, shared bias", "Beit", **PATCHES, use_shared_relative_position_bias=True, drop_path_rate=0.0)
picture(
    "swin",
    "Swin",
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    drop_path_rate=0.0,
)
picture(
    "segformer",
    "Segformer",
    num_encoder_blocks=2,
    depths=(2, 2),
    sr_ratios=(4, 1),
    hidden_sizes=(16, 32),
    patch_sizes=(7, 3),
    strides=(4, 2),
    num_attention_heads=(1, 2),
    mlp_ratios=(2, 2),
    drop_path_rate=0.0,
    classifier_dropout_prob=0.0,
)

TEXT = {**SMALL, "vocab_size": V, "max_position_embeddings": 32, **ENDS}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


@entry("clip", "transformers", *BOTH)
def _clip(implementation: str) -> Built:
    model = hugging("CLIP", implementation, text_config={**TEXT, "projection_dim": 16}, vision_config=VISION,
                    projection_dim=16)  # fmt: skip
    tokens = ids(B, N)
    tokens[:, -1] = 1
    kwargs = {"input_ids": tokens, "attention_mask": padding("right"), "pixel_values": values(B, 3, 32, 32)}
    return model, (), kwargs


@entry("siglip", "transformers", *BOTH)
def _siglip(implementation: str) -> Built:
    model = hugging("Siglip", implementation, text_config=TEXT, vision_config=VISION)
    kwargs = {"input_ids": ids(B, N), "attention_mask": padding("right"), "pixel_values": values(B, 3, 32, 32)}
    return model, (), kwargs


@entry("wav2vec2", "transformers", *BOTH)
def _wav2vec2(implementation: str) -> Built:
    drops = ("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout", "layerdrop")
    model = hugging(
        "Wav2Vec2",
        implementation,
        **SMALL,
        vocab_size=V,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        **dict.fromkeys(drops, 0.0),
    )
    mask = torch.ones(B, 160, dtype=torch.long)
    mask[1, 100:] = 0
    return model, (), {"input_values": values(B, 160), "attention_mask": mask}


@entry("detr", "transformers", *BOTH)
def _detr(implementation: str) -> Built:
    from transformers import ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    model = hugging("Detr", implementation, backbone_config=backbone, num_queries=5, **SIDES)
    mask = torch.ones(B, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    return model, (), {"pixel_values": values(B, 3, 64, 64), "pixel_mask": mask}
