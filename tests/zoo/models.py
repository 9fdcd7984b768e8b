"""Models of public packages, built from their own configuration classes with small random weights.

Every entry of ``ZOO`` builds ``(module, args, kwargs)`` for one implementation of attention. Nothing is downloaded.
Dropout is 0, so that an eager and a compiled run can be compared; weights are large enough that attention is far
from uniform and a lost mask or a wrong scale shows in the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    package: str
    implementations: tuple[str, ...]
    build: Callable[[str], Built]
    note: str = ""


ZOO: dict[str, Entry] = {}
BOTH = ("eager", "sdpa")
B, N, V = 2, 12, 67  # batch, tokens, vocabulary


def entry(name: str, package: str, *implementations: str, note: str = "") -> Callable[[Callable[[str], Built]], Any]:
    def add(build: Callable[[str], Built]) -> Callable[[str], Built]:
        assert name not in ZOO, name
        ZOO[name] = Entry(name, package, implementations or ("as written",), build, note)
        return build

    return add


def build(name: str, implementation: str, seed: int = 0) -> Built:
    """The model with its weights, in float32 on the CPU."""
    torch.manual_seed(seed)
    prepare(ZOO[name].package)
    module, args, kwargs = ZOO[name].build(implementation)
    enlarge(module)
    return module, args, kwargs


def enlarge(module: nn.Module) -> None:
    """Weights of unit gain, biases of 0.1: what packages start from (0.02) makes every attention nearly uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.dtype.is_floating_point:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.5 / fan_in**0.5))
            else:
                parameter.add_(0.1 * noise)


_libraries: list[Any] = []


def prepare(package: str) -> None:
    """Import a package; where torchvision lacks its compiled operators (another build), declare the two that its import
    asks for: no model of the zoo runs them."""
    if package in ("transformers", "timm", "vit_pytorch", "diffusers") and not _libraries:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
    importlib.import_module(package)
    if package == "transformers":
        import transformers

        transformers.logging.set_verbosity_error()


def ids(*shape: int, vocabulary: int = V) -> torch.Tensor:
    """Token ids from 3 on: the small ones are padding, begin and end."""
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(2))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def padding(side: str, tokens: int = N) -> torch.Tensor:
    """An attention mask whose second row has four padded tokens."""
    mask = torch.ones(B, tokens, dtype=torch.long)
    if side == "right":
        mask[1, -4:] = 0
    else:
        mask[1, :4] = 0
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# transformers


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


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


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


# ---------------------------------------------------------------------------------------------------------------------
# x-transformers, vit-pytorch, timm


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


# ---------------------------------------------------------------------------------------------------------------------
# torch's own


class Attends(nn.Module):
    """nn.MultiheadAttention on one input, with what a test asks for."""

    def __init__(self, need_weights: bool = True, **settings: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True, **settings)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor, **masks: Any) -> Any:
        return self.inner(x, x, x, need_weights=self.need_weights, **masks)


def multihead(name: str, need_weights: bool, masks: Callable[[], dict[str, Any]], **settings: Any) -> None:
    @entry(f"nn.MultiheadAttention, {name}", "torch")
    def make(implementation: str) -> Built:
        return Attends(need_weights, **settings), (values(B, N, 32),), masks()


def padded_keys() -> torch.Tensor:
    return padding("right") == 0


def future() -> torch.Tensor:
    return torch.triu(torch.ones(N, N, dtype=torch.bool), 1)


multihead("weights", True, dict)
multihead("no weights", False, dict)
multihead("weights, padding", True, lambda: {"key_padding_mask": padded_keys()})
multihead("no weights, padding", False, lambda: {"key_padding_mask": padded_keys()})
multihead("weights, attn_mask", True, lambda: {"attn_mask": future()})
multihead("no weights, attn_mask", False, lambda: {"attn_mask": future()})
multihead("no weights, causal hint", False, lambda: {"attn_mask": future(), "is_causal": True})
multihead("no weights, padding, attn_mask", False, lambda: {"attn_mask": future(), "key_padding_mask": padded_keys()})
multihead("no weights, bias_kv, zero_attn", False, dict, add_bias_kv=True, add_zero_attn=True)


def layer(name: str, build_layer: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, Any]]) -> None:
    @entry(name, "torch")
    def make(implementation: str) -> Built:
        args, kwargs = inputs()
        return build_layer(), args, kwargs


LAYER = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
layer("nn.TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(**LAYER), lambda: ((values(B, N, 32),), {}))
layer(
    "nn.TransformerEncoderLayer, padding",
    lambda: nn.TransformerEncoderLayer(**LAYER),
    lambda: ((values(B, N, 32),), {"src_key_padding_mask": padded_keys()}),
)
layer(
    "nn.TransformerEncoderLayer, norm_first, causal",
    lambda: nn.TransformerEncoderLayer(**LAYER, norm_first=True),
    lambda: ((values(B, N, 32),), {"src_mask": nn.Transformer.generate_square_subsequent_mask(N), "is_causal": True}),
)
layer(
    "nn.TransformerEncoder, padding",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2, enable_nested_tensor=False),
    lambda: ((values(B, N, 32),), {"src_key_padding_mask": padded_keys()}),
)
layer(
    "nn.TransformerDecoderLayer",
    lambda: nn.TransformerDecoderLayer(**LAYER),
    lambda: (
        (values(B, 7, 32), values(B, N, 32)),
        {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
            "tgt_is_causal": True,
            "memory_key_padding_mask": padded_keys(),
        },
    ),
)
for hint in ({"tgt_is_causal": True}, {}):
    layer(
        "nn.Transformer" if hint else "nn.Transformer, without tgt_is_causal",
        lambda: nn.Transformer(**LAYER, num_encoder_layers=2, num_decoder_layers=2),
        lambda hint=hint: (
            (values(B, N, 32), values(B, 7, 32)),
            {
                "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
                "src_key_padding_mask": padded_keys(),
                **hint,
            },
        ),
    )
