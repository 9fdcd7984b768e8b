"""How many attentions a model executes, counted from the outside: nothing of polyattn is used here.

The count looks at what torch runs below autograd. A softmax counts when its result, or what views, casts, copies and
elementwise arithmetic of the same number of elements make of it, enters a matrix product as an operand; each softmax
counts once. Torch's fused attention operators count as one each. ``scaled_dot_product_attention`` arrives as one of
these or, in its mathematical form, as a softmax between two products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
SOFTMAX = {_aten._softmax, _aten._safe_softmax}
PRODUCTS = {_aten.bmm, _aten.mm, _aten.baddbmm, _aten.addmm, _aten.mv, _aten.addbmm, _aten.matmul, _aten.dot}
FUSED = {
    _aten.scaled_dot_product_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_fused_attention_overrideable,
    _aten._transformer_encoder_layer_fwd,
    _aten._native_multi_head_attention,
}
VIEWS = {
    *(_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias, _aten.permute, _aten.transpose, _aten.t),
    *(_aten.expand, _aten.squeeze, _aten.unsqueeze, _aten.clone, _aten._to_copy, _aten.alias, _aten.detach),
    *(_aten.slice, _aten.select, _aten.as_strided, _aten.contiguous, _aten.constant_pad_nd),
}
ELEMENTWISE = {_aten.mul, _aten.div, _aten.add, _aten.sub, _aten.masked_fill, _aten.where, _aten.native_dropout}
ELEMENTWISE |= {_aten.mul_, _aten.div_, _aten.add_, _aten.masked_fill_, _aten.bernoulli_, _aten.copy_}


class AttentionCounter(TorchDispatchMode):
    """``with AttentionCounter() as counter: model(...)``; then ``counter.softmax`` and ``counter.fused``."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = 0
        self.fused = 0
        self._weights: dict[int, tuple[torch.Tensor, int]] = {}  # id → (tensor, which softmax); kept alive: ids stay
        self._counted: set[int] = set()

    @property
    def count(self) -> int:
        return self.softmax + self.fused

    def _mark(self, result: Any, number: int) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._weights[id(leaf)] = (leaf, number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if kind in FUSED:
            self.fused += 1
        elif kind in SOFTMAX:
            self._mark(result, len(self._weights) + 1)
        elif kind in PRODUCTS:
            for leaf in inputs:
                number = self._weights.get(id(leaf), (None, 0))[1]
                if number and number not in self._counted:
                    self._counted.add(number)
                    self.softmax += 1
        elif kind in VIEWS or kind in ELEMENTWISE:
            for leaf in inputs:
                if id(leaf) in self._weights:
                    first = next(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
                    if kind in VIEWS or first.numel() == leaf.numel():
                        self._mark(first, self._weights[id(leaf)][1])
        return result


def executed(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Attentions in one eager forward pass (in the grad mode of the caller)."""
    with AttentionCounter() as counter:
        model(*args, **kwargs)
    return counter.count
