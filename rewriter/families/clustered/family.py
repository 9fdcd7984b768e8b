"""Clustered attention: tiles of similar tokens at every call, near pairs of tiles exact, the others expanded (math.md §8)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch

from polyattn.rewriter.algebra.tensor import NEAR_SHARE, T_K, T_Q
from polyattn.rewriter.families.clustered.rule import ClusteredRule
from polyattn.rewriter.families.clustered.tiles import Shape
from polyattn.rewriter.families.family import FamilyOptions, FeatureFamily, Fit, Problem
from polyattn.rewriter.masks.mask import NEAR_TILES, Mask

LEAST, MOST = 8, 1024
TAU = 0.25
"""The first threshold of near pairs, in tolerances."""
TYPICAL_SHARE = 0.125
"""The share of near pairs that costs are predicted with before a call has shown it."""


@dataclass(frozen=True)
class Clustered(FeatureFamily):
    """exp expanded around the mean query of a tile, for pairs of tiles that are not near.

    Packed: [heads, 1], the threshold of near pairs of each key head; 0: exact attention.
    """

    name = "clustered"

    order: int = 1
    """Order of the expansion in the distance of a query from the mean of its tile."""
    width: int | None = None
    """Tokens of a tile; None: about the root of the number of tokens."""
    tolerance: float = 2e-2
    relative_tolerance: float = 0.1
    gradient_tolerance: float = 0.1

    @classmethod
    def problems(cls, options: FamilyOptions) -> Iterator[Problem]:
        """See :meth:`FeatureFamily.problems`."""
        order, width = options.degree, options.rank
        if order is not None and (isinstance(order, bool) or order not in (0, 1, 2)):
            yield "degree", order, "0, 1 or 2, the order of the expansion, or None"
        if options.polynomial != "taylor":
            yield "polynomial", options.polynomial, "left out: clustered attention has none"
        if width is not None and not (
            isinstance(width, int) and not isinstance(width, bool) and LEAST <= width <= MOST
        ):
            yield "rank", width, f"an integer from {LEAST} to {MOST}, the tokens of a tile, or None"

    @classmethod
    def of(cls, options: FamilyOptions) -> Clustered:
        """See :meth:`FeatureFamily.of`."""
        order = 1 if options.degree is None else options.degree
        return cls(
            order, options.rank, options.tolerance, options.relative_tolerance, options.gradient_tolerance
        )

    @property
    def rule(self) -> ClusteredRule:
        """See :attr:`FeatureFamily.rule`."""
        return ClusteredRule(self.order)

    def mask(self, mask: Mask) -> Mask | str:
        """See :meth:`FeatureFamily.mask`."""
        if mask.hides:
            return "clustered attention has no form under a causal mask yet"
        return NEAR_TILES

    def tile_width(self, tokens: int) -> int:
        """About how many tokens a tile has: the root of their number, so that tiles grow as much as their number does."""
        return self.width or 2 ** max(4, round(math.log2(max(tokens, 1)) / 2 - 0.5))

    def rank(self, d: int) -> int:
        """See :meth:`FeatureFamily.rank`: one column for each width of queries, what a pair of tiles has in place of
        features."""
        return d

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
        return kv_heads, 1

    def describe(self, fit: Fit | None = None) -> str:
        """See :meth:`FeatureFamily.describe`."""
        return self.rule.title

    def dense(self, q: torch.Tensor, k: torch.Tensor, scale: float, packed: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`FeatureFamily.dense`.

        Raises:
            NotImplementedError: always: which pairs are near depends on the values too, so that no function of queries
                and keys alone stands in place of exp; the interpreter of the algebra is the oracle of the tests.
        """
        raise NotImplementedError("what is near depends on values: there is no function of queries and keys alone")
