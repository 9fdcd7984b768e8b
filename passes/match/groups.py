"""Grouped queries behind repeated keys: where a model repeats its key heads, the op is given them unrepeated.

    k[:, :, None].expand(b, kv, r, n, d).reshape(b, kv·r, n, d)   or   k.repeat_interleave(r, dim=heads)

Query head h then reads key head h // r, which is how the operator shares heads out; each state is computed once.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from polyattn.passes.match.axes import REGROUP, SAME, TRANSPOSE, packet, same_sizes, shape, swaps_pair
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.match.site import Operand

_aten = torch.ops.aten


def ungroup(k: Operand, v: Operand) -> tuple[Operand, Operand] | None:
    """Keys and values before their heads were repeated equally often; None where they were not."""
    found = [_unrepeated(operand) for operand in (k, v)]
    if found[0] is None or found[1] is None:
        return None
    keys, values = found[0], found[1]
    if not same_sizes(keys.batch, values.batch):
        return None
    return keys, values


def _unrepeated(operand: Operand) -> Operand | None:
    """An operand [b, kv·r, ·, ·] before its heads were repeated r times."""
    node, transposed = operand.node, operand.transposed
    while True:
        kind = packet(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return None
        if kind in SAME:
            node = source
        elif kind in TRANSPOSE:
            swaps = swaps_pair(node)
            if swaps is None:
                return None
            node, transposed = source, transposed ^ swaps
        else:
            break
    if kind is _aten.repeat_interleave:
        dim = argument(node, 2, "dim")
        if (
            len(shape(node)) == 4
            and isinstance(dim, int)
            and dim % 4 == 1
            and isinstance(argument(node, 1, "repeats"), int)
        ):
            return Operand(source, transposed)
        return None
    if kind not in REGROUP:
        return None
    while packet(source) in SAME and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    if packet(source) is not _aten.expand or len(shape(source)) != 5 or len(shape(node)) != 4:
        return None
    b, kv, repeats, n, d = shape(source)
    narrow = source.args[0]
    if not isinstance(narrow, fx.Node) or not same_sizes(shape(node), (b, kv * repeats, n, d)):
        return None
    # What is expanded must be [b, kv, 1, n, d]: an axis of size one put after the heads, nothing else broadcast.
    if packet(narrow) is not _aten.unsqueeze or not same_sizes(shape(narrow), (b, kv, 1, n, d)):
        return None
    if int(argument(narrow, 1, "dim")) % 5 != 2:
        return None
    heads = narrow.args[0]
    assert isinstance(heads, fx.Node)
    return Operand(heads, transposed)
