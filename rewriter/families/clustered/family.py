"""Clustered attention: near pairs of tiles exact, the others expanded around the mean query of a tile (math.md §8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polyattn.rewriter.families.clustered.rule import ClusteredRule
from polyattn.rewriter.families.family import FamilyOptions, Fit, Problem
from polyattn.rewriter.tiles.family import TiledFamily

LEAST, MOST = 8, 1024


@dataclass(frozen=True)
class Clustered(TiledFamily):
    """exp expanded around the mean query of a tile, for pairs of tiles that are not near."""

    name = "clustered"

    order: int = 1
    """Order of the expansion in the distance of a query from the mean of its tile."""

    @classmethod
    def problems(cls, options: FamilyOptions) -> Iterator[Problem]:
        """See :meth:`FeatureFamily.problems`."""
        order, width = options.degree, options.rank
        if order is not None and (isinstance(order, bool) or order not in (0, 1, 2)):
            yield "degree", order, "0, 1 or 2, the order of the expansion, or None"
        if options.polynomial != "taylor":
            yield "polynomial", options.polynomial, "left out: clustered attention has none"
        whole = isinstance(width, int) and not isinstance(width, bool)
        if width is not None and not (whole and LEAST <= width <= MOST):
            yield "rank", width, f"an integer from {LEAST} to {MOST}, the tokens of a tile, or None"
        if options.gradient == "substituted":
            yield "gradient", options.gradient, "'consistent' or 'auto': the other would need a moment of every pair"
        if options.local_window is not None:
            yield "local_window", options.local_window, "left out: near pairs are found wherever they are"
        if options.outlier_keys or options.exact_keys:
            name = "outlier_keys" if options.outlier_keys else "exact_keys"
            yield name, getattr(options, name), "left out: pairs with such keys are near where it matters"

    @classmethod
    def of(cls, options: FamilyOptions) -> Clustered:
        """See :meth:`FeatureFamily.of`."""
        tolerances = options.tolerance, options.relative_tolerance, options.gradient_tolerance
        return cls(options.rank, *tolerances, 1 if options.degree is None else options.degree)

    @property
    def rule(self) -> ClusteredRule:
        """See :attr:`FeatureFamily.rule`."""
        return ClusteredRule(self.order)

    def rank(self, d: int) -> int:
        """See :meth:`FeatureFamily.rank`: of a pair of tiles a query sees one key of width d in place of features."""
        return d

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
