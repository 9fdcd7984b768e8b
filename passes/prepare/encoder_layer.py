"""torch's fused fast paths, opened: one operator of a whole encoder layer becomes the operators that it stands for.

``nn.TransformerEncoderLayer`` calls it in inference.  Nested tensors stay as they
are, and are refused by matching.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import packet
from polyattn.passes.replace.writer import ValuedWriter

_aten = torch.ops.aten
PADDING = 1
MASK_TYPES = (0, PADDING, 2)
"""Of a mask [queries, keys], [batch, keys] or [batch, heads, queries, keys]; whatever is not 0 in it is hidden."""


def open_fused_layers(graph: fx.Graph) -> None:
    """Rewrite every fused encoder layer of a normalised graph."""
    for node in list(graph.nodes):
        if packet(node) is _aten._transformer_encoder_layer_fwd and _plain(node.args[0]):
            _encoder_layer(node)


def _plain(source: Any) -> bool:
    value = source.meta["val"] if isinstance(source, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dim() == 3


def _encoder_layer(node: fx.Node) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mask, mask_type = given.get("mask"), given.get("mask_type")
    if mask is not None and mask_type not in MASK_TYPES:
        return
    write = ValuedWriter(node)
    norm_first, eps, width = given["norm_first"], given["eps"], given["embed_dim"]

    def norm(x: fx.Node, which: int) -> fx.Node:
        scale, shift = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return write.call(_aten.layer_norm.default, x, [width], scale, shift, eps)

    x = given["src"]
    attended = _attention(write, norm(x, 1) if norm_first else x, given, mask, mask_type)
    x = write.call(_aten.add.Tensor, x, attended)
    x = x if norm_first else norm(x, 1)
    hidden = norm(x, 2) if norm_first else x
    hidden = write.call(_aten.linear.default, hidden, given["ffn_weight_1"], given["ffn_bias_1"])
    hidden = write.call(_aten.gelu.default if given["use_gelu"] else _aten.relu.default, hidden)
    hidden = write.call(_aten.linear.default, hidden, given["ffn_weight_2"], given["ffn_bias_2"])
    x = write.call(_aten.add.Tensor, x, hidden)
    write.replace(x if norm_first else norm(x, 2))


def _attention(write: ValuedWriter, x: fx.Node, given: dict[str, Any], mask: Any, mask_type: Any) -> fx.Node:
    """Multi-head self-attention of [batch, tokens, width] as torch's operators."""
    width, heads = given["embed_dim"], given["num_heads"]
    packed = write.call(_aten.linear.default, x, given["qkv_weight"], given["qkv_bias"])
    parts = []
    for at in range(3):
        part = write.call(_aten.slice.Tensor, packed, -1, at * width, (at + 1) * width)
        part = write.call(_aten.unflatten.int, part, -1, [heads, width // heads])
        parts.append(write.call(_aten.transpose.int, part, 1, 2))
    keep = None
    if mask is not None:
        keep = write.call(_aten.eq.Scalar, mask, 0)
        if mask_type == PADDING:
            for axis in (1, 1):
                keep = write.call(_aten.unsqueeze.default, keep, axis)
    out = write.call(_aten.scaled_dot_product_attention.default, *parts, keep)
    out = write.call(_aten.flatten.using_ints, write.call(_aten.transpose.int, out, 1, 2), 2, 3)
    return write.call(_aten.linear.default, out, given["proj_weight"], given["proj_bias"])
