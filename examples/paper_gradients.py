"""Gradients of the paper's model in every layer, and how far they are from autograd through exact attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from paper_model import Loss, Model

COMPONENTS = ("dX", "dW", "dW_V")
DEGREES = (1, 2, 3, 4)
GRADIENTS = ("consistent", "substituted")

Gradients = Mapping[tuple[int, str], torch.Tensor]
"""(layer, component) → gradient."""


def compiled(model: Model, degree: int, gradient: str, **options: Any) -> Any:
    """The model through polyattn, every attention of every layer in low rank.

    ``fullgraph`` and ``expect_sites`` raise where exact attention would run instead: the errors below would then be 0.
    """
    torch.compiler.reset()  # the limit on compiled forms of one function counts every degree and gradient
    chosen = {
        "policy": "low_rank",
        "degree": degree,
        "gradient": gradient,
        "inner": "eager",
        "expect_sites": len(model.layers),
        "audit_rows": 0,  # the errors are measured below, of all rows
        **options,
    }
    return torch.compile(model, backend="polyattn", fullgraph=True, options=chosen)


def gradients(run: Any, model: Model, x: torch.Tensor, loss: Loss) -> Gradients:
    """dX, dW and dW_V of every layer; ``run`` is the model or its compiled form."""
    offsets = [torch.zeros_like(x).requires_grad_() for _ in model.layers]
    weights = [weight for name, weight in model.named_parameters() if name.endswith((".W", ".W_V"))]
    found = torch.autograd.grad(loss(run(x, offsets)), [*offsets, *weights])
    layers = len(offsets)
    named = {(layer, "dX"): found[layer] for layer in range(layers)}
    for layer in range(layers):
        named[layer, "dW"], named[layer, "dW_V"] = found[layers + 2 * layer : layers + 2 * layer + 2]
    return named


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|, Frobenius."""
    return float((found - exact).norm() / exact.norm())


def errors(found: Gradients, exact: Gradients) -> dict[tuple[int, str], float]:
    """The relative error of every component in every layer."""
    return {where: relative(found[where], exact[where]) for where in exact}


def largest_logits(model: Model, x: torch.Tensor) -> list[float]:
    """The largest |X W Xᵀ| of every layer."""
    found = []
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            each = x.unsqueeze(-3)
            scores = each @ model.get_parameter(f"layers.{number}.W") @ each.transpose(-2, -1)
            found.append(float(scores.abs().max()))
            x = layer(x)
    return found
