"""The rule ``project``: the gradients of queries and keys in coordinates of a few directions of the other (math.md §2).

    dQ = dS K,  K ≈ K′ Uᵀ with K′ = K U of width d′   →   dQ U = dS K′

and dK likewise from Q′ = Q W; U and W have orthonormal columns. Whoever runs the program makes K′ and Q′, and goes back
from dQ U and dK W. States are r × (e + 1) × d′ then. Values are projected outside of the algebra: dS is linear in G Vᵀ,
so that a program of other values, G′ V′ᵀ ≈ G Vᵀ of width e′, is the same program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Kind, Leaf, Term
from polyattn.rewriter.algebra.programs import Program, prune
from polyattn.rewriter.algebra.tensor import DIRECTION, KEY, QUERY
from polyattn.rewriter.algebra.verify import output_axes
from polyattn.rewriter.rules.rule import Rule

QP, KP = Leaf("QP", (QUERY, DIRECTION)), Leaf("KP", (KEY, DIRECTION))
"""Queries and keys in coordinates."""
_OUTPUTS = (("dQ", "K", KP), ("dK", "Q", QP))
"""Gradients, what they are a product with, and that in coordinates."""


@dataclass(frozen=True)
class Project(Rule):
    """Outputs dQ and dK in coordinates of a few directions; the others are left as they are."""

    name = "project"
    formula = "dQ U = dS K U → dS (K U);  dK W = dSᵀ Q W → dSᵀ (Q W)"
    source = "math.md §2, the factor d of the substituted gradient"
    note = "dQ U = dS (K U) and dK W = dSᵀ (Q W): a few directions of keys and queries (§2)"

    def check(self, program: Program) -> str | None:
        """Refuses a gradient that is not a sum of products with K (of dQ) or Q (of dK)."""
        for name, source, _ in _OUTPUTS:
            if name not in program.outputs:
                return f"the program has no output {name}"
            x = _written_out(program.outputs[name])
            for term in x.terms:
                carriers = _carriers(x, term)
                if len(carriers) != 1 or carriers[0].tensor.name != source:
                    return f"{name} is not a product with {source}: {term}"
        return None

    def axes(self, program: Program) -> Mapping[str, tuple[Kind, ...]]:
        """dQ and dK have directions for columns."""
        own = output_axes(program)
        return {**own, **{name: (own[name][0], DIRECTION) for name, _, _ in _OUTPUTS}}

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        outputs = dict(program.outputs)
        (direction,) = ir.fresh((DIRECTION,), ())
        for name, _, leaf in _OUTPUTS:
            x = _written_out(outputs[name])
            terms = []
            for term in x.terms:
                (carrier,) = _carriers(x, term)
                changed = Factor(leaf, (carrier.indices[0], direction))
                terms.append(Term(term.coefficient, tuple(changed if f is carrier else f for f in term.factors)))
            outputs[name] = ir.collect(Expr((x.indices[0], direction), tuple(terms)))
        return prune(replace(program, outputs=outputs))


PROJECT = Project()


def _carriers(x: Expr, term: Term) -> list[Factor]:
    """The factors of a term that have the column of a gradient."""
    return [f for f in term.factors if x.indices[1] in f.indices]


def _written_out(x: Expr) -> Expr:
    """The expression of a name, where that is all there is."""
    while len(x.terms) == 1 and len(x.terms[0].factors) == 1:
        (factor,) = x.terms[0].factors
        if not isinstance(factor.tensor, Def) or factor.indices != x.indices:
            break
        x = ir.scale(factor.tensor.expr, x.terms[0].coefficient)
    return x
