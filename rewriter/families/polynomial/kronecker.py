"""The rule ``kronecker``: Hadamard powers of a product are row-wise KroneckerRule powers of its sides.

p(U Wᵀ) → Σ_α w_α Φ(U)_α Φ(W)_α

A score that is not one product of a row tensor and a column tensor is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Feature, Poly, Term, Weights
from polyattn.rewriter.algebra.monomials import rank_kind
from polyattn.rewriter.algebra.programs import Program, factors, prune, sides, top_degree
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class KroneckerRule(Rule):
    """Every polynomial of a score U Wᵀ becomes features of U and of W."""

    name = "kronecker"
    formula = "p(U Wᵀ) → Φ(U) diag(w) Φ(W)ᵀ"
    source = "math.md §2: (U₁ W₁ᵀ) ∘ (U₂ W₂ᵀ) = (U₁ ⊘ U₂) (W₁ ⊘ W₂)ᵀ"
    note = "p(U Wᵀ) = Φ(U) diag(w) Φ(W)ᵀ; (U₁ W₁ᵀ) ∘ (U₂ W₂ᵀ) = (U₁ ⊘ U₂) (W₁ ⊘ W₂)ᵀ (§2)"

    def check(self, program: Program) -> str | None:
        """Refuses a score that is not one product of a row tensor and a column tensor."""
        for factor in factors(program):
            if isinstance(factor.tensor, Poly):
                found = sides(factor.tensor.score)
                if isinstance(found, str):
                    return found
        return None

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        top = top_degree(program)

        def change(factor: Factor) -> Expr | None:
            poly = factor.tensor
            if not isinstance(poly, Poly):
                return None
            found = sides(poly.score)
            if isinstance(found, str) or not isinstance(poly.score, Def):
                raise RewriteError(str(found))
            left, right = found
            i, j = poly.score.expr.indices
            unit = poly.score.expr.terms[0].coefficient
            kind = rank_kind(top, poly.degree)
            weights = tuple(sympy.expand(c * unit**m) for m, c in enumerate(poly.coefficients))
            (alpha,) = ir.fresh((kind,), (i, j))
            product = (
                Factor(Weights(weights, kind), (alpha,)),
                Factor(Feature(left.tensor, poly.degree, kind), (i, alpha)),
                Factor(Feature(right.tensor, poly.degree, kind), (j, alpha)),
            )
            return Expr((i, j), (Term(sympy.Integer(1), product),))

        return prune(program.rewrite(lambda x: ir.map_factors(x, change)))


KRONECKER = KroneckerRule()
