"""Recipe: a plan as matrix formulas in the order in which they are computed, each with its FLOPs.

Every sum over an index is a line; what multiplies or scales elementwise is written inside the line that uses it.  The
formulas are made from the plan's nodes alone.  Names and order depend on what a node computes, never on when it was
first made in this process (``Node.serial``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Concat, Expr
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import Index, Kind, Select
from polyattn.rewriter.notation.assemble import Piece, Vertex, assemble
from polyattn.rewriter.notation.atoms import Apply, Columns, Features, Stacked
from polyattn.rewriter.notation.matrix import Matrix, Named, Ones, Ratio, Sum
from polyattn.rewriter.notation.printer import Notation, tensors
from polyattn.rewriter.notation.symbols import Symbol, symbol
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import Node, Plan, flops, walk

ONE = sympy.Integer(1)
Term = tuple[sympy.Expr, list[Piece]]


@dataclass(frozen=True)
class RecipeLine:
    """One line of a recipe."""

    name: Symbol
    tree: Matrix
    axes: tuple[Kind, ...]
    flops: sympy.Expr
    """Of the sum itself; what is elementwise is in the block's total."""
    scan: str | None
    """The token axis that the value is a running sum along."""


@dataclass(frozen=True)
class Block:
    """The lines of one output that no output before it has computed, and all of their FLOPs."""

    output: str
    steps: tuple[RecipeLine, ...]
    flops: sympy.Expr


@dataclass(frozen=True)
class Recipe:
    """The blocks of a program's outputs in order."""

    plan: Plan
    blocks: tuple[Block, ...]


def recipe(program: Program) -> Recipe:
    """The recipe of a program that can be planned."""
    return _Writer(program).run()


def _arguments(n: Node) -> tuple[Node, ...]:
    """The arguments in an order that is the same in every process: what needs least first."""
    if n.op != "contract":
        return n.args
    return tuple(sorted(n.args, key=lambda a: (sum(1 for _ in walk([a])), a.structure)))


def _ordered(n: Node) -> tuple[int, ...]:
    """Positions of the axes as they are written: tokens, then features, then columns."""

    def key(position: int) -> tuple[bool, bool, str]:
        kind = n.axes[position]
        return not kind.token, not kind.letter[0] > "z", kind.letter

    return tuple(sorted(range(len(n.axes)), key=key))


def _turned(n: Node) -> Node | None:
    """The contraction that a node is nothing but a transpose of."""
    while n.op == "sum" and len(n.args) == 1 and n.attr[0] == (1,) and None not in n.attr[1][0]:
        (n,) = n.args
        if n.op == "contract":
            return n
    return None


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.notation = Notation(program)
        self.plan = plan(program)
        self.known = self._named()
        self.counts: dict[str, itertools.count[int]] = {}
        self.done: dict[Node, Symbol] = {}
        self.through: Node | None = None
        """What the output that is being written is only a transpose of: it gets no line of its own."""
        self.steps: list[RecipeLine] = []

    def run(self) -> Recipe:
        blocks = []
        seen: list[Node] = []
        for name, root in self.plan.outputs.items():
            self.steps = []
            self.line(root, symbol(name))
            cost = self.plan.cost([name], seen)
            seen += list(walk([root]))
            blocks.append(Block(name, tuple(self.steps), cost))
        return Recipe(self.plan, tuple(blocks))

    def _named(self) -> Mapping[Node, Symbol]:
        """The nodes that definitions and stacks of the program stand for."""
        wanted: dict[str, tuple[Symbol, Expr]] = {}
        for d in self.program.defs:
            if d.label in self.notation.names and sum(k.token for k in d.kinds) < 2:
                wanted[d.label] = (self.notation.names[d.label], d.expr)
        for _, x in self.program.expressions():
            for t in tensors(x):
                if isinstance(t, Concat):
                    name = self.notation.stack(t)
                    wanted[name.text] = (name, ir.of(t))
        nodes = plan(replace(self.program, outputs={label: x for label, (_, x) in wanted.items()})).outputs
        found: dict[Node, Symbol] = {}
        for label, (name, _) in wanted.items():
            found.setdefault(nodes[label], name)
        return found

    # -- lines -------------------------------------------------------------------------------------------------------

    def own_line(self, n: Node) -> bool:
        """Whether a node is a line of its own: it sums over an index, adds, stacks, or has a name."""
        if n is self.through and n not in self.known and n not in self.done:
            return False
        if n.op == "contract":
            patterns, result = n.attr
            return n in self.known or bool({x for p in patterns for x in p} - set(result))
        return n.op == "concat" or (n.op == "sum" and len(n.args) > 1) or (n.op == "map" and n.attr == "exp")

    def line(self, n: Node, name: Symbol | None = None) -> Symbol:
        """The line of a node; its arguments' lines come before it."""
        if n in self.done:
            if name is not None:
                self._step(name, Named(self.done[n]), n, sympy.Integer(0))
            return self.done[n]
        self.through = _turned(n) if name is not None else None
        cost = flops(n if self.through is None else self.through, self.plan.near)
        tree = self.formula(n)
        self.through = None
        if name is None:
            name = self.known[n] if n in self.known else self._new(n)
        self.done[n] = name
        self._step(name, tree, n, cost)
        return name

    def _step(self, name: Symbol, tree: Matrix, n: Node, cost: sympy.Expr) -> None:
        axes = tuple(n.axes[p] for p in _ordered(n))
        self.steps.append(RecipeLine(name, tree, axes, cost, n.scan))

    def _new(self, n: Node) -> Symbol:
        """A is the exponential, S a state, Y a value per token, Z one per pair of tokens."""
        if n.op == "map":
            return symbol("A")
        letter = "SYZ"[n.tokens]
        return symbol(letter + str(next(self.counts.setdefault(letter, itertools.count(1)))))

    def formula(self, n: Node) -> Matrix:
        """What a node computes, from names."""
        if n.op == "concat":
            return self._concat(n)
        indices = ir.fresh(n.axes, ())
        if n.op == "contract":
            terms = self._product(n, indices)
        elif n.op == "map":
            terms = [(ONE, [Piece(self._leaf(n), tuple((index,) for index in indices))])]
        else:
            terms = self._sum(n, indices) if n.op == "sum" else self._terms(n, indices)
        return self._assembled(terms, self._out(n, indices))

    @staticmethod
    def _assembled(terms: list[Term], out: tuple[Vertex, ...]) -> Matrix:
        parts = tuple((c, assemble(pieces, out)) for c, pieces in terms)
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Sum(parts)

    @staticmethod
    def _out(n: Node, indices: tuple[Index, ...]) -> tuple[Vertex, ...]:
        """Rows and columns of a value: three axes are one against two."""
        order = [indices[p] for p in _ordered(n)]
        return ((order[0],), (order[1], order[2])) if len(order) == 3 else tuple((index,) for index in order)

    def _concat(self, n: Node) -> Matrix:
        widths, constants = n.attr
        args = iter(n.args)
        token = ir.fresh(n.axes[:1], ())
        parts: list[Matrix] = []
        for width, constant in zip(widths, constants, strict=True):
            if constant is not None:
                column = Ones(n.axes[0])
                parts.append(column if constant == 1 else Sum(((constant, column),)))
            else:
                indices = (*token, *(ir.fresh((width,), token) if width is not None else ()))
                terms = self._terms(next(args), indices)
                parts.append(self._assembled(terms, tuple((index,) for index in indices)))
        return Stacked(tuple(parts))

    # -- products ----------------------------------------------------------------------------------------------------

    def _terms(self, n: Node, indices: tuple[Index, ...]) -> list[Term]:
        """A node at indices as a sum of products of names."""
        if self.own_line(n):
            return [(ONE, [self._piece(Named(self.line(n)), n, indices)])]
        if n.op == "contract":
            return self._product(n, indices)
        if n.op == "sum":
            return self._sum(n, indices)
        if n.op == "gather":
            (argument,) = n.args
            position, degree = n.attr
            beta, a = indices[position], indices[position + 1]
            (alpha,) = ir.fresh((argument.axes[position],), indices)
            select = self.notation.select(Select(beta.kind, a.kind, alpha.kind, degree))
            inner = self._terms(argument, (*indices[:position], alpha, *indices[position + 2 :]))
            return [(c, [*pieces, Piece(select, ((beta, alpha), (a,)))]) for c, pieces in inner]
        if n.op == "weights":
            extra, weight = self.notation.weight(n.attr)
            return [(extra, [Piece(weight, (indices,))])]
        return [(ONE, [Piece(self._leaf(n), tuple((index,) for index in indices))])]

    def _sum(self, n: Node, indices: tuple[Index, ...]) -> list[Term]:
        coefficients, orders = n.attr
        found: list[Term] = []
        for argument, c, order in zip(n.args, coefficients, orders, strict=True):
            place = {p: index for p, index in zip(order, indices, strict=True) if p is not None}
            extra = [Piece(Ones(x.kind), ((x,),)) for x, p in zip(indices, order, strict=True) if p is None]
            there = tuple(place[p] for p in range(len(argument.axes)))
            inner = self._terms(argument, there)
            found += [(c * k, [*pieces, *extra]) for k, pieces in inner]
        return found

    def _product(self, n: Node, indices: tuple[Index, ...]) -> list[Term]:
        patterns, result = n.attr
        names = dict(zip(result, indices, strict=True))
        kinds = {x: k for a, p in zip(n.args, patterns, strict=True) for x, k in zip(p, a.axes, strict=True)}
        for x, kind in sorted(kinds.items()):
            if x not in names:
                (names[x],) = ir.fresh((kind,), [*names.values(), *indices])
        pattern = dict(zip(n.args, patterns, strict=True))
        found: list[Term] = [(ONE, [])]
        for argument in _arguments(n):
            inner = self._terms(argument, tuple(names[x] for x in pattern[argument]))
            found = [(c * k, [*left, *right]) for c, left in found for k, right in inner]
        return found

    def _piece(self, tree: Matrix, n: Node, indices: tuple[Index, ...]) -> Piece:
        return Piece(tree, self._out(n, indices))

    def _leaf(self, n: Node) -> Matrix:
        """A value that is written inside a formula: an input, a function or columns of something."""
        if n.op == "input":
            return Named(symbol(n.attr))
        if n.op == "mask":
            return Named(symbol({"causal": "M", "all": "M", "near": "M_near", "far": "M_far"}[n.attr]))
        if n.op == "features":
            return Features(n.attr, self._value(n.args[0]))
        if n.op == "part":
            return self._columns(n)
        if n.op == "map":
            return self._map(n)
        raise NotImplementedError(f"no formula for {n}")

    def _columns(self, n: Node) -> Matrix:
        if n in self.known:
            self.line_of_part(n)
            return Named(self.done[n])
        part, widths = n.attr
        return Columns(self._value(n.args[0]), part, widths)

    def line_of_part(self, n: Node) -> None:
        """Named columns of a stack: a line without cost."""
        if n not in self.done:
            part, widths = n.attr
            tree = Columns(self._value(n.args[0]), part, widths)
            self.done[n] = self.known[n]
            self._step(self.known[n], tree, n, sympy.Integer(0))

    def _map(self, n: Node) -> Matrix:
        inner = self._value(n.args[0])
        if n.attr == "reciprocal":
            return Ratio((), (inner,)) if isinstance(inner, Named) else Apply(Symbol("1/", "1/"), inner)
        return Apply(Symbol(n.attr, rf"\{n.attr}"), inner)

    def _value(self, n: Node) -> Matrix:
        """A node as one matrix, axes in their own order."""
        indices = ir.fresh(n.axes, ())
        return self._assembled(self._terms(n, indices), tuple((index,) for index in indices))
