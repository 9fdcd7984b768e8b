"""Which queries attend to which keys where batch elements lie one after the other, and which of the pairs are near."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ELSEWHERE = 2**40
"""Chunks between tokens of different batch elements."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query i and a key j, indices into the joined elements.

    A query attends to the keys of its own element, under a causal mask up to its own position. Near pairs are computed
    exactly elsewhere: those of one chunk of ``near`` tokens under a causal mask, of neighbouring chunks without; None:
    no pair is.
    """

    per_query: int
    per_key: int
    causal: bool = False
    near: int | None = None

    def seen(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Which queries attend to which keys, [i, j]."""
        own = (i // self.per_query)[:, None] == j // self.per_key
        return own & (j % self.per_key <= (i % self.per_query)[:, None]) if self.causal else own

    def gap(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """How many chunks the query is after the key, [i, j]."""
        near = self.near or 1
        gap = (i % self.per_query // near)[:, None] - j % self.per_key // near
        return gap.masked_fill((i // self.per_query)[:, None] != j // self.per_key, ELSEWHERE)

    def far(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Which pairs an approximation stands for, [i, j]."""
        if self.near is None:
            return self.seen(i, j)
        gap = self.gap(i, j)
        return self.seen(i, j) & (gap > 0 if self.causal else gap.abs() > 1)
