"""Polynomials of the logits in place of exp: Taylor's, minimax, least squares; full or nested (math.md §3, §4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from polyattn.rewriter.algebra.monomials import Basis, full, rank
from polyattn.rewriter.algebra.tensor import R1, R
from polyattn.rewriter.families.balance import balance
from polyattn.rewriter.families.family import Bound, ChangeOfBasis, FamilyOptions, FeatureFamily, Fit, Problem, Sample
from polyattn.rewriter.families.polynomial import coefficients as fitting
from polyattn.rewriter.families.polynomial.rule import PolynomialRule

MAX_DEGREE = 4
DEFAULT_DEGREE = 2


@dataclass(frozen=True)
class Polynomial(FeatureFamily):
    """exp(S) → p(S): monomials of queries and of keys as features, each once (math.md §2).

    Packed: [kv_heads, 2 d + 1, max(d, degree + 1)]: the matrices that queries and keys are multiplied by, one above the
    other, and the coefficients in the last row.
    """

    name = "polynomial"

    power: int
    """The degree."""
    coefficients: str = "taylor"
    """How the coefficients are found: ``taylor``, ``minimax`` or ``least_squares``."""
    limit: int | None = None
    """Features at most: monomials of high degree in the leading directions only (nested form); None: all."""
    widths: tuple[int, ...] = ()
    """In how many directions the monomials of each degree are, once a nested form has been fitted."""

    @classmethod
    def problems(cls, options: FamilyOptions) -> Iterator[Problem]:
        """See :meth:`FeatureFamily.problems`."""
        degree, limit = options.degree, options.rank
        if degree is not None and not (_is_int(degree) and 1 <= degree <= MAX_DEGREE):
            yield (
                "degree",
                degree,
                f"an integer from 1 to {MAX_DEGREE}, or None; a higher degree needs too many features "
                "(C(head_dim + degree, degree)), use policy='exact' instead",
            )
        if limit is not None and not (_is_int(limit) and limit >= 2):
            yield "rank", limit, "an integer >= 2, or None"

    @classmethod
    def of(cls, options: FamilyOptions) -> Polynomial:
        """See :meth:`FeatureFamily.of`."""
        degree = DEFAULT_DEGREE if options.degree is None else options.degree
        return cls(degree, options.polynomial, options.rank)

    @property
    def rule(self) -> PolynomialRule:
        """See :attr:`FeatureFamily.rule`."""
        return PolynomialRule(self.power)

    @property
    def degree(self) -> int:
        """The degree of the polynomial."""
        return self.power

    def rank(self, d: int) -> int:
        """See :meth:`FeatureFamily.rank`."""
        return self._at_most(rank(full(d, self.power)))

    def features(self, d: int) -> int:
        """See :meth:`FeatureFamily.features`."""
        return rank(self.basis(d))

    def sizes(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`FeatureFamily.sizes`."""
        d = shape["d"]
        return {R: self.rank(d), R1: self._at_most(rank(full(d, self.power - 1)))}

    def _at_most(self, count: int) -> int:
        return count if self.limit is None else min(count, self.limit)

    def basis(self, d: int) -> Basis:
        """See :meth:`FeatureFamily.basis`."""
        return Basis(d, self.widths) if self.widths else full(d, self.power)

    @property
    def fitted(self) -> bool:
        """See :attr:`FeatureFamily.fitted`."""
        return self.coefficients != "taylor" or self.limit is not None

    def packed_shape(self, kv_heads: int, d: int) -> tuple[int, ...]:
        """See :meth:`FeatureFamily.packed_shape`."""
        return (kv_heads, 2 * d + 1, max(d, self.power + 1)) if self.fitted else (0,)

    def fit(self, sample: Sample, generator: torch.Generator) -> Fit:
        """See :meth:`FeatureFamily.fit`."""
        d = sample.k.shape[-1]
        rows = fitting.sample(sample.q, sample.k, sample.weights, sample.scale, generator, sample.mask, sample.near)
        change = balance(sample.q, sample.k, rows.mass)
        basis = full(d, self.power)
        if self.limit is not None:
            basis = fitting.choose(change.spectrum, sample.scale, self.power, d, self.limit)
        c, error = fitting.coefficients(self.coefficients, rows, change, basis)
        made = torch.zeros(self.packed_shape(len(sample.q), d), dtype=c.dtype, device=c.device)
        made[:, :d, :d], made[:, d : 2 * d, :d], made[:, -1, : self.power + 1] = change.q, change.k, c
        widths = basis.widths if self.limit is not None else ()
        return Fit(made, widths, None, tuple(error.tolist()))

    def with_fit(self, fit: Fit) -> Polynomial:
        """The widths of a nested form are part of what is computed."""
        return replace(self, widths=fit.widths)

    def bind(self, packed: torch.Tensor | None, d: int) -> Bound:
        """See :meth:`FeatureFamily.bind`."""
        if packed is None:
            return Bound(scalars=self.rule.values)
        scalars = {c.name: packed[:, -1, m].contiguous() for m, c in enumerate(self.rule.scalars)}
        change = ChangeOfBasis(packed[:, :d, :d].contiguous(), packed[:, d : 2 * d, :d].contiguous())
        return Bound(scalars=scalars, change=change)

    def describe(self, fit: Fit | None = None) -> str:
        """See :meth:`FeatureFamily.describe`."""
        text = self.rule.title
        text += f", coefficients by {self.coefficients.replace('_', ' ')}" if self.coefficients != "taylor" else ""
        widths = self.widths or (() if fit is None else fit.widths)
        return text + (f", nested {widths}" if widths else "")

    def dense(self, q: torch.Tensor, k: torch.Tensor, scale: float, packed: torch.Tensor | None) -> torch.Tensor:
        """Σ_m c_m (scale · q'·k' over the last w_m coordinates)^m; see :meth:`FeatureFamily.dense`."""
        d = q.shape[-1]
        bound = self.bind(packed, d)
        if bound.change is not None:
            q, k = q @ bound.change.q, k @ bound.change.k
        c = [_column(bound.scalars[symbol.name]) for symbol in self.rule.scalars]
        total = (c[0] * torch.ones_like(q[..., :1])).expand(*q.shape[:-1], k.shape[-2])
        for m, width in enumerate(self.basis(d).widths, 1):
            total = total + c[m] * (scale * q[..., d - width :] @ k[..., d - width :].mT) ** m
        return total


def _column(c: float | torch.Tensor) -> float | torch.Tensor:
    return c[:, None, None] if isinstance(c, torch.Tensor) else c


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
