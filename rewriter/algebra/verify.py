"""The verifier of programs: it runs before and after every rule, and refuses what no rule may leave behind.

An index of a term is an open index of its expression or summed over; a factor has an index of the right kind for every
axis of its tensor; a definition comes before its use, under a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import (
    Concat,
    Def,
    Expr,
    Factor,
    Feature,
    Kind,
    Leaf,
    Map,
    Poly,
    StackedPart,
    Tensor,
)
from polyattn.rewriter.algebra.programs import Program


def output_axes(program: Program) -> dict[str, tuple[Kind, ...]]:
    """The axes of every output, by name."""
    return {name: tuple(index.kind for index in x.indices) for name, x in program.outputs.items()}


def verify(program: Program, axes: Mapping[str, tuple[Kind, ...]] | None = None) -> None:
    """Check that a program means something.

    Args:
        axes: of the outputs, by name, as they are declared; None: not checked.

    Raises:
        RewriteError: the program is broken; the message is a sentence that names what is.
    """
    _Verifier(program).run()
    if axes is None:
        return
    found = output_axes(program)
    if found.keys() != axes.keys():
        raise RewriteError(f"the outputs are {', '.join(found)}, declared are {', '.join(axes)}")
    for name, kinds in axes.items():
        if found[name] != kinds:
            raise RewriteError(f"{name} has the axes {found[name]}, declared are {kinds}")


class _Verifier:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.labels = {d.label for d in program.defs}
        self.known: dict[str, Expr] = {}
        self.seen: dict[int, Tensor] = {}
        """Tensors that hold, by identity."""

    def run(self) -> None:
        for definition in self.program.defs:
            if definition.label in self.known:
                raise RewriteError(f"two definitions are called {definition.label}")
            if definition.label in self.program.outputs:
                raise RewriteError(f"a definition and an output are called {definition.label}")
            self.expression(definition.label, definition.expr)
            self.known[definition.label] = definition.expr
        for name, x in self.program.outputs.items():
            self.expression(name, x)

    def expression(self, name: str, x: Expr, constant: bool = False) -> None:
        """An expression; where ``constant``, an open index may be one that nothing has: a column of ones."""
        if not x.terms:
            raise RewriteError(f"{name} has no terms, and so no shape")
        if None in x.out:
            raise RewriteError(f"a broadcast axis is left in {name} = {x}")
        if len(set(x.out)) != len(x.out):
            raise RewriteError(f"{name} = {x} has one index on two axes")
        for term in x.terms:
            for factor in term.factors:
                self.factor(name, factor)
        if not constant:
            held = {index for term in x.terms for factor in term.factors for index in factor.indices}
            free = [index for index in x.out if index not in held]
            if free:
                raise RewriteError(f"the index {free[0]} of {name} is free: no factor has it in {x}")

    def factor(self, name: str, factor: Factor) -> None:
        kinds = factor.tensor.kinds
        if len(kinds) != len(factor.indices) or any(i.kind != k for i, k in zip(factor.indices, kinds, strict=True)):
            raise RewriteError(f"{factor.tensor.name} has axes {kinds}, {name} reads it at {factor.indices}")
        self.tensor(name, factor.tensor)

    def tensor(self, name: str, tensor: Tensor) -> None:
        if id(tensor) in self.seen:
            return
        if isinstance(tensor, Def):
            self.definition(name, tensor)
        elif isinstance(tensor, Leaf):
            if tensor.label in self.labels:
                raise RewriteError(f"{name} reads an input {tensor.label}, and a definition has its name")
        elif isinstance(tensor, Map):
            self.tensor(name, tensor.argument)
        elif isinstance(tensor, Poly):
            self.tensor(name, tensor.score)
        elif isinstance(tensor, Feature):
            if [kind.token for kind in tensor.source.kinds] != [True, False]:
                raise RewriteError(f"{name} reads features of {tensor.source.name}, whose rows are not those of tokens")
            self.tensor(name, tensor.source)
        elif isinstance(tensor, Concat):
            self.stack(name, tensor)
        elif isinstance(tensor, StackedPart):
            self.columns(name, tensor)
        self.seen[id(tensor)] = tensor

    def definition(self, name: str, tensor: Def) -> None:
        if tensor.label not in self.labels:
            raise RewriteError(f"{name} reads {tensor.label}, which nothing defines")
        if tensor.label not in self.known:
            raise RewriteError(f"{name} reads {tensor.label} before its definition")
        own = self.known[tensor.label]
        if own is not tensor.expr and own != tensor.expr:
            raise RewriteError(f"{name} reads another {tensor.label} than the one that is defined: {tensor.expr}")

    def stack(self, name: str, tensor: Concat) -> None:
        for part in tensor.parts:
            self.expression(tensor.label, part, constant=True)
        if len({part.indices[0].kind for part in tensor.parts}) != 1:
            raise RewriteError(f"{name} reads {tensor.label}, whose parts have rows of different tokens")
        self.width(tensor.label, tensor.column, [p.indices[1].kind if p.indices[1:] else None for p in tensor.parts])

    def columns(self, name: str, tensor: StackedPart) -> None:
        if not 0 <= tensor.part < len(tensor.widths):
            raise RewriteError(
                f"{name} reads part {tensor.part} of {tensor.whole.name}, which has {len(tensor.widths)}"
            )
        self.width(tensor.whole.name, tensor.whole.kinds[-1], tensor.widths)
        self.tensor(name, tensor.whole)

    @staticmethod
    def width(label: str, column: Kind, widths: list[Kind | None] | tuple[Kind | None, ...]) -> None:
        """Parts without a kind are one column wide."""
        total = sum((sympy.Integer(1) if kind is None else kind.size for kind in widths), sympy.Integer(0))
        if total != column.size:
            raise RewriteError(f"{label} has {column.size} columns, its parts have {total}")
