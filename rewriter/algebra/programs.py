"""Programs, and what rules and planners ask about them: pairs, scores, what is read, the order of definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import (
    Concat,
    Def,
    Expr,
    Factor,
    Feature,
    Indicator,
    Map,
    Poly,
    StackedPart,
    Tensor,
    Term,
)


@dataclass(frozen=True)
class Program:
    """Named intermediates in order of definition, and the outputs."""

    defs: tuple[Def, ...]
    outputs: Mapping[str, Expr]

    def __getitem__(self, name: str) -> Def:
        for definition in self.defs:
            if definition.label == name:
                return definition
        raise KeyError(name)

    def rewrite(self, change: Callable[[Expr], Expr]) -> Program:
        """Apply a change to every expression; definitions inside factors are replaced by the changed ones."""
        new: dict[str, Def] = {}
        defs = []
        for definition in self.defs:
            made = Def(definition.label, change(rebind(definition.expr, new)))
            new[made.label] = made
            defs.append(made)
        outputs = {name: change(rebind(expr, new)) for name, expr in self.outputs.items()}
        return replace(self, defs=tuple(defs), outputs=outputs)

    def expressions(self) -> Iterator[tuple[str, Expr]]:
        """Definitions and outputs by name, in order."""
        for definition in self.defs:
            yield definition.label, definition.expr
        yield from self.outputs.items()


def rebind_tensor(tensor: Tensor, new: Mapping[str, Def]) -> Tensor:
    """The tensor with the definitions inside it replaced by those of the same name in ``new``."""
    if isinstance(tensor, Def):
        return new.get(tensor.label, tensor)
    if isinstance(tensor, Map):
        return Map(tensor.function, rebind_tensor(tensor.argument, new))
    if isinstance(tensor, Poly):
        return Poly(rebind_tensor(tensor.score, new), tensor.coefficients)
    if isinstance(tensor, Feature):
        return Feature(rebind_tensor(tensor.source, new), tensor.degree, tensor.rank)
    if isinstance(tensor, Concat):
        return Concat(tensor.label, tuple(rebind(part, new) for part in tensor.parts), tensor.column)
    if isinstance(tensor, StackedPart):
        return StackedPart(rebind_tensor(tensor.whole, new), tensor.part, tensor.widths)
    return tensor


def rebind(x: Expr, new: Mapping[str, Def]) -> Expr:
    """The expression with definitions replaced by those of the same name in ``new``."""
    if not new:
        return x
    return Expr(
        x.out,
        tuple(
            Term(t.coefficient, tuple(Factor(rebind_tensor(f.tensor, new), f.indices) for f in t.factors))
            for t in x.terms
        ),
    )


def is_pair(tensor: Tensor) -> bool:
    """Whether a tensor has two token axes, so that it must never be materialised."""
    return sum(kind.token for kind in tensor.kinds) == 2


def is_near(term: Term) -> bool:
    """Whether a term is over near pairs of tokens alone, where exp stays exact."""
    return any(isinstance(f.tensor, Indicator) and f.tensor.which == "near" for f in term.factors)


def is_exponential(tensor: Tensor) -> TypeGuard[Map]:
    """Whether a tensor is the exponential of a score."""
    return isinstance(tensor, Map) and tensor.function == "exp" and is_pair(tensor)


def far_scores(program: Program) -> Iterator[Tensor]:
    """The scores of exponentials outside of near pairs, which an approximate rule replaces."""
    for _, x in program.expressions():
        for factor in (f for t in x.terms if not is_near(t) for f in t.factors):
            if is_exponential(factor.tensor):
                yield factor.tensor.argument


def by_distance(x: Expr) -> tuple[tuple[Term, ...], Expr]:
    """The terms over near pairs, and the sum of the others, which may have no terms."""
    near = tuple(t for t in x.terms if is_near(t))
    return near, Expr(x.out, tuple(t for t in x.terms if not is_near(t)))


def factors(program: Program) -> Iterator[Factor]:
    """The factors of all expressions, those inside stacks not among them."""
    for _, x in program.expressions():
        for term in x.terms:
            yield from term.factors


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


def top_degree(program: Program) -> int:
    """The highest degree of a polynomial (or of features) in the program."""
    return max([0, *(f.tensor.degree for f in factors(program) if isinstance(f.tensor, (Poly, Feature)))])


def sides(score: Tensor) -> tuple[Factor, Factor] | str:
    """U and W at their indices, of a score U Wᵀ (times its term's coefficient); or why it is no such product."""
    if not isinstance(score, Def):
        return f"the score {score.name} has no definition"
    definition = score.expr
    if len(definition.terms) != 1:
        return f"the score {score.name} is a sum, not a product: {definition}"
    i, j = definition.indices
    (term,) = definition.terms
    left = [f for f in term.factors if i in f.indices]
    right = [f for f in term.factors if j in f.indices]
    if len(left) != 1 or len(right) != 1 or len(term.factors) != 2:
        return f"the score {score.name} is not a product U Wᵀ of two token matrices: {definition}"
    return left[0], right[0]


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


def ordered(program: Program) -> Program:
    """The program with every definition before its first use, and in their order otherwise.

    Raises:
        RewriteError: a definition that needs itself.
    """
    defs = {d.label: d for d in program.defs}
    placed: dict[str, Def] = {}
    open_: set[str] = set()

    def place(label: str) -> None:
        if label in placed or label not in defs:
            return
        if label in open_:
            raise RewriteError(f"{label} is defined by itself")
        open_.add(label)
        x = defs[label].expr
        for inner in _read(x):
            place(inner)
        placed[label] = Def(label, rebind(x, placed))

    for label in defs:
        place(label)
    outputs = {name: rebind(x, placed) for name, x in program.outputs.items()}
    return Program(tuple(placed.values()), outputs)


def _read(x: Expr) -> Iterator[str]:
    """Names of the definitions that an expression reads, those inside its definitions not among them."""

    def visit(tensor: Tensor) -> Iterator[str]:
        if isinstance(tensor, Def):
            yield tensor.label
        elif isinstance(tensor, Concat):
            for part in tensor.parts:
                yield from _read(part)
        else:
            for inner in ir.base_tensors(tensor):
                yield from visit(inner)

    for term in x.terms:
        for factor in term.factors:
            yield from visit(factor.tensor)
