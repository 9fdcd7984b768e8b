"""The rule ``project``: the gradients of queries and keys in coordinates of a few directions of the other (math.md §2).

    dQ = dS K,  K ≈ K′ Uᵀ with K′ = K U of width d′   →   dQ U = dS K′

and dK likewise from Q′ = Q W; U and W have orthonormal columns. Whoever runs the program makes K′ and Q′, and goes back
from dQ U and dK W. States are r × (e + 1) × d′ then. Values are projected outside of the algebra: dS is linear in G Vᵀ,
so that a program of other values, G′ V′ᵀ ≈ G Vᵀ of width e′, is the same program.
"""

from __future__ import annotations

from dataclasses import replace

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Leaf, Program, Term
from polyattn.rewriter.algebra.programs import prune
from polyattn.rewriter.algebra.tensor import DIRECTION, KEY, QUERY
from polyattn.rewriter.rules.rule import Rule

QP, KP = Leaf("QP", (QUERY, DIRECTION)), Leaf("KP", (KEY, DIRECTION))
"""Queries and keys in coordinates."""


def project(program: Program) -> Program:
    """Outputs dQ and dK in coordinates; the others are left as they are.

    Raises:
        RewriteError: a gradient that is not a sum of products with K (of dQ) or Q (of dK).
    """
    outputs = dict(program.outputs)
    for name, source, leaf in (("dQ", "K", KP), ("dK", "Q", QP)):
        x = _written_out(outputs[name])
        token, open_index = x.indices
        (direction,) = ir.fresh((DIRECTION,), ())
        terms = []
        for term in x.terms:
            carriers = [f for f in term.factors if open_index in f.indices]
            if len(carriers) != 1 or carriers[0].tensor.name != source:
                raise RewriteError(f"{name} is not a product with {source}: {term}")
            (carrier,) = carriers
            changed = Factor(leaf, (carrier.indices[0], direction))
            terms.append(Term(term.coefficient, tuple(changed if f is carrier else f for f in term.factors)))
        outputs[name] = ir.collect(Expr((token, direction), tuple(terms)))
    return prune(replace(program, outputs=outputs))


def _written_out(x: Expr) -> Expr:
    """The expression of a name, where that is all there is."""
    while len(x.terms) == 1 and len(x.terms[0].factors) == 1:
        (factor,) = x.terms[0].factors
        if not isinstance(factor.tensor, Def) or factor.indices != x.indices:
            break
        x = ir.scale(factor.tensor.expr, x.terms[0].coefficient)
    return x


PROJECT = Rule(
    "project",
    "dQ U = dS K U → dS (K U);  dK W = dSᵀ Q W → dSᵀ (Q W)",
    "math.md §2, the factor d of the substituted gradient",
    "dQ U = dS (K U) and dK W = dSᵀ (Q W): a few directions of keys and queries (§2)",
    project,
)
