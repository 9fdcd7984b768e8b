"""Torch's own attention module, layers and whole transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from entries import B, Built, N, entry, padding, values
from torch import nn


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
