"""The rule ``power``: one polynomial of the score per term.

S ∘ S → S²;  c₀ T + c₁ S ∘ T → (c₀ + c₁ S) ∘ T

Terms that differ in their polynomial alone are added. Two different scores in one term are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Poly, Tensor, Term
from polyattn.rewriter.algebra.programs import Program, scores
from polyattn.rewriter.rules.rule import Rule

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Power(Rule):
    """The score's powers in a term become one polynomial; terms that differ in it alone are added."""

    name = "power"
    formula = "a₀ + a₁ S + a₂ S ∘ S + … → p(S)"
    source = "math.md §2, polynomial features"
    note = "powers of the score are one polynomial per term: a₀ + a₁ S + a₂ S ∘ S + … = p(S)"

    def check(self, program: Program) -> str | None:
        """Refuses two different scores in one term."""
        names = scores(program)
        for name, x in program.expressions():
            for term in x.terms:
                held = {(s, f.indices) for f in term.factors if (s := _score(f.tensor, names)) is not None}
                if len(held) > 1:
                    return f"two different scores in one term of {name} = {x}"
        return None

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        names = scores(program)

        def change(x: Expr) -> Expr:
            groups: dict[tuple[tuple[Factor, ...], Factor], dict[int, sympy.Expr]] = {}
            others: list[Term] = []
            for term in x.terms:
                coefficients: list[sympy.Expr] = [term.coefficient]
                base: Factor | None = None
                rest: list[Factor] = []
                for factor in term.factors:
                    tensor = factor.tensor
                    score = _score(tensor, names)
                    if score is None:
                        rest.append(factor)
                        continue
                    base = Factor(score, factor.indices)
                    own = tensor.coefficients if isinstance(tensor, Poly) else (sympy.Integer(0), ONE)
                    coefficients = _convolve(coefficients, own)
                if base is None:
                    others.append(term)
                    continue
                total = groups.setdefault((tuple(rest), base), {})
                for power, c in enumerate(coefficients):
                    total[power] = total.get(power, sympy.Integer(0)) + c
            left = []
            for term in others:
                # A constant term joins the one polynomial that has the same other factors.
                keys = [key for key in groups if key[0] == term.factors]
                if len(keys) == 1 and not (set(keys[0][1].indices) - term.indices - set(x.out)):
                    groups[keys[0]][0] = groups[keys[0]].get(0, sympy.Integer(0)) + term.coefficient
                else:
                    left.append(term)
            made = []
            for (rest_, score_), total in groups.items():
                dense = tuple(sympy.expand(total.get(power, sympy.Integer(0))) for power in range(max(total) + 1))
                while len(dense) > 1 and dense[-1] == 0:
                    dense = dense[:-1]
                sign = -ONE if dense[-1].could_extract_minus_sign() else ONE
                poly = Poly(score_.tensor, tuple(sympy.expand(sign * c) for c in dense))
                made.append(Term(sign, (*rest_, Factor(poly, score_.indices))))
            return ir.collect(Expr(x.out, tuple(left + made)))

        return program.rewrite(change)


def _score(tensor: Tensor, names: Sequence[str]) -> Tensor | None:
    """The score that a tensor is, or is a polynomial of."""
    score = tensor.score if isinstance(tensor, Poly) else tensor
    return score if isinstance(score, ir.Def) and score.label in names else None


def _convolve(x: Sequence[sympy.Expr], y: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    total: list[sympy.Expr] = [sympy.Integer(0)] * (len(x) + len(y) - 1)
    for p, a in enumerate(x):
        for q, b in enumerate(y):
            total[p + q] = total[p + q] + a * b
    return total


POWER = Power()
