"""Exact transformations of queries and keys, after which the logits are small where exp is approximated (math.md §3).

    exp(s q·k) = exp(s (q − u)·(k − c)) · exp(s u·(k − c)) · exp(s q·c)

The last factor is the same in a row and cancels in the softmax, also under a causal mask; the middle one is a weight of
the key; only the first is approximated. c and u are mean key and mean query of a head. Products do not change either
when q is multiplied by a matrix and k by its inverse transpose, which nested polynomials need. Keys that are computed
exactly elsewhere (outlier_keys.py) get the weight zero. Means, matrices and the choice of such keys are constants to
differentiation.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d].
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Of the keys, [heads, n_k], at most 1; None without a shift and without heavy keys."""
    u: torch.Tensor
    """Mean queries, [heads, d]."""
    c: torch.Tensor
    """Mean keys, of those that are not heavy, [heads, d]; zero without a shift, as u is."""
    top: torch.Tensor
    """The logarithm that weights are divided by, [heads]."""
    heavy: torch.Tensor | None
    """Positions of the keys that are computed exactly, [heads, ·]."""
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


@dataclass(frozen=True)
class Heavy:
    """Which keys of a call are computed exactly: those at some positions, and so many of the largest norm."""

    count: int = 0
    positions: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.count > 0 or len(self.positions) > 0

    def of(self, k: torch.Tensor, some: int | None) -> torch.Tensor:
        """Positions [heads, ·] in keys [heads, n_k, d]; the largest are of the ``some`` first ones.

        Norms are around the mean of the others: found twice, because a very large key moves the mean of all.
        """
        n = k.shape[1]
        named = torch.tensor(sorted(p for p in set(self.positions) if p < n), dtype=torch.long, device=k.device)
        chosen = named.expand(len(k), -1)
        free = min(n if some is None else some, n)
        count = min(self.count, free - int((named < free).sum()))
        for _ in range(2):
            norms = (k[:, :free] - _mean(k, chosen, some)[:, None]).norm(dim=-1).index_fill(1, named[named < free], -1)
            chosen = torch.cat([named.expand(len(k), -1), norms.topk(count)[1]], 1)
        return chosen


def _mean(k: torch.Tensor, heavy: torch.Tensor | None, some: int | None) -> torch.Tensor:
    """Of keys [heads, n_k, d], the first ones of them, without the heavy ones; zero where no other is left."""
    if heavy is None:
        return k[:, :some].mean(1)
    keep = torch.ones_like(k[..., 0]).scatter(1, heavy, 0.0)[:, :some, None]
    return (k[:, :some] * keep).sum(1) / keep.sum(1).clamp_min(1)


def move(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    statistics: str,
    first: int,
    turn: Turn | None = None,
    heavy: Heavy | None = None,
) -> Moved:
    """Subtract the means of a call's queries and keys, and multiply by matrices.

    Args:
        statistics: one of ``STATISTICS``.
        first: tokens of the first chunk.
        turn: of each head.
        heavy: which keys are computed exactly; with ``first_chunk`` the largest are those of the first chunk.
    """
    zero = torch.zeros_like(k[:, 0])
    weights, u, c, top = None, zero, zero, zero[:, 0]
    some = first if statistics == "first_chunk" else None
    chosen = heavy.of(k, some) if heavy else None
    logs = torch.zeros_like(k[..., 0]) if chosen is not None else None
    if statistics != "none":
        c, u = _mean(k, chosen, some), q[:, :, :some].mean((1, 2))
        q, k = q - u[:, None, None], k - c[:, None]
        logs = torch.einsum("hjd,hd->hj", k, u) * scale
    if logs is not None:
        if chosen is not None:
            logs = logs.scatter(1, chosen, -torch.inf)
        top = logs.amax(1)
        top = top.masked_fill(top == -torch.inf, 0)
        weights = (logs - top[:, None]).exp()
    if turn is not None:
        q, k = q @ turn.q[:, None], k @ turn.k
    return Moved(q, k, weights, u, c, top, chosen, turn)
