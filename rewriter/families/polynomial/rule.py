"""The approximate rule, with its domain and its bound (math.md §4): exp(S) → Σ_{m ≤ g} a_m S^m.

The coefficients are symbols a_0 … a_g, so that a derivation serves every polynomial of a degree; Taylor's are the
numbers used for now.  Under a causal mask the rule leaves the near field alone: there exp stays exact (§6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Indicator, Leaf, Map, Poly, Program, Term
from polyattn.rewriter.families.polynomial.monomials import taylor


@dataclass(frozen=True)
class Approximation:
    """exp(S) → polynomial of a degree, on |S| ≤ bound."""

    degree: int

    @property
    def coefficients(self) -> tuple[sympy.Symbol, ...]:
        return tuple(sympy.Symbol(f"a{m}", positive=True) for m in range(self.degree + 1))

    @property
    def inputs(self) -> tuple[Leaf, ...]:
        """Tensors that the rule brings into a program: none."""
        return ()

    @property
    def text(self) -> str:
        return f"exp(S) → p(S) of degree {self.degree}"

    @property
    def values(self) -> dict[str, float]:
        """The numbers that stand for the coefficients: Taylor's."""
        return {c.name: value for c, value in zip(self.coefficients, taylor(self.degree), strict=True)}

    def relative_error(self, bound: float) -> float:
        """Bound of |p(x) e^{−x} − 1| on |x| ≤ bound for Taylor's p, by Lagrange's remainder."""
        return bound ** (self.degree + 1) / math.factorial(self.degree + 1) * math.exp(2 * bound)

    def apply(self, program: Program) -> Program:
        """Replace exp of a score everywhere except in the near field."""
        return program.rewrite(self._change)

    def _change(self, x: Expr) -> Expr:
        total = []
        for term in x.terms:
            near = any(isinstance(f.tensor, Indicator) and f.tensor.which == "near" for f in term.factors)
            total.append(term if near else Term(term.coefficient, tuple(self._factor(f) for f in term.factors)))
        return ir.collect(Expr(x.out, tuple(total)))

    def _factor(self, factor: Factor) -> Factor:
        tensor = factor.tensor
        if isinstance(tensor, Map) and tensor.function == "exp":
            return Factor(Poly(tensor.argument, self.coefficients), factor.indices)
        return factor
