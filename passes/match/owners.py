"""Which parameters feed q and k: they tell apart the layers that one compiled block serves."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import CAST, REGROUP, SAME, TRANSPOSE, packet

_aten = torch.ops.aten
_PROJECTIONS = {
    _aten.linear: (1,),
    _aten.matmul: (0, 1),
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.einsum: (1,),
    _aten.conv1d: (1,),
    _aten.conv2d: (1,),
}
_VIEWS = SAME | CAST | REGROUP | TRANSPOSE | {_aten.expand, _aten.slice, _aten.select, _aten.squeeze, _aten.detach}


def owners(q: fx.Node, k: fx.Node, parameters: Set[fx.Node]) -> tuple[fx.Node, ...]:
    """Weights of the projections nearest to q and k, in order, without repeats; empty when no parameter feeds them."""
    found: dict[fx.Node, None] = {}
    for node in (q, k):
        for parameter in _nearest(node, parameters):
            found.setdefault(parameter)
    return tuple(found)


def _nearest(start: fx.Node, parameters: Set[fx.Node]) -> list[fx.Node]:
    weights: list[fx.Node] = []
    loose: list[fx.Node] = []
    seen: set[fx.Node] = set()
    queue = [start]
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node in parameters:
            loose.append(node)
            continue
        places = _PROJECTIONS.get(packet(node))
        if places is not None:
            operands = [leaf for place in places if place < len(node.args) for leaf in _leaves(node.args[place])]
            here = [base for base in map(strip, operands) if base in parameters]
            if here:
                weights.extend(here)
                continue
        queue.extend(node.all_input_nodes)
    return weights or loose


def _leaves(value: Any) -> list[fx.Node]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, fx.Node) else []


def strip(node: fx.Node) -> fx.Node:
    """The value behind views and casts."""
    while packet(node) in _VIEWS and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_paper_form(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    """Whether q = X W, k = X and v = X W_V for one X: the paper's softmax(X W Xᵀ) X W_V."""
    x = strip(k)
    return _projected(q) is x and _projected(v) is x


def _projected(node: fx.Node) -> fx.Node | None:
    node = strip(node)
    if packet(node) in (_aten.matmul, _aten.mm, _aten.linear) and isinstance(node.args[0], fx.Node):
        return strip(node.args[0])
    return None
