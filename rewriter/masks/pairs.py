"""Which queries attend to which keys where batch elements lie one after the other, and which of the pairs are near."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyattn.rewriter.masks.mask import NONE, Mask


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query i and a key j, indices into the joined elements.

    A query attends to the keys of its own element that its mask shows. Near pairs are computed exactly elsewhere:
    those that are near under the mask, with chunks of ``near`` tokens; None: no pair is.
    """

    per_query: int
    per_key: int
    mask: Mask = NONE
    near: int | None = None

    def seen(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Which queries attend to which keys, [i, j]."""
        own = self._own(i, j)
        return own & self.mask.visible(i % self.per_query, j % self.per_key) if self.mask.hides else own

    def hidden_alike(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Near pairs, and those beside them that the mask hides and that are not needed either, [i, j]."""
        near = self.near or 1
        gap = (i % self.per_query // near)[:, None] - j % self.per_key // near
        low, high = self.mask.gaps
        return self._own(i, j) & (gap <= high) & (gap >= low)

    def far(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Which pairs an approximation stands for, [i, j]."""
        seen = self.seen(i, j)
        if self.near is None:
            return seen
        return seen & ~self.mask.near(i % self.per_query, j % self.per_key, self.near)

    def _own(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i // self.per_query)[:, None] == j // self.per_key
