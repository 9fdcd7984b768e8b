"""The rule ``cancel``: a factor and its reciprocal at the same indices are one.

x[i] (1/x)[i] → 1

Tracing leaves such pairs where a factor of a denominator is a factor of the numerator too.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Map, Term
from polyattn.rewriter.algebra.programs import Program, prune
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class Cancel(Rule):
    """Pairs are dropped where other factors hold their indices: what is left has all axes and sums of the term."""

    name = "cancel"
    formula = "x[i] (1/x)[i] → 1"
    source = "arithmetic: denominators are positive (math.md §1)"
    note = "a factor that numerator and denominator share goes: diag(x) diag(1/x) = 1"

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""

        def change(x: Expr) -> Expr:
            terms = []
            for term in x.terms:
                factors = list(term.factors)
                while (pair := _pair(factors)) is not None:
                    factors = [factor for at, factor in enumerate(factors) if at not in pair]
                terms.append(Term(term.coefficient, tuple(factors)))
            return ir.collect(Expr(x.out, tuple(terms)))

        return prune(program.rewrite(change))


def _pair(factors: list[Factor]) -> tuple[int, int] | None:
    """Positions of a factor and its reciprocal that can go; None where there are none."""
    for at, factor in enumerate(factors):
        if not (isinstance(factor.tensor, Map) and factor.tensor.function == "reciprocal"):
            continue
        for other, inverse in enumerate(factors):
            if inverse.tensor == factor.tensor.argument and inverse.indices == factor.indices:
                left = {index for p, f in enumerate(factors) if p not in (at, other) for index in f.indices}
                if set(factor.indices) <= left:
                    return at, other
    return None


CANCEL = Cancel()
