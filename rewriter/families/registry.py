"""The feature families that there are, by the names that options give them."""

from __future__ import annotations

from polyattn.rewriter.families.clustered.family import Clustered
from polyattn.rewriter.families.family import FeatureFamily
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.families.random.family import Random
from polyattn.rewriter.families.skeleton.family import Skeleton

FAMILIES: dict[str, type[FeatureFamily]] = {family.name: family for family in (Polynomial, Skeleton, Random, Clustered)}
DEFAULT: type[FeatureFamily] = Polynomial
"""What ``features="auto"`` means."""


def family_class(name: str) -> type[FeatureFamily]:
    """The family of a value of ``Options.features``."""
    return DEFAULT if name == "auto" else FAMILIES[name]
