"""The feature families that there are, by the names that options give them, and what ``auto`` means."""

from __future__ import annotations

from polyattn.rewriter.families.clustered.family import Clustered
from polyattn.rewriter.families.family import FamilyOptions, FeatureFamily
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.families.random.family import Random
from polyattn.rewriter.families.skeleton.family import Skeleton

FAMILIES: dict[str, type[FeatureFamily]] = {family.name: family for family in (Polynomial, Skeleton, Random, Clustered)}
AUTO: tuple[type[FeatureFamily], ...] = (Polynomial, Clustered)
"""What ``features="auto"`` tries in turn: where logits are small, as they are before training, a polynomial of low
degree is by far the cheapest; heads that it does not suit have a form in tiles."""


def families(options: FamilyOptions) -> tuple[type[FeatureFamily], ...]:
    """The families that options ask for, the one that is tried first before the others.

    Options of polynomials beside ``auto`` ask for polynomials.
    """
    if options.features != "auto":
        return (FAMILIES[options.features],)
    first, *others = AUTO
    plain = options.degree is None and options.rank is None
    return (first, *(family for family in others if plain and not any(family.problems(options))))
