"""The approximate rule of polynomials, with its domain and its bound (math.md §4): exp(S) → Σ_{m ≤ g} a_m S^m.

The coefficients are symbols a_0 … a_g, so that a derivation serves every polynomial of a degree. The rule leaves the
near field of a mask alone: there exp stays exact (§6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Map, Poly, Term
from polyattn.rewriter.algebra.monomials import full, rank, taylor
from polyattn.rewriter.algebra.programs import Program, factors, is_near, is_pair
from polyattn.rewriter.algebra.tensor import CHUNK, R1, R
from polyattn.rewriter.families.polynomial.compress import Compress
from polyattn.rewriter.families.polynomial.kronecker import KRONECKER
from polyattn.rewriter.families.polynomial.power import POWER
from polyattn.rewriter.notation.symbols import SUBSCRIPTS
from polyattn.rewriter.rules.absorb import ABSORB
from polyattn.rewriter.rules.rule import ApproximateRule, Rule


@dataclass(frozen=True)
class PolynomialRule(ApproximateRule):
    """A polynomial of a degree in place of exp, with symbols for coefficients: one derivation serves them all."""

    degree: int

    formula = "exp(S) → Σ_{m ≤ g} a_m S^m"
    source = "math.md §4; Alman and Song 2023 (arXiv 2302.13214) for bounded entries"
    domain = "|S| ≤ B"
    bound = "|p(x) e^{−x} − 1| ≤ B^{g+1} / (g+1)! · e^{2B} for Taylor's polynomial"

    @property
    def scalars(self) -> tuple[sympy.Symbol, ...]:
        """The coefficients a_0 … a_g."""
        return tuple(sympy.Symbol(f"a{m}", positive=True) for m in range(self.degree + 1))

    @property
    def title(self) -> str:
        """See :attr:`ApproximateRule.title`."""
        return f"degree {self.degree}"

    @property
    def note(self) -> str:
        """See :attr:`ApproximateRule.note`."""
        return f"exp(S) → p(S) of degree {self.degree}; the one step that is no identity (§4)"

    @property
    def features_note(self) -> str:
        """See :attr:`ApproximateRule.features_note`."""
        ranks = [
            f"Φ{str(m).translate(SUBSCRIPTS)} has {name} = C(d+{m}, {m}) columns"
            for m, name in ((self.degree, "r"), (self.degree - 1, "r′"))
            if m > 0
        ]
        return f"Monomials of a row: {'; '.join(ranks)}."

    @property
    def rank(self) -> sympy.Symbol:
        """See :attr:`ApproximateRule.rank`."""
        return R

    @property
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """r and chunks grow like d^g, r′ like d^(g−1)."""
        return {R: self.degree, CHUNK: self.degree, R1: self.degree - 1}

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`ApproximateRule.ranks`."""
        d = shape["d"]
        return {R: rank(full(d, self.degree)), R1: rank(full(d, self.degree - 1))}

    def then(self, gradient: str) -> tuple[Rule, ...]:
        """See :meth:`ApproximateRule.then`."""
        return POWER, KRONECKER, ABSORB, Compress(self.degree)

    @property
    def values(self) -> dict[str, float]:
        """The numbers that stand for the coefficients where none are fitted: Taylor's."""
        return {c.name: value for c, value in zip(self.scalars, taylor(self.degree), strict=True)}

    def relative_error(self, bound: float) -> float:
        """A bound of |p(x) e^{−x} − 1| on |x| ≤ bound for Taylor's p, by Lagrange's remainder."""
        return bound ** (self.degree + 1) / math.factorial(self.degree + 1) * math.exp(2 * bound)

    def check(self, program: Program) -> str | None:
        """Refuses an exponential of what is no score: of rows of tokens there is no polynomial in place of exp."""
        for factor in factors(program):
            tensor = factor.tensor
            if isinstance(tensor, Map) and tensor.function == "exp" and not is_pair(tensor):
                return f"{tensor.name} is not the exponential of a score: it is not over a pair of tokens"
        return None

    def rewrite(self, program: Program) -> Program:
        """Replaces exp of a score everywhere except in the near field."""
        return program.rewrite(self._change)

    def _change(self, x: Expr) -> Expr:
        total = []
        for term in x.terms:
            total.append(
                term if is_near(term) else Term(term.coefficient, tuple(self._factor(f) for f in term.factors))
            )
        return ir.collect(Expr(x.out, tuple(total)))

    def _factor(self, factor: Factor) -> Factor:
        tensor = factor.tensor
        if isinstance(tensor, Map) and tensor.function == "exp":
            return Factor(Poly(tensor.argument, self.scalars), factor.indices)
        return factor
