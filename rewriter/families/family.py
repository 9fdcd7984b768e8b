"""Feature families: what stands in place of exp, as values that everything else asks.

A family is a frozen value with its own parameters. It brings the approximate rule of the algebra, says how many
features it has, what it fits to the heads of a call and how that is packed in one tensor, and how the packed tensor
binds to the arguments of the kernels. ``dense`` is its meaning, written out, and the oracle of its tests.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import sympy
import torch

from polyattn.rewriter.algebra.monomials import Basis, full
from polyattn.rewriter.masks.mask import Mask
from polyattn.rewriter.rules.rule import ApproximateRule

Problem = tuple[str, object, str]
"""Of an option: its name, the value that is outside of its domain, and the domain."""


class FamilyOptions(Protocol):
    """The options that families read; see :class:`polyattn.Options`."""

    @property
    def features(self) -> str:
        """See :attr:`polyattn.Options.features`."""
        ...

    @property
    def degree(self) -> int | None:
        """See :attr:`polyattn.Options.degree`."""
        ...

    @property
    def polynomial(self) -> str:
        """See :attr:`polyattn.Options.polynomial`."""
        ...

    @property
    def rank(self) -> int | None:
        """See :attr:`polyattn.Options.rank`."""
        ...

    @property
    def gradient(self) -> str:
        """See :attr:`polyattn.Options.gradient`."""
        ...

    @property
    def local_window(self) -> int | None:
        """See :attr:`polyattn.Options.local_window`."""
        ...

    @property
    def outlier_keys(self) -> int:
        """See :attr:`polyattn.Options.outlier_keys`."""
        ...

    @property
    def exact_keys(self) -> tuple[int, ...]:
        """See :attr:`polyattn.Options.exact_keys`."""
        ...

    @property
    def tolerance(self) -> float:
        """See :attr:`polyattn.Options.tolerance`."""
        ...

    @property
    def relative_tolerance(self) -> float:
        """See :attr:`polyattn.Options.relative_tolerance`."""
        ...

    @property
    def gradient_tolerance(self) -> float:
        """See :attr:`polyattn.Options.gradient_tolerance`."""
        ...

    @property
    def seed(self) -> int:
        """See :attr:`polyattn.Options.seed`."""
        ...


class ChangeOfBasis(NamedTuple):
    """Matrices [heads, d, d] that queries and keys are multiplied by from the right; one times the other's transpose
    is the identity, so that products of queries and keys do not change."""

    q: torch.Tensor
    k: torch.Tensor


@dataclass(frozen=True, eq=False)
class Bound:
    """What is fitted, as the kernels of all heads take it."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors without a token axis, by the names of the rule's inputs."""
    scalars: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    """Values of the rule's symbols: numbers, or one for each head, [heads]."""
    change: ChangeOfBasis | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """The tensors of a call that a fit is made of, centred: queries and keys of each head, element by element."""

    q: torch.Tensor
    """[kv_heads, elements, groups · n_q, d]"""
    k: torch.Tensor
    """[kv_heads, elements, n_k, d]"""
    weights: torch.Tensor
    """Factors exp(bias) of the keys, [kv_heads, elements, n_k]; a key of weight 0 is not attended to."""
    scale: float
    mask: Mask
    near: int | None
    """Tokens per chunk where near pairs are computed exactly elsewhere; None: no pair is."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What is fitted to the heads of a site, and what is known of it."""

    values: torch.Tensor
    """Packed: the shape is :meth:`FeatureFamily.packed_shape`."""
    widths: tuple[int, ...] = ()
    """Directions that the monomials of each degree use (nested polynomials); nothing for the full form."""
    radius: torch.Tensor | None = None
    """The largest norm of a centred query that the fit saw, [kv_heads]; None: not known."""
    error: tuple[float, ...] = field(default=())
    """For each key head, the mean error of softmax rows that the fit did not see, Σ_j |P̃_ij − P_ij|."""
    call: int | None = None
    """Number of the call that it was made of; None where it was loaded."""


class FeatureFamily(abc.ABC):
    """Base of the families."""

    name: ClassVar[str]
    """The value of ``Options.features`` that asks for it."""

    # -- options -----------------------------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def problems(cls, options: FamilyOptions) -> Iterator[Problem]:
        """The family's own options whose values lie outside of their domains."""

    @classmethod
    @abc.abstractmethod
    def of(cls, options: FamilyOptions) -> FeatureFamily:
        """The family that options ask for; they have no problems."""

    # -- the algebra -------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def rule(self) -> ApproximateRule:
        """exp(S) → features, in the algebra; derivations and kernels depend on this and on nothing else of a family."""

    @property
    def degree(self) -> int | None:
        """The degree of a polynomial; None for other families."""
        return None

    @abc.abstractmethod
    def rank(self, d: int) -> int:
        """Number of features of a query or key of width d."""

    def features(self, d: int) -> int:
        """Number of features with what a fit has chosen; :meth:`rank` is what they are at most."""
        return self.rank(d)

    @abc.abstractmethod
    def sizes(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """Numbers for the symbols of costs that the rule brings in.

        Args:
            shape: heads, kv_heads, n_q, n_k and d.
        """

    def mask(self, mask: Mask) -> Mask | str:
        """The mask of the derivation where queries see what ``mask`` shows: the same one, or one with near pairs of the
        family's own; or why there is no form under it."""
        return mask

    def basis(self, d: int) -> Basis:
        """The monomials that ``features`` nodes of the plan stand for; the constant one where there are none."""
        return full(d, 0)

    def chunk_length(self, d: int, of_target: Callable[[int], int]) -> int:
        """Tokens per chunk under a causal mask.

        Args:
            of_target: the target's own choice, from :func:`below` of the rank.
        """
        return of_target(below(self.rank(d)))

    # -- the fit -----------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether something is fitted to the heads of a site at its first low-rank call."""
        return False

    @property
    def by_element(self) -> bool:
        """Whether what a call hands to its backward differs between batch elements: [batch · kv_heads, ...]."""
        return False

    def packed_shape(self, kv_heads: int, d: int) -> tuple[int, ...]:
        """The shape of ``Fit.values``."""
        return (0,)

    def fit(self, sample: Sample, generator: torch.Generator) -> Fit:
        """Fit the features to each head of a call.

        Args:
            generator: draws rows and columns; torch's own generators are left alone.
        """
        raise NotImplementedError(f"{self.name} features are not fitted")

    def with_fit(self, fit: Fit) -> FeatureFamily:
        """The family with the parameters that a fit has chosen."""
        return self

    def bind(self, packed: torch.Tensor | None, d: int) -> Bound:
        """What the kernels take.

        Args:
            packed: ``Fit.values`` for all heads (batch elements one after the other) in the kernels' dtype; None where
                nothing is fitted.
            d: width of queries and keys.
        """
        return Bound()

    # -- reading -----------------------------------------------------------------------------------------------------

    def describe(self, fit: Fit | None = None) -> str:
        """In words, for a report."""
        return self.rule.title

    @abc.abstractmethod
    def dense(self, q: torch.Tensor, k: torch.Tensor, scale: float, packed: torch.Tensor | None) -> torch.Tensor:
        """The approximation of exp(scale · q kᵀ), written out: q [heads, s, d], k [heads, c, d] → [heads, s, c].

        Differentiable in q and k. This is the oracle of the tests, no kernel is derived from it.

        Args:
            packed: ``Fit.values`` of the heads; None where nothing is fitted.
        """


def below(rank: int) -> int:
    """Half of the least power of two that is not less than a rank."""
    return 1 << (rank - 1).bit_length() >> 1
