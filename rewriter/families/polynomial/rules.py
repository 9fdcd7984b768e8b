"""The exact rules that bring polynomials of scores into monomials of queries and of keys (math.md §2).

power       S ∘ S → S²;  c₀ T + c₁ S ∘ T → (c₀ + c₁ S) ∘ T       one polynomial of the score per term
kronecker   p(U Wᵀ) → Σ_α w_α Φ(U)_α Φ(W)_α                      Hadamard powers are row-wise Kronecker powers
compress    Φ_{g−1}(K)[j,β] K[j,a] → Σ_α C[β,a,α] Φ_g(K)[j,α]    a monomial times a variable is a monomial
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import (
    Def,
    Expr,
    Factor,
    Feature,
    Index,
    Kind,
    Poly,
    Program,
    Select,
    Tensor,
    Term,
    Weights,
)
from polyattn.rewriter.algebra.monomials import rank_symbol
from polyattn.rewriter.algebra.programs import prune, scores
from polyattn.rewriter.algebra.tensor import RANK_LETTERS
from polyattn.rewriter.notation.symbols import SUBSCRIPTS
from polyattn.rewriter.rules.rule import Rule

ONE = sympy.Integer(1)


def powers(program: Program) -> Program:
    """``power``: the score's powers in a term become one polynomial; terms that differ in it alone are added."""
    names = scores(program)

    def change(x: Expr) -> Expr:
        groups: dict[tuple[tuple[Factor, ...], tuple[Index, ...]], dict[int, sympy.Expr]] = {}
        bases: dict[tuple[tuple[Factor, ...], tuple[Index, ...]], Tensor] = {}
        others: list[Term] = []
        for term in x.terms:
            coefficients: list[sympy.Expr] = [term.coefficient]
            base: Factor | None = None
            rest: list[Factor] = []
            for factor in term.factors:
                tensor = factor.tensor
                score = tensor.score if isinstance(tensor, Poly) else tensor
                if not (isinstance(score, Def) and score.label in names):
                    rest.append(factor)
                    continue
                if base is not None and (base.tensor != score or base.indices != factor.indices):
                    raise RewriteError(f"two different scores in one term of {x}")
                base = Factor(score, factor.indices)
                own = tensor.coefficients if isinstance(tensor, Poly) else (sympy.Integer(0), ONE)
                coefficients = _convolve(coefficients, own)
            if base is None:
                others.append(term)
                continue
            key = (tuple(rest), base.indices)
            bases[key] = base.tensor
            total = groups.setdefault(key, {})
            for power, c in enumerate(coefficients):
                total[power] = total.get(power, sympy.Integer(0)) + c
        for term in others:
            # A constant term joins the polynomial that has the same other factors.
            keys = [key for key in groups if key[0] == term.factors]
            if len(keys) == 1 and not (set(keys[0][1]) - term.indices - set(x.out)):
                groups[keys[0]][0] = groups[keys[0]].get(0, sympy.Integer(0)) + term.coefficient
        left = [t for t in others if not any(key[0] == t.factors for key in groups)]
        made = []
        for key, total in groups.items():
            dense = tuple(sympy.expand(total.get(power, sympy.Integer(0))) for power in range(max(total) + 1))
            while len(dense) > 1 and dense[-1] == 0:
                dense = dense[:-1]
            sign = -ONE if dense[-1].could_extract_minus_sign() else ONE
            poly = Poly(bases[key], tuple(sympy.expand(sign * c) for c in dense))
            made.append(Term(sign, (*key[0], Factor(poly, key[1]))))
        return ir.collect(Expr(x.out, tuple(left + made)))

    return program.rewrite(change)


def _convolve(x: Sequence[sympy.Expr], y: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    total: list[sympy.Expr] = [sympy.Integer(0)] * (len(x) + len(y) - 1)
    for p, a in enumerate(x):
        for q, b in enumerate(y):
            total[p + q] = total[p + q] + a * b
    return total


def top_degree(program: Program) -> int:
    """The highest degree of a polynomial (or of features) in the program."""
    found = [0]
    for _, expr in program.expressions():
        for term in expr.terms:
            found += [f.tensor.degree for f in term.factors if isinstance(f.tensor, (Poly, Feature))]
    return max(found)


def rank_kind(top: int, degree: int) -> Kind:
    """The axis of the features of a degree, in a program whose highest degree is ``top``."""
    return Kind(RANK_LETTERS[top - degree], rank_symbol(top - degree))


def kronecker(program: Program) -> Program:
    """``kronecker``: every polynomial of a score U Wᵀ becomes features of U and of W.

    Raises:
        RewriteError: a score that is not one product of a row tensor and a column tensor.
    """
    top = top_degree(program)

    def change(factor: Factor) -> Expr | None:
        poly = factor.tensor
        if not isinstance(poly, Poly):
            return None
        if not isinstance(poly.score, Def):
            raise RewriteError(f"the score {poly.score.name} has no definition")
        definition = poly.score.expr
        i, j = definition.indices
        if len(definition.terms) != 1:
            raise RewriteError(f"the score {poly.score.name} is a sum, not a product: {definition}")
        (term,) = definition.terms
        left = [f for f in term.factors if i in f.indices]
        right = [f for f in term.factors if j in f.indices]
        if len(left) != 1 or len(right) != 1 or len(term.factors) != 2:
            raise RewriteError(f"the score {poly.score.name} is not a product U Wᵀ of two token matrices: {definition}")
        kind = rank_kind(top, poly.degree)
        unit = term.coefficient
        weights = tuple(sympy.expand(c * unit**m) for m, c in enumerate(poly.coefficients))
        (alpha,) = ir.fresh((kind,), (i, j))
        factors = (
            Factor(Weights(weights, kind), (alpha,)),
            Factor(Feature(left[0].tensor, poly.degree, kind), (i, alpha)),
            Factor(Feature(right[0].tensor, poly.degree, kind), (j, alpha)),
        )
        return Expr((i, j), (Term(ONE, factors),))

    return prune(program.rewrite(lambda x: ir.map_factors(x, change)))


def compress(program: Program) -> Program:
    """``compress``: features of degree g−1 times their own source are a selection of the features of degree g."""
    top = top_degree(program)

    def change(x: Expr) -> Expr:
        return Expr(x.out, tuple(_compress(term, top, x.out) for term in x.terms))

    return program.rewrite(change)


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


POWER = Rule(
    "power",
    "a₀ + a₁ S + a₂ S ∘ S + … → p(S)",
    "math.md §2, polynomial features",
    "powers of the score are one polynomial per term: a₀ + a₁ S + a₂ S ∘ S + … = p(S)",
    powers,
)
KRONECKER = Rule(
    "kronecker",
    "p(U Wᵀ) → Φ(U) diag(w) Φ(W)ᵀ",
    "math.md §2: (U₁ W₁ᵀ) ∘ (U₂ W₂ᵀ) = (U₁ ⊘ U₂) (W₁ ⊘ W₂)ᵀ",
    "p(U Wᵀ) = Φ(U) diag(w) Φ(W)ᵀ; (U₁ W₁ᵀ) ∘ (U₂ W₂ᵀ) = (U₁ ⊘ U₂) (W₁ ⊘ W₂)ᵀ (§2)",
    kronecker,
)


def compress_rule(degree: int) -> Rule:
    """The rule ``compress`` of a program whose polynomial has this degree."""
    low, high = (str(g).translate(SUBSCRIPTS) for g in (degree - 1, degree))
    return Rule(
        "compress",
        "Φ_{g−1}(K)[j,β] K[j,a] → Σ_α C[β,a,α] Φ_g(K)[j,α]",
        "math.md §2, symmetric compression",
        f"the columns of Φ{low}(K) ⊘ K are columns of Φ{high}(K): a monomial times a variable (§2)",
        compress,
    )
