"""Exact transformations of queries and keys, after which the logits are small where exp is approximated (math.md §3).

    exp(s q·k) = exp(s (q − u)·(k − c)) · exp(s u·(k − c)) · exp(s q·c)

The last factor is the same in a row and cancels in the softmax, also under a causal mask; the middle one is a weight of
the key; only the first is approximated. c and u are mean key and mean query of a head. Products do not change either
when q is multiplied by a matrix and k by its inverse transpose, which nested polynomials need. Means and matrices are
constants to differentiation.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STATISTICS = ("none", "call", "first_chunk")
"""Which tokens the means are taken of: no shift, all of a call, or the first chunk, before which no query stands."""


class Turn(NamedTuple):
    """Matrices [heads, d, d] that queries and keys are multiplied by from the right; one times the other's transpose
    is the identity."""

    q: torch.Tensor
    k: torch.Tensor


class Moved(NamedTuple):
    """Queries and keys as the kernels take them."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor | None
    """Of the keys, [heads, n_k], at most 1; None without a shift."""
    u: torch.Tensor
    """Mean queries, [heads, d]."""
    turn: Turn | None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the kernels take in place of queries and keys."""
        return {"Q": self.q, "K": self.k, **({} if self.weights is None else {"B": self.weights})}

    def query_gradient(self, dq: torch.Tensor) -> torch.Tensor:
        """The gradient by the queries, from the kernels'."""
        return dq if self.turn is None else dq @ self.turn.q[:, None].mT

    def key_gradient(self, dk: torch.Tensor, dweights: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The gradient by the keys, of which the weights are made as well: ∂ log w_j / ∂k_j = s u."""
        if self.turn is not None:
            dk = dk @ self.turn.k.mT
        if dweights is None or self.weights is None:
            return dk
        return dk + (dweights * self.weights)[..., None] * (scale * self.u)[:, None]


def move(
    q: torch.Tensor, k: torch.Tensor, scale: float, statistics: str, first: int, turn: Turn | None = None
) -> Moved:
    """Subtract the means of a call's queries and keys, and multiply by matrices.

    Args:
        statistics: one of ``STATISTICS``.
        first: tokens of the first chunk.
        turn: of each head.
    """
    weights, u = None, torch.zeros_like(k[:, 0])
    if statistics != "none":
        some = first if statistics == "first_chunk" else None
        c, u = k[:, :some].mean(1), q[:, :, :some].mean((1, 2))
        q, k = q - u[:, None, None], k - c[:, None]
        logs = torch.einsum("hjd,hd->hj", k, u) * scale
        weights = (logs - logs.amax(1, keepdim=True)).exp()
    if turn is not None:
        q, k = q @ turn.q[:, None], k @ turn.k
    return Moved(q, k, weights, u, turn)
