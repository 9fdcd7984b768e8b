"""The rule ``shift``: a number for each query is subtracted from its logits, as softmax does not depend on it.

exp(S[i,j]) → exp(S[i,j] − m[i])

In exact arithmetic every m gives the same; in floating point one that is at most the logarithm of a row's sum, and not
far below it, keeps exponentials and sums in range. It is a constant of the differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Leaf, Map, Term
from polyattn.rewriter.algebra.programs import Program, is_pair, rebind, scores
from polyattn.rewriter.algebra.tensor import QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.rules.rule import Rule

SHIFT = Leaf("SHIFT", (QUERY_TILE, QUERY_PLACE))


@dataclass(frozen=True)
class Shift(Rule):
    """Logits of every query are measured from a number of its own, which numerators and denominators share."""

    name = "shift"
    formula = "exp(S) → exp(S − m 1ᵀ)"
    source = "math.md §3: a factor of a whole row cancels in the softmax"
    note = "exp(S − m) in place of exp(S): the factor exp(−m) of a row cancels in the softmax (§3)"

    def check(self, program: Program) -> str | None:
        """Refuses a score that is read outside of exp, and one that is not over tiles of queries."""
        names = scores(program)
        for name, x in program.expressions():
            for term in x.terms:
                for factor in term.factors:
                    tensor = factor.tensor
                    if isinstance(tensor, Def) and tensor.label in names:
                        return f"{name} reads the score {tensor.label} itself, which a shift changes"
                    inner = tensor.argument if isinstance(tensor, Map) and is_pair(tensor) else None
                    if inner is not None and not {QUERY_TILE, QUERY_PLACE} <= set(inner.kinds):
                        return f"the score {inner.name} is not over tiles of queries"
        return None

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        names, new = scores(program), dict[str, Def]()
        for definition in program.defs:
            x = rebind(definition.expr, new)
            if definition.label in names:
                row = tuple(index for index in x.indices if index.kind in SHIFT.axes)
                x = ir.collect(Expr(x.out, (*x.terms, Term(sympy.Integer(-1), (Factor(SHIFT, row),)))))
            new[definition.label] = Def(definition.label, x)
        return Program(tuple(new.values()), {name: rebind(x, new) for name, x in program.outputs.items()})


SHIFT_RULE = Shift()
