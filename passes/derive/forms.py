"""The forms of attention that are derived: each is a plain torch function of one head's matrices, nothing more.

What a form computes is all that is written down; its autograd graph is traced, and everything else is derived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from polyattn.rewriter.algebra.expr import HEAD, KEY, QUERY, TOKEN, VALUE, Indicator, Kind, Leaf, Tensor

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

    @property
    def cotangent(self) -> Leaf:
        return Leaf("G", self.out)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.inputs if not isinstance(t, Indicator))


Q, K, V = Leaf("Q", (QUERY, HEAD)), Leaf("K", (KEY, HEAD)), Leaf("V", (KEY, VALUE))
B = Leaf("B", (KEY,))
"""A positive weight of each key: a factor of its column of the exponentials (math.md §3)."""
CAUSAL, BAND = Indicator("causal", (QUERY, KEY)), Indicator("all", (QUERY, KEY))
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


def softmax_form(causal: bool, weighted: bool = False, band: bool = False) -> str:
    """The name of softmax attention's form: with a causal mask or a band of near pairs, and weights of the keys."""
    return ("causal_" if causal else "band_" if band else "") + ("weighted_" if weighted else "") + "softmax"


_OUT = (QUERY, VALUE)
FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("softmax", (Q, K, V), ("s",), _OUT, _softmax, "softmax(s Q Kᵀ) V"),
        Form("causal_softmax", (Q, K, V, CAUSAL), ("s",), _OUT, _softmax, "softmax(s Q Kᵀ, causal) V"),
        Form("weighted_softmax", (Q, K, V, B), ("s",), _OUT, _softmax, "softmax(s Q Kᵀ + 1 (log B)ᵀ) V"),
        Form(
            "causal_weighted_softmax",
            (Q, K, V, B, CAUSAL),
            ("s",),
            _OUT,
            _softmax,
            "softmax(s Q Kᵀ + 1 (log B)ᵀ, causal) V",
        ),
        Form("band_softmax", (Q, K, V, BAND), ("s",), _OUT, _softmax, "softmax(s Q Kᵀ) V, near pairs apart"),
        Form(
            "band_weighted_softmax",
            (Q, K, V, B, BAND),
            ("s",),
            _OUT,
            _softmax,
            "softmax(s Q Kᵀ + 1 (log B)ᵀ) V, near pairs apart",
        ),
        Form("paper", (X, W, W_V), (), (TOKEN, VALUE), _paper, "softmax(X W Xᵀ) X W_V"),
        Form("exponential", (Q, K, V), (), _OUT, _exponential, "exp(Q Kᵀ) V"),
        Form("square", (Q, K, V), (), _OUT, _square, "(1 + Q Kᵀ)² V"),
    )
}
