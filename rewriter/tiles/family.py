"""What a feature family in tiles says beside what every family says: widths of tiles, tolerances, thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from polyattn.rewriter.algebra.tensor import NEAR_SHARE, T_K, T_Q
from polyattn.rewriter.families.family import FeatureFamily
from polyattn.rewriter.masks.mask import CAUSAL_NEAR_TILES, NEAR_TILES, Mask
from polyattn.rewriter.tiles.blocks import MOST
from polyattn.rewriter.tiles.tree import Shape

THRESHOLD = 0.25
"""The first threshold of near pairs, in tolerances."""
TYPICAL_SHARE = 0.15
"""The share of near pairs that costs are predicted with before a call has shown it."""


@dataclass(frozen=True)
class TiledFamily(FeatureFamily):
    """A family that finds tiles of similar tokens at every call, and which pairs of tiles are near.

    Packed: [heads, blocks], the threshold of near pairs of each key head in each block of the pairs of tokens; 0: exact
    attention. Without a mask all pairs are the first block.
    """

    width: int | None = None
    """Tokens of a tile; None: about the root of the number of tokens."""
    tolerance: float = 2e-2
    relative_tolerance: float = 0.1
    gradient_tolerance: float = 0.1

    def mask(self, mask: Mask) -> Mask | str:
        """See :meth:`FeatureFamily.mask`: tiles hold tokens of any position."""
        return CAUSAL_NEAR_TILES if mask.is_causal else NEAR_TILES

    def tile_width(self, tokens: int) -> int:
        """About how many tokens a tile has: near the root of their number, so that tiles grow as their number does."""
        return self.width or 2 ** max(4, round(math.log2(max(tokens, 1)) / 2 - 0.5))

    def sizes(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`FeatureFamily.sizes`."""
        groups = shape["heads"] // shape["kv_heads"]
        queries = Shape.of(shape["n_q"] * groups, self.tile_width(shape["n_q"]))
        keys = Shape.of(shape["n_k"], self.tile_width(shape["n_k"]))
        return {T_Q: queries.width, T_K: keys.width, NEAR_SHARE: TYPICAL_SHARE}

    @property
    def fitted(self) -> bool:
        """See :attr:`FeatureFamily.fitted`: a threshold for each head, which every call checks."""
        return True

    @property
    def by_element(self) -> bool:
        """See :attr:`FeatureFamily.by_element`: a batch element of a head may have been exact."""
        return True

    def packed_shape(self, kv_heads: int, d: int) -> tuple[int, ...]:
        """See :meth:`FeatureFamily.packed_shape`."""
        return kv_heads, MOST
