"""The exact rules. Each is an identity (math.md §2, §6):

    inline      dP[i,j] → Σ_b G[i,b] V[j,b]                     a pair of tokens is never an intermediate
    reuse       Σ_j A[i,j] V[j,b] x → N[i,b] x        a named product (rowsum(P∘dP) = rowsum(G∘O))
    absorb      N[i] = Σ_j …;  z[i] N[i] → Σ_j z[i] …           a scaled sum that nothing else reads: the scale goes in
    split       M → M_near + M_far                              pairs of tokens of one chunk, and those far apart (§6)
    power       S·S → (S²);  c₀T + c₁ST → (c₀ + c₁S)T  one polynomial of the score per term
    kronecker   p(UWᵀ) → Σ_α w_α Φ(U)_α Φ(W)_α          Hadamard powers are row-wise Kronecker powers
    compress    Φ_{g−1}(K)[j,β] K[j,a] → Σ_α C[β,a,α] Φ_g(K)[j,α]   monomial times variable: a monomial
    stack       U₁W₁ᵀ + U₂W₂ᵀ → [U₁,U₂][W₁,W₂]ᵀ;  AW₁, AW₂ → A[W₁,W₂]   the compact form Ĝ V̂ᵀ

A rule maps a program to a program and raises RewriteError with a reason where its side condition fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import (
    Def,
    Expr,
    Factor,
    Feature,
    Index,
    Indicator,
    Kind,
    Map,
    Poly,
    Program,
    Select,
    Tensor,
    Term,
    Weights,
)
from polyattn.rewriter.families.polynomial.monomials import rank_symbol

ONE = sympy.Integer(1)
RANK_LETTERS = "αβγδε"


def is_pair(tensor: Tensor) -> bool:
    """Whether a tensor has two token axes, so that it must never be materialised."""
    return sum(kind.token for kind in tensor.kinds) == 2


def inline_pairs(x: Expr, keep: Iterable[str] = ()) -> Expr:
    """``inline``: replace definitions over a pair of tokens by what they stand for, except those named in ``keep``."""
    kept = set(keep)

    def change(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        return tensor.expr if isinstance(tensor, Def) and is_pair(tensor) and tensor.label not in kept else None

    return ir.map_factors(x, change)


def scores(program: Program) -> tuple[str, ...]:
    """Names of the definitions that are scores: arguments of exp, and what is multiplied by itself."""
    found: dict[str, None] = {}
    for _, expr in program.expressions():
        for term in expr.terms:
            plain = [f.tensor.label for f in term.factors if isinstance(f.tensor, Def) and is_pair(f.tensor)]
            found.update((name, None) for name in plain if plain.count(name) > 1)
            for factor in term.factors:
                inner = factor.tensor
                if isinstance(inner, Map) and isinstance(inner.argument, Def) and is_pair(inner):
                    found[inner.argument.label] = None
                if isinstance(inner, Poly) and isinstance(inner.score, Def):
                    found[inner.score.label] = None
    return tuple(found)


def inline(program: Program) -> Program:
    """``inline`` everywhere but for scores; definitions over pairs that nothing uses any more are dropped."""
    keep = scores(program)
    return prune(program.rewrite(lambda x: inline_pairs(x, keep)))


def prune(program: Program) -> Program:
    """Drop definitions that no output needs."""
    needed: set[str] = set()

    def visit(tensor: Tensor) -> None:
        if isinstance(tensor, Def):
            if tensor.label in needed:
                return
            needed.add(tensor.label)
        for inner in ir.base_tensors(tensor):
            visit(inner)

    for expr in program.outputs.values():
        for term in expr.terms:
            for factor in term.factors:
                visit(factor.tensor)
    return Program(tuple(d for d in program.defs if d.label in needed), program.outputs)


def reuse(program: Program) -> Program:
    """``reuse``: inside later expressions, replace a product that an earlier definition names."""
    known: list[Def] = []

    def change(x: Expr) -> Expr:
        terms = list(x.terms)
        for definition in known:
            terms = [_reuse_in(term, x.out, definition) for term in terms]
        return ir.collect(Expr(x.out, tuple(terms)))

    new: dict[str, Def] = {}
    for definition in program.defs:
        made = Def(definition.label, change(ir.rebind(definition.expr, new)))
        new[made.label] = made
        if not is_pair(made) and len(made.expr.terms) == 1 and made.expr.terms[0].coefficient == 1:
            known.append(made)
    return Program(tuple(new.values()), {name: change(ir.rebind(x, new)) for name, x in program.outputs.items()})


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


def absorb(program: Program) -> Program:
    """``absorb``: a definition read once, as one factor among others of an output's only term, is written out there."""
    reads: dict[str, int] = {}

    def count(tensor: Tensor) -> None:
        if isinstance(tensor, Def):
            reads[tensor.label] = reads.get(tensor.label, 0) + 1
        else:
            for inner in ir.base_tensors(tensor):
                count(inner)

    for _, x in program.expressions():
        for term in x.terms:
            for factor in term.factors:
                count(factor.tensor)

    def change(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        return tensor.expr if isinstance(tensor, Def) and reads[tensor.label] == 1 else None

    outputs = {
        name: ir.map_factors(x, change) if len(x.terms) == 1 and len(x.terms[0].factors) > 1 else x
        for name, x in program.outputs.items()
    }
    return prune(Program(program.defs, outputs))


def split(program: Program) -> Program:
    """``split``: M = M_near + M_far."""

    def change(factor: Factor) -> Expr | None:
        if not (isinstance(factor.tensor, Indicator) and factor.tensor.which in ("causal", "all")):
            return None
        near, far = (ir.of(Indicator(which, factor.tensor.axes)) for which in ("near", "far"))
        return ir.add(near, far)

    return program.rewrite(lambda x: ir.map_factors(x, change))


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
