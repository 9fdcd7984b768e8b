"""The forms of attention that are derived: each is a plain torch function of one head's matrices, nothing more.

What a form computes is all that is written down; its autograd graph is traced, and everything else is derived.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from polyattn.rewriter.algebra.expr import HEAD, KEY, QUERY, TOKEN, VALUE, Indicator, Kind, Leaf, Tensor
from polyattn.rewriter.masks.mask import MASKS, NONE, Mask

Function = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Form:
    """One form: its input tensors, its scalars, its output's axes, the inputs that have gradients."""

    name: str
    inputs: tuple[Tensor, ...]
    scalars: tuple[str, ...]
    out: tuple[Kind, ...]
    function: Function
    text: str
    mask: Mask = NONE
    """Which keys a query sees, and which pairs are near."""

    @property
    def cotangent(self) -> Leaf:
        """G, the gradient of a loss with respect to the output."""
        return Leaf("G", self.out)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the inputs that have gradients."""
        return tuple(t.name for t in self.inputs if not isinstance(t, Indicator))


Q, K, V = Leaf("Q", (QUERY, HEAD)), Leaf("K", (KEY, HEAD)), Leaf("V", (KEY, VALUE))
B = Leaf("B", (KEY,))
"""A positive weight of each key: a factor of its column of the exponentials (math.md §3)."""
X, W, W_V = Leaf("X", (TOKEN, HEAD)), Leaf("W", (HEAD, HEAD)), Leaf("W_V", (HEAD, VALUE))


def _softmax(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    a = torch.exp((x["Q"] @ x["K"].t()) * x["s"])
    if "B" in x:
        a = a * x["B"]
    if "M" in x:
        a = a * x["M"]
    p = a / a.sum(1, keepdim=True)
    return p @ x["V"]


def _paper(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    a = torch.exp(x["X"] @ x["W"] @ x["X"].t())
    p = a / a.sum(1, keepdim=True)
    return p @ (x["X"] @ x["W_V"])


def _exponential(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.exp(x["Q"] @ x["K"].t()) @ x["V"]


def _square(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (1 + x["Q"] @ x["K"].t()).pow(2) @ x["V"]


@functools.cache
def softmax(mask: Mask, key_bias: bool = False) -> Form:
    """Softmax attention under a mask.

    Args:
        key_bias: with a factor exp(bias) for each key, as centred queries leave them (math.md §3).
    """
    inputs: tuple[Tensor, ...] = (Q, K, V, B) if key_bias else (Q, K, V)
    indicator = mask.indicator
    text = f"softmax(s Q Kᵀ{' + 1 (log B)ᵀ' if key_bias else ''}{mask.suffix}) V{mask.remark}"
    name = f"{mask.prefix}{'weighted_' if key_bias else ''}softmax"
    return Form(
        name, inputs if indicator is None else (*inputs, indicator), ("s",), (QUERY, VALUE), _softmax, text, mask
    )


PAPER = Form("paper", (X, W, W_V), (), (TOKEN, VALUE), _paper, "softmax(X W Xᵀ) X W_V")
EXPONENTIAL = Form("exponential", (Q, K, V), (), (QUERY, VALUE), _exponential, "exp(Q Kᵀ) V")
SQUARE = Form("square", (Q, K, V), (), (QUERY, VALUE), _square, "(1 + Q Kᵀ)² V")
FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        *(softmax(mask, key_bias) for key_bias in (False, True) for mask in MASKS),
        PAPER,
        EXPONENTIAL,
        SQUARE,
    )
}
"""All forms, by name."""
