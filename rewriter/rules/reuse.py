"""The rule ``reuse``: inside later expressions, a product that an earlier definition names is that definition.

N[i,b] = Σ_j A[i,j] V[j,b];  Σ_j A[i,j] V[j,b] x → N[i,b] x        (rowsum(P ∘ dP) = rowsum(G ∘ O))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Index, Term
from polyattn.rewriter.algebra.programs import Program, is_pair, rebind
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class Reuse(Rule):
    """Inside later expressions, a product that an earlier definition names becomes that definition."""

    name = "reuse"
    formula = "N[i,b] = Σ_j A[i,j] V[j,b];  Σ_j A[i,j] V[j,b] x → N[i,b] x"
    source = "math.md §1: δ = rowsum(P ∘ dP) = rowsum(G ∘ O)"
    note = "a product that has a name is not computed again (§1)"

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        known: list[Def] = []

        def change(x: Expr) -> Expr:
            terms = list(x.terms)
            for definition in known:
                terms = [_reuse_in(term, x.out, definition) for term in terms]
            return ir.collect(Expr(x.out, tuple(terms)))

        new: dict[str, Def] = {}
        for definition in program.defs:
            made = Def(definition.label, change(rebind(definition.expr, new)))
            new[made.label] = made
            if not is_pair(made) and len(made.expr.terms) == 1 and made.expr.terms[0].coefficient == 1:
                known.append(made)
        return Program(tuple(new.values()), {name: change(rebind(x, new)) for name, x in program.outputs.items()})


def _reuse_in(term: Term, out: Sequence[Index | None], definition: Def) -> Term:
    pattern = definition.expr.terms[0]
    inner_out = definition.expr.indices
    if len(pattern.factors) >= len(term.factors) + (1 if pattern.bound(inner_out) else 0) or len(pattern.factors) < 2:
        return term
    mapping = _embed(pattern.factors, term.factors, {})
    if mapping is None:
        return term
    used, names = mapping
    rest = [f for position, f in enumerate(term.factors) if position not in used]
    outside = {index for f in rest for index in f.indices} | {index for index in out if index is not None}
    bound = [names[index] for index in pattern.bound(inner_out)]
    if len(set(names.values())) != len(names) or any(index in outside for index in bound):
        return term
    return Term(term.coefficient, (Factor(definition, tuple(names[index] for index in inner_out)), *rest))


Embedding = tuple[frozenset[int], dict[Index, Index]]


def _embed(pattern: Sequence[Factor], factors: Sequence[Factor], names: dict[Index, Index]) -> Embedding | None:
    if not pattern:
        return frozenset(), names
    head, *tail = pattern
    for position, factor in enumerate(factors):
        if factor.tensor != head.tensor:
            continue
        extended = dict(names)
        if any(extended.setdefault(a, b) != b for a, b in zip(head.indices, factor.indices, strict=True)):
            continue
        masked: list[Factor] = list(factors)
        masked[position] = Factor(ir.Leaf(f"used {position}", ()), ())
        found = _embed(tail, masked, extended)
        if found is not None:
            return found[0] | {position}, found[1]
    return None


REUSE = Reuse()
