"""The rule ``compress``: a monomial times a variable is a monomial.

Φ_{g−1}(K)[j,β] K[j,a] → Σ_α C[β,a,α] Φ_g(K)[j,α]

It takes the factor d from the state of a consistent gradient. Features of the highest degree are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Feature, Index, Select, Term
from polyattn.rewriter.algebra.monomials import rank_kind
from polyattn.rewriter.algebra.programs import Program, top_degree
from polyattn.rewriter.notation.symbols import SUBSCRIPTS
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class Compress(Rule):
    """Features of a lower degree times their own source are a selection of the features one degree higher."""

    degree: int
    """What the note says; a program's own highest degree is what counts."""

    name = "compress"
    formula = "Φ_{g−1}(K)[j,β] K[j,a] → Σ_α C[β,a,α] Φ_g(K)[j,α]"
    source = "math.md §2, symmetric compression"

    @property
    def note(self) -> str:
        """See :attr:`Rule.note`."""
        low, high = (str(g).translate(SUBSCRIPTS) for g in (self.degree - 1, self.degree))
        return f"the columns of Φ{low}(K) ⊘ K are columns of Φ{high}(K): a monomial times a variable (§2)"

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        top = top_degree(program)
        return program.rewrite(lambda x: Expr(x.out, tuple(_compress(term, top, x.out) for term in x.terms)))


def _compress(term: Term, top: int, out: Sequence[Index | None]) -> Term:
    for f in term.factors:
        if not (isinstance(f.tensor, Feature) and f.tensor.degree < top):
            continue
        token, beta = f.indices
        for other in term.factors:
            if other.tensor == f.tensor.source and other.indices[0] == token:
                a = other.indices[1]
                upper = rank_kind(top, f.tensor.degree + 1)
                (alpha,) = ir.fresh((upper,), term.indices | {index for index in out if index is not None})
                rest = list(term.factors)
                rest.remove(f)
                rest.remove(other)
                select = Select(f.tensor.rank, a.kind, upper, f.tensor.degree + 1)
                wide = Feature(f.tensor.source, f.tensor.degree + 1, upper)
                return Term(term.coefficient, (*rest, Factor(select, (beta, a, alpha)), Factor(wide, (token, alpha))))
    return term
