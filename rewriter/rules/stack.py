"""The rule ``stack``: matrices that meet the same partner are put side by side (math.md §1, compact form).

    inside a sum     X ∘ (G Vᵀ) − X ∘ (δ 1ᵀ)  →  X ∘ ([G, −δ] [V, 1]ᵀ)
    across results   A V,  A 1                →  A [V, 1], of which both are columns
    widen            Aᵀ G where [G, −δ] exists →  (Aᵀ [G, −δ])[:, :e], so that one state serves both
    write out        U + W                     →  the sums that U and W stand for, where nothing else reads them

They turn many contractions into one wider one; the algebra keeps the columns apart by ``StackedPart``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from polyattn.rewriter.algebra.expr import (
    Concat,
    Def,
    Expr,
    Factor,
    Feature,
    Index,
    Indicator,
    Kind,
    Map,
    Select,
    StackedPart,
    Term,
    Weights,
    avoid,
    collect,
)
from polyattn.rewriter.algebra.programs import Program, is_pair, ordered
from polyattn.rewriter.rules.rule import Rule

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Stack(Rule):
    """Matrices that meet the same partner are put side by side: one wider contraction in place of several."""

    name = "stack"
    formula = "X ∘ (G Vᵀ) − X ∘ (δ 1ᵀ) → X ∘ ([G, −δ] [V, 1]ᵀ);  A V, A 1 → A [V, 1]"
    source = "math.md §1, compact form"
    note = "X ∘ (G Vᵀ) − X ∘ (δ 1ᵀ) = X ∘ ([G, −δ] [V, 1]ᵀ); A V and A 1 are columns of A [V, 1] (§1)"

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        return ordered(_widen(_inside(_across(_write_out(program)))))


STACK = Stack()


def _write_out(program: Program) -> Program:
    """A sum of definitions that nothing else reads becomes one sum over their terms, for ``_inside`` to stack."""
    readers = Counter(
        f.tensor.label for _, x in program.expressions() for f in _factors(x) if isinstance(f.tensor, Def)
    )
    gone: set[str] = set()

    def change(x: Expr) -> Expr:
        alone = [t.factors[0] for t in x.terms if len(t.factors) == 1]
        defs = [
            f.tensor for f in alone if isinstance(f.tensor, Def) and f.indices == x.out and readers[f.tensor.label] == 1
        ]
        if len(defs) < 2 or len(defs) != len(x.terms) or any(is_pair(d) for d in defs):
            return x
        gone.update(d.label for d in defs)
        terms = []
        for term, definition in zip(x.terms, defs, strict=True):
            names = dict(zip(definition.expr.indices, x.indices, strict=True))
            for inner in definition.expr.terms:
                safe = avoid(inner, inner.bound(definition.expr.out), frozenset(x.indices)).rename(names)
                terms += _expanded(Term(term.coefficient * safe.coefficient, safe.factors))
        return collect(Expr(x.out, tuple(terms)))

    program = program.rewrite(change)
    return Program(tuple(d for d in program.defs if d.label not in gone), program.outputs)


def _expanded(term: Term) -> list[Term]:
    """A term with a factor that is itself a sum over tokens written out: V[j,b] · t[j,b] with t = Σ_i A[i,j] G[i,b]."""
    for factor in term.factors:
        inner = factor.tensor.expr if isinstance(factor.tensor, Def) and not is_pair(factor.tensor) else None
        if inner is None or not any(i.kind.token for t in inner.terms for i in t.bound(inner.out)):
            continue
        rest = tuple(f for f in term.factors if f is not factor)
        names = dict(zip(inner.indices, factor.indices, strict=True))
        found = []
        for part in inner.terms:
            safe = avoid(part, part.bound(inner.out), frozenset(term.indices)).rename(names)
            found += _expanded(Term(term.coefficient * safe.coefficient, (*rest, *safe.factors)))
        return found
    return [term]


def _factors(x: Expr) -> list[Factor]:
    return [factor for term in x.terms for factor in term.factors]


def _hat(kind: Kind, extra: int) -> Kind:
    return Kind(kind.letter + "̂", kind.size + extra)


def _movable(factor: Factor) -> bool:
    tensor = factor.tensor
    if isinstance(tensor, (Feature, Indicator, Select, Weights)) or is_pair(tensor):
        return False
    if isinstance(tensor, Map) and tensor.function == "exp":
        return False
    return sum(index.kind.token for index in factor.indices) == 1


def _remainder(term: Term, out: Sequence[Index]) -> tuple[tuple[Factor, ...], tuple[Factor, ...]]:
    """Split a term into what may be stacked (token factors whose other indices are private to them) and the rest."""
    free = [f for f in term.factors if _movable(f)]
    while True:
        rest = [f for f in term.factors if f not in free]
        outside = {index for f in rest for index in f.indices} | set(out)
        kept = [f for f in free if all(index.kind.token or index not in outside for index in f.indices)]
        if len(kept) == len(free):
            return tuple(free), tuple(sorted(rest, key=repr))
        free = kept


def _sides(factors: Sequence[Factor]) -> dict[Index, list[Factor]]:
    sides: dict[Index, list[Factor]] = {}
    for factor in factors:
        sides.setdefault(next(index for index in factor.indices if index.kind.token), []).append(factor)
    return sides


def _inside(program: Program) -> Program:
    labels = _Labels()

    def change(x: Expr) -> Expr:
        groups: dict[tuple[Factor, ...], list[tuple[Term, tuple[Factor, ...]]]] = {}
        for term in x.terms:
            free, rest = _remainder(term, x.indices)
            groups.setdefault(rest, []).append((term, free))
        terms: list[Term] = []
        for rest, members in groups.items():
            merged = _merge(rest, members, labels) if len(members) > 1 and rest else None
            terms += [term for term, _ in members] if merged is None else [merged]
        return Expr(x.out, tuple(terms))

    return program.rewrite(change)


def _merge(rest: tuple[Factor, ...], members: list[tuple[Term, tuple[Factor, ...]]], labels: _Labels) -> Term | None:
    tokens = sorted({index for f in rest for index in f.indices if index.kind.token}, key=repr)
    if len(tokens) != 2:
        return None
    parts: dict[Index, list[Expr]] = {token: [] for token in tokens}
    unit = next((t.coefficient for t, free in members if any(len(f.indices) > 1 for f in free)), ONE)
    columns: list[Index | None] = []
    for term, free in members:
        sides = _sides(free)
        inner = {index for f in free for index in f.indices if not index.kind.token}
        if len(inner) > 1 or set(sides) - set(tokens):
            return None
        column = next(iter(inner), None)
        columns.append(column)
        for position, token in enumerate(tokens):
            factors = tuple(sides.get(token, ()))
            has = column is not None and any(column in f.indices for f in factors)
            if column is not None and not has:
                return None
            coefficient = sympy.cancel(term.coefficient / unit) if position == 0 else ONE
            parts[token].append(Expr((token, *((column,) if has else ())), (Term(coefficient, factors),)))
    wide = [c for c in columns if c is not None]
    if len(wide) != 1:
        return None
    order = sorted(range(len(members)), key=lambda p: columns[p] is None)
    hat = _hat(wide[0].kind, len(members) - 1)
    index = Index(hat)
    stacked: list[Factor] = []
    for token in tokens:
        tensor = labels.concat(tuple(parts[token][p] for p in order), hat)
        stacked.append(Factor(tensor, (token, index)))
    return Term(unit, (*rest, *stacked))


class _Labels:
    """One label per distinct stack."""

    def __init__(self) -> None:
        self.made: dict[str, Concat] = {}

    def concat(self, parts: tuple[Expr, ...], column: Kind) -> Concat:
        key = repr(parts)
        if key not in self.made:
            base = next((f.tensor.name for t in parts[0].terms for f in t.factors if len(f.indices) == 2), "U")
            label = base + "̂"
            while any(c.label == label for c in self.made.values()):
                label += "'"
            self.made[key] = Concat(label, parts, column)
        return self.made[key]


def _across(program: Program) -> Program:
    """A V and A 1 become columns of A [V, 1]."""
    labels = _Labels()
    for wide in program.defs:
        found = _partner(program, wide)
        if found is None:
            continue
        narrow, moved = found
        token, column = moved.indices
        hat = _hat(column.kind, 1)
        parts = (Expr((token, column), (Term(ONE, (moved,)),)), Expr((token,), (Term(ONE, ()),)))
        tensor = labels.concat(parts, hat)
        out, _ = wide.expr.indices
        index = Index(hat)
        terms = []
        for term in wide.expr.terms:
            rest = list(term.factors)
            rest.remove(moved)
            terms.append(Term(term.coefficient, (*rest, Factor(tensor, (token, index)))))
        whole = Def(wide.label + "̂", Expr((out, index), tuple(terms)))
        widths = (column.kind, None)
        replaced = {
            wide.label: Def(
                wide.label, Expr((out, column), (Term(ONE, (Factor(StackedPart(whole, 0, widths), (out, column)),)),))
            ),
            narrow.label: Def(
                narrow.label, Expr((out,), (Term(ONE, (Factor(StackedPart(whole, 1, widths), (out,)),)),))
            ),
        }
        defs: list[Def] = []
        placed = False
        for definition in program.defs:
            if definition.label in replaced and not placed:
                defs.append(whole)
                placed = True
            defs.append(replaced.get(definition.label, definition))
        program = Program(tuple(defs), program.outputs).rewrite(lambda x: x)
    return program


def _partner(program: Program, wide: Def) -> tuple[Def, Factor] | None:
    if len(wide.expr.indices) != 2 or is_pair(wide) or not wide.expr.terms:
        return None
    token, column = wide.expr.indices
    if column.kind.token:
        return None
    for moved in wide.expr.terms[0].factors:
        if column not in moved.indices or not _movable(moved) or moved.indices[0] == token:
            continue
        if any(Counter(t.factors)[moved] != 1 for t in wide.expr.terms):
            continue
        without = {
            repr(sorted((f for f in t.factors if f != moved), key=repr)) + str(t.coefficient) for t in wide.expr.terms
        }
        for narrow in program.defs:
            if narrow.expr.indices == (token,) and narrow.label != wide.label:
                own = {repr(sorted(t.factors, key=repr)) + str(t.coefficient) for t in narrow.expr.terms}
                if own == without and all(moved.indices[0] in t.indices for t in narrow.expr.terms):
                    return narrow, moved
    return None


def _stacks(program: Program) -> list[Concat]:
    found: dict[Concat, None] = {}
    for _, x in program.expressions():
        for term in x.terms:
            for factor in term.factors:
                if isinstance(factor.tensor, Concat):
                    found[factor.tensor] = None
    return list(found)


def _widen(program: Program) -> Program:
    """A contraction with the first columns of a stack becomes the first columns of the contraction with the stack."""
    stacks = _stacks(program)
    defs: list[Def] = []
    for definition in program.defs:
        wide = next((w for w in (_widened(definition, s) for s in stacks) if w is not None), None)
        defs += [definition] if wide is None else list(wide)
    outputs = dict(program.outputs)
    for name, x in program.outputs.items():
        wide = next((w for w in (_widened(Def(name, x), s) for s in stacks) if w is not None), None)
        if wide is not None:
            defs.append(wide[0])
            outputs[name] = wide[1].expr
    return Program(tuple(defs), outputs).rewrite(lambda x: x)


def _widened(definition: Def, stack_: Concat) -> tuple[Def, Def] | None:
    head = stack_.parts[0]
    if len(head.indices) != 2 or len(definition.expr.indices) != 2 or len(head.terms[0].factors) < 2:
        return None
    out, column = definition.expr.indices
    token, inner = head.indices
    if column.kind != inner.kind or out.kind == token.kind or head.terms[0].coefficient != 1:
        return None
    index = Index(stack_.column)
    terms = []
    for term in definition.expr.terms:
        tokens = [i for i in term.indices if i.kind == token.kind]
        if len(tokens) != 1:
            return None
        pattern = [f.rename({token: tokens[0], inner: column}) for f in head.terms[0].factors]
        rest = list(term.factors)
        for factor in pattern:
            if factor not in rest:
                return None
            rest.remove(factor)
        if any(column in f.indices for f in rest):
            return None
        terms.append(Term(term.coefficient, (*rest, Factor(stack_, (tokens[0], index)))))
    widths = tuple(part.indices[1].kind if len(part.indices) == 2 else None for part in stack_.parts)
    whole = Def(definition.label + "̂", Expr((out, index), tuple(terms)))
    part = Factor(StackedPart(whole, 0, widths), (out, column))
    return whole, Def(definition.label, Expr((out, column), (Term(ONE, (part,)),)))
