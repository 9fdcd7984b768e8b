"""Shifts of queries and keys: exact, and they make the logits small before exp is approximated (math.md §3).

    exp(s q·k) = exp(s (q − u)·(k − c)) · exp(s u·(k − c)) · exp(s q·c)

The last factor is the same in a row and cancels in the softmax, also under a causal mask; the middle one is a weight of
the key; only the first is approximated. c and u are mean key and mean query of a head, constants to differentiation.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STATISTICS = ("none", "call", "first_chunk")
"""Which tokens the means are taken of: no shift, all of a call, or the first chunk, before which no query stands."""


class Shifted(NamedTuple):
    """Queries and keys as the kernels take them, and the weights of the keys, [heads, n_k], at most 1."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    u: torch.Tensor
    """Mean queries, [heads, d]."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the kernels take in place of queries and keys."""
        return {"Q": self.q, "K": self.k, "B": self.weights}


def shift(q: torch.Tensor, k: torch.Tensor, scale: float, first: int | None) -> Shifted:
    """Subtract the means of a call's queries and keys.

    Args:
        first: how many tokens from the start the means are taken of; None: all.
    """
    c = k[:, :first].mean(1)
    u = q[:, :, :first].mean((1, 2))
    centred = k - c[:, None]
    logs = torch.einsum("hjd,hd->hj", centred, u) * scale
    return Shifted(q - u[:, None, None], centred, (logs - logs.amax(1, keepdim=True)).exp(), u)


def key_gradient(dk: torch.Tensor, dweights: torch.Tensor, made: Shifted, scale: float) -> torch.Tensor:
    """The gradient by the keys, of which the weights are made as well: ∂ log w_j / ∂k_j = s u."""
    return dk + (dweights * made.weights)[..., None] * (scale * made.u)[:, None]
