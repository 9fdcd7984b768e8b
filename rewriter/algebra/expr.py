"""Index notation, the algebra's intermediate representation (math.md §2, "In index notation").

An expression is a sum of terms; a term is a coefficient times factors that share indices; an index that is not among
the expression's own is summed over.  A Hadamard product is a shared pair of indices, a diagonal matrix a repeated
index, the row-wise Kronecker product two factors with one token index in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.tensor import (
    CHUNK,
    HEAD,
    KEY,
    N_K,
    N_Q,
    QUERY,
    R1,
    TOKEN,
    VALUE,
    D,
    E,
    Feature,
    Index,
    Indicator,
    Kind,
    Leaf,
    Map,
    N,
    Poly,
    R,
    Select,
    StackedPart,
    Tensor,
    Weights,
)

__all__ = [
    "CHUNK",
    "HEAD",
    "KEY",
    "N_K",
    "N_Q",
    "QUERY",
    "R1",
    "TOKEN",
    "VALUE",
    "Concat",
    "D",
    "Def",
    "E",
    "Expr",
    "Factor",
    "Feature",
    "Index",
    "Indicator",
    "Kind",
    "Leaf",
    "Map",
    "N",
    "Poly",
    "R",
    "Select",
    "StackedPart",
    "Tensor",
    "Term",
    "Weights",
    "add",
    "align",
    "avoid",
    "base_tensors",
    "canonical",
    "collect",
    "fresh",
    "map_factors",
    "multiply",
    "of",
    "scalar",
    "scale",
    "sum_over",
]  # fmt: skip


@dataclass(frozen=True)
class Factor:
    """A tensor at indices."""

    tensor: Tensor
    indices: tuple[Index, ...]

    def __post_init__(self) -> None:
        if tuple(index.kind for index in self.indices) != self.tensor.kinds:
            raise RewriteError(f"{self.tensor.name} has axes {self.tensor.kinds}, indexed by {self.indices}")

    def __repr__(self) -> str:
        return self.tensor.name + (f"[{','.join(map(repr, self.indices))}]" if self.indices else "")

    def rename(self, mapping: Mapping[Index, Index]) -> Factor:
        """The factor at other indices; those that are not mentioned stay."""
        return Factor(self.tensor, tuple(mapping.get(index, index) for index in self.indices))


@dataclass(frozen=True)
class Term:
    """A coefficient times factors."""

    coefficient: sympy.Expr
    factors: tuple[Factor, ...]

    @property
    def indices(self) -> frozenset[Index]:
        """All indices of the factors."""
        return frozenset(index for factor in self.factors for index in factor.indices)

    def rename(self, mapping: Mapping[Index, Index]) -> Term:
        """The term at other indices; those that are not mentioned stay."""
        return Term(self.coefficient, tuple(factor.rename(mapping) for factor in self.factors))

    def bound(self, out: Iterable[Index | None]) -> frozenset[Index]:
        """The indices that are summed over where ``out`` are open."""
        return self.indices - frozenset(index for index in out if index is not None)

    def __repr__(self) -> str:
        head = [] if self.coefficient == 1 and self.factors else [str(self.coefficient)]
        return " · ".join(head + [repr(factor) for factor in self.factors])


@dataclass(frozen=True)
class Expr:
    """A sum of terms with open indices ``out``; None in ``out`` is an axis of size one (only while lifting)."""

    out: tuple[Index | None, ...]
    terms: tuple[Term, ...]

    @property
    def indices(self) -> tuple[Index, ...]:
        """The open indices of an expression without broadcast axes."""
        if any(index is None for index in self.out):
            raise RewriteError(f"a broadcast axis is left in {self}")
        return tuple(index for index in self.out if index is not None)

    def __repr__(self) -> str:
        return f"[{','.join(map(repr, self.out))}] " + (" + ".join(map(repr, self.terms)) or "0")


@dataclass(frozen=True)
class Def(Tensor):
    """A named intermediate. Names are unique in a program, so equality is equality of names."""

    label: str
    expr: Expr = field(compare=False, repr=False)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return tuple(index.kind for index in self.expr.indices)

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return self.label


@dataclass(frozen=True)
class Concat(Tensor):
    """Columns of several token-level tensors side by side, [U₁, U₂, …]; ``parts`` are expressions [token(, column)]."""

    label: str
    parts: tuple[Expr, ...]
    column: Kind

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return (self.parts[0].indices[0].kind, self.column)

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return self.label


def scalar(value: sympy.Expr | float | int) -> Expr:
    """A constant expression without axes."""
    return Expr((), (Term(sympy.nsimplify(value) if isinstance(value, float) else sympy.sympify(value), ()),))


def of(tensor: Tensor) -> Expr:
    """The tensor itself, at fresh indices in the order of its axes."""
    indices = fresh(tensor.kinds, ())
    return Expr(indices, (Term(sympy.Integer(1), (Factor(tensor, indices),)),))


def fresh(kinds: Iterable[Kind], used: Iterable[Index]) -> tuple[Index, ...]:
    """Indices of the given kinds that differ from each other and from the used ones."""
    taken = set(used)
    made = []
    for kind in kinds:
        number = 0
        while Index(kind, number) in taken:
            number += 1
        made.append(Index(kind, number))
        taken.add(made[-1])
    return tuple(made)


def avoid(term: Term, bound: frozenset[Index], used: frozenset[Index]) -> Term:
    """The term with those of its bound indices renamed that are among the used ones."""
    clash = sorted((index for index in bound if index in used), key=repr)
    if not clash:
        return term
    new = fresh((index.kind for index in clash), used | term.indices)
    return term.rename(dict(zip(clash, new, strict=True)))


def align(x: Expr, y: Expr) -> tuple[tuple[Index | None, ...], Expr, Expr]:
    """Bring two expressions to common open indices, as torch broadcasts: aligned at the right, None stretches."""
    rank = max(len(x.out), len(y.out))
    left = (None,) * (rank - len(x.out)) + x.out
    right = (None,) * (rank - len(y.out)) + y.out
    mapping: dict[Index, Index] = {}
    out: list[Index | None] = []
    # Open indices of y that meet none of x must not collide with indices that x already uses.
    taken = frozenset(index for index in left if index is not None)
    for a, b in zip(left, right, strict=True):
        if a is not None and b is not None:
            if a.kind != b.kind:
                raise RewriteError(f"axes of kinds {a.kind} and {b.kind} meet")
            mapping[b] = a
            out.append(a)
        elif b is not None:
            (new,) = fresh((b.kind,), taken)
            taken |= {new}
            mapping[b] = new
            out.append(new)
        else:
            out.append(a)
    targets = frozenset(index for index in out if index is not None)
    xs = tuple(avoid(t, t.bound(x.out), targets) for t in x.terms)
    ys = []
    for term in y.terms:
        safe = avoid(term, term.bound(y.out), targets | frozenset(mapping))
        ys.append(safe.rename(mapping))
    return tuple(out), Expr(tuple(left), xs), Expr(tuple(out), tuple(ys))


def multiply(x: Expr, y: Expr) -> Expr:
    """The elementwise (broadcasting) product, distributed into a sum of terms."""
    out, x, y = align(x, y)
    terms = []
    for s in x.terms:
        for t in y.terms:
            other = avoid(t, t.bound(out), s.indices)
            terms.append(Term(s.coefficient * other.coefficient, s.factors + other.factors))
    return collect(Expr(out, tuple(terms)))


def add(x: Expr, y: Expr) -> Expr:
    """The elementwise (broadcasting) sum."""
    out, x, y = align(x, y)
    return collect(Expr(out, x.terms + y.terms))


def scale(x: Expr, c: sympy.Expr) -> Expr:
    """The expression times a number or symbol."""
    return Expr(x.out, tuple(Term(c * t.coefficient, t.factors) for t in x.terms))


def sum_over(x: Expr, axes: Iterable[int], keep: bool = False) -> Expr:
    """Sum over positions of ``out``; a broadcast axis must not be summed (its size is unknown here)."""
    positions = {axis % len(x.out) for axis in axes}
    gone = [x.out[p] for p in positions]
    for index in gone:
        if index is not None and any(index not in term.indices for term in x.terms):
            raise RewriteError(f"a sum over {index}, which a term does not have, in {x}")
    out = [None if p in positions else index for p, index in enumerate(x.out)]
    kept = out if keep else [index for p, index in enumerate(out) if p not in positions]
    return collect(Expr(tuple(kept), x.terms))


def collect(x: Expr) -> Expr:
    """Add the coefficients of terms that are equal up to the names of bound indices."""
    found: dict[tuple[Factor, ...], tuple[sympy.Expr, Term]] = {}
    for term in x.terms:
        normal = canonical(term, x.out)
        key = normal.factors
        total = found[key][0] + term.coefficient if key in found else term.coefficient
        found[key] = (total, normal)
    terms = tuple(Term(sympy.expand(c), t.factors) for c, t in found.values())
    return Expr(x.out, tuple(t for t in terms if t.coefficient != 0))


def canonical(term: Term, out: Iterable[Index | None]) -> Term:
    """The term with its factors in a fixed order and its bound indices numbered in order of appearance."""
    open_indices = frozenset(index for index in out if index is not None)

    def order(factor: Factor) -> tuple[str, str]:
        return factor.tensor.name, repr([index if index in open_indices else index.kind for index in factor.indices])

    factors = sorted(term.factors, key=order)
    mapping: dict[Index, Index] = {}
    used = set(open_indices)
    for factor in factors:
        for index in factor.indices:
            if index not in open_indices and index not in mapping:
                (mapping[index],) = fresh((index.kind,), used)
                used.add(mapping[index])
    return Term(
        term.coefficient, tuple(sorted((f.rename(mapping) for f in factors), key=lambda f: (order(f), repr(f))))
    )


def map_factors(x: Expr, change: Callable[[Factor], Expr | None]) -> Expr:
    """Replace factors by expressions over the same indices (None keeps a factor); products are distributed."""
    total: list[Term] = []
    for term in x.terms:
        pieces = [(factor, change(factor)) for factor in term.factors]
        if all(new is None for _, new in pieces):
            total.append(term)
            continue
        partial = [Term(term.coefficient, tuple(f for f, new in pieces if new is None))]
        used = term.indices | frozenset(index for index in x.out if index is not None)
        for factor, new in pieces:
            if new is None:
                continue
            inner = dict(zip(new.indices, factor.indices, strict=True))
            following = []
            for left in partial:
                for t in new.terms:
                    safe = avoid(
                        t, t.bound(new.out), used | frozenset(factor.indices) | left.indices | frozenset(inner)
                    )
                    moved = safe.rename(inner)
                    following.append(Term(left.coefficient * moved.coefficient, left.factors + moved.factors))
            partial = following
        total.extend(partial)
    return collect(Expr(x.out, tuple(total)))


def base_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors directly inside a tensor."""
    if isinstance(tensor, Map):
        yield tensor.argument
    elif isinstance(tensor, Poly):
        yield tensor.score
    elif isinstance(tensor, Feature):
        yield tensor.source
    elif isinstance(tensor, StackedPart):
        yield tensor.whole
    elif isinstance(tensor, Def):
        for term in tensor.expr.terms:
            yield from (factor.tensor for factor in term.factors)
    elif isinstance(tensor, Concat):
        for part in tensor.parts:
            for term in part.terms:
                yield from (factor.tensor for factor in term.factors)
