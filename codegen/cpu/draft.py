"""What an emitted file of the CPU target has beside its loops: memory, tables of weights, stacks, helpers, scalars.

Large tiles lie in memory that is allocated once and used again by every block.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from polyattn.codegen.cpu.layout import Layout, Sizes, Value, number, rank_name, shared
from polyattn.codegen.cpu.plan import Body
from polyattn.codegen.spec import FEATURES, TOKENS, KernelSpec, letters
from polyattn.rewriter.planning.plan import Node, walk


class Draft:
    """A file as it is written."""

    def __init__(self, spec: KernelSpec) -> None:
        self.sizes = Sizes(spec)
        self.states: dict[object, Value] = {}
        """The sums over tokens, by what they sum."""
        self.weights: dict[tuple[sympy.Expr, ...], str] = {}
        """The name of every table of weights, by its coefficients."""
        self.memory: dict[str, Layout] = {}
        """The layouts of what is allocated once, by name."""
        self.stacks: dict[Node, tuple[Value, list[str]]] = {}
        """The memory of every concatenation, and the lines that fill its constant columns."""
        self.symbols: set[str] = set()
        """Scalars that the loops use."""
        self.helpers: set[str] = set()
        """Names of the functions that the loops call."""
        self.ranks: dict[str, int] = {}
        """The degree of the features that every variable for a rank counts."""
        self._free: dict[Layout, list[str]] = {}
        roots = [n for loop in spec.loops for n in (*loop.tiles, *loop.accumulate)]
        nodes = list(walk([*roots, *(n for _, n in spec.states)]))
        self._coefficients = [tuple(n.attr) for n in nodes if n.op == "weights"]
        for n in nodes:
            if n.op == "features":
                self.ranks[rank_name(next(x for x in letters(n) if x in FEATURES))] = n.attr

    def table(self, coefficients: tuple[sympy.Expr, ...]) -> str:
        """The name of a table of weights."""
        return self.weights.setdefault(tuple(coefficients), f"w_{len(self.weights) + 1}")

    def serving(self, coefficients: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
        """Coefficients of a table that serves as well where nobody reads the weight of the constant monomial."""
        return next((c for c in self._coefficients if c[1:] == coefficients[1:]), coefficients)

    def number(self, c: object) -> str:
        """A coefficient as Python; its symbols become scalars of the loops."""
        self.symbols |= {s.name for s in sympy.sympify(c).free_symbols}
        return number(c)

    def allocate(self, n: Node | None, layout: Layout, body: Body) -> str:
        """Memory for a tile as an expression; it is the node's until its last reader has run."""
        kind = shared(layout)
        free = self._free.setdefault(kind, [])
        if not free:
            free.append(f"memory_{len(self.memory) + 1}")
            self.memory[free[0]] = kind
        name = free.pop()
        if n is not None:
            body.memory[n] = name
        dims = [":", *(f":{self.sizes.of(x)}" if x in TOKENS else ":" for x in layout)]
        return f"{name}[{', '.join(['...', dims[-1]] if layout[0] not in TOKENS else dims)}]"

    def release(self, memory: str) -> None:
        """Memory that nobody reads any more, by its name or an expression of it."""
        name = memory.partition("[")[0]
        self._free[self.memory[name]].append(name)

    def define(self, n: Node, layout: Layout, code: str, body: Body) -> Value:
        """Writes a line that gives a tile its name."""
        value = Value(body.name(n), layout)
        body.lines.append(f"{value.name} = {code}  # {self.sizes.shape(layout)}")
        return value

    def stack(self, n: Node, name: str, columns: Sequence[str]) -> Value:
        """Memory of a concatenation, whose constant columns are filled before the loops.

        Args:
            columns: the index of every part along the last axis.
        """
        if n not in self.stacks:
            _, constants = n.attr
            used = [value.name for value, _ in self.stacks.values()]
            memory = f"{name}_memory" + (f"_{len(used) + 1}" if f"{name}_memory" in used else "")
            fills = [
                f"{memory}[:, :, {columns[k]}] = {self.number(c)}" for k, c in enumerate(constants) if c is not None
            ]
            self.stacks[n] = Value(memory, letters(n)), fills
        return self.stacks[n][0]
