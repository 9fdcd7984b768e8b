"""C++ of one walk over a grid of tiles: products with what is done to their elements, then sums of the tiles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from polyattn.codegen.cpu.cpp.grids import NEAR, Walk
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.planning.plan import Node

COUNTS = {QUERY_TILE: "A", QUERY_PLACE: "T_q", KEY_TILE: "B", KEY_PLACE: "T_k"}
INDICES = {QUERY_TILE: "a", KEY_TILE: "b"}
LANES, COLUMNS = "lanes", "columns"
"""Axes of memory beside those of tiles and places: lanes with their padding, columns of a matrix."""
_WORDS = """
    Bits CHUNK Columns LOG2E Lanes Rows RowsLanes SOURCE Size Tile Vec W add all call column count double end exp2
    first float lanes load multiply none number omp packed padded pair product reciprocal row rows share side_by_side
    size slot slots std store sum_lanes sum_rows tensor threads torch total whole wide
"""
RESERVED = set(_WORDS.split())
"""Names that emitted files and C++ have already."""
Axis = Kind | str


@dataclass(frozen=True)
class Memory:
    """A tensor that a function reads or adds to: the Python expression, its name in C++, its axes in order."""

    code: str
    name: str
    axes: tuple[Axis, ...]

    @property
    def width(self) -> str:
        """The variable for its number of columns."""
        return f"{self.name}_columns"

    def extent(self, axis: Axis) -> str:
        """The length of an axis, as C++."""
        if axis == COLUMNS:
            return self.width
        return "lanes" if axis == LANES else COUNTS[axis] if isinstance(axis, Kind) else axis

    def stride(self, axis: Axis) -> str:
        """How far apart neighbours along an axis lie, as C++; 0 along one that there is not."""
        if axis not in self.axes:
            return "0"
        return " * ".join([self.extent(x) for x in self.axes[self.axes.index(axis) + 1 :]]) or "1"

    def at(self, indices: dict[Axis, str]) -> str:
        """Where the elements at some indices begin, as C++; an axis without one begins at 0."""
        found = [axis for axis in self.axes if axis in indices]
        if not found:
            return self.name
        text = indices[found[0]]
        for last, axis in zip(found, [*found[1:], None], strict=True):
            at = self.axes.index(last)
            between = self.axes[at + 1 : len(self.axes) if axis is None else self.axes.index(axis) + 1]
            factors = "".join(f" * {self.extent(x)}" for x in between)
            text = f"({text}){factors}" if " + " in text and factors else f"{text}{factors}"
            if axis is not None:
                text += f" + {indices[axis]}"
        return f"{self.name} + {text}"


@dataclass
class Product:
    """A product of a walk and what is done to its elements while they are in registers."""

    name: str
    terms: tuple[tuple[Memory | None, Memory | None], ...]
    """What is summed up: by rows, by lanes; a column of ones where there is nothing."""
    lines: list[tuple[Node, str, str]] = field(default_factory=list)
    """Values that are made of its elements: node, variable, C++."""


class WalkWriter:
    """The C++ function of a walk.

    Args:
        walk: what is computed.
        function: its name.
        names: variables of large values, by node; those of other walks are in memory under these names.
    """

    def __init__(self, walk: Walk, function: str, names: dict[Node, str]) -> None:
        self.grid, self.function, self.names = walk.grid, function, names
        self.memory: dict[str, Memory] = {}
        self.numbers: list[str] = []
        self.products: list[Product] = []
        self.at: dict[str, int] = {}
        """In which product a variable is made."""
        self.stored: dict[str, None] = {}
        """Variables that are in memory, tile by tile."""
        self.sums: list[str] = []
        self.slotted = False
        """Whether threads add to memory of their own."""

    # -- memory ------------------------------------------------------------------------------------------------------

    def take(self, code: str, name: str, axes: Sequence[Axis]) -> Memory:
        """A tensor as an argument of the function."""
        if name not in self.memory:
            self.memory[name] = Memory(code, name, tuple(axes))
        return self.memory[name]

    def keep(self, name: str) -> None:
        """Have a variable in memory that other walks read, or have left there."""
        self.stored[name] = None
        self.take(name, name, (*self.grid.batch, self.grid.rows, LANES))

    @property
    def indices(self) -> dict[Axis, str]:
        """Where the tile at hand begins."""
        return {**{kind: INDICES[kind] for kind in self.grid.batch}, self.grid.rows: "row"}

    # -- elements ----------------------------------------------------------------------------------------------------

    def product(self, n: Node, name: str, terms: Sequence[tuple[Memory | None, Memory | None]]) -> None:
        """A sum of products of rows and lanes."""
        self.at[name] = len(self.products)
        self.names[n] = name
        self.products.append(Product(name, tuple(terms)))

    def element(self, n: Node, name: str, bits: bool, factors: Sequence[str]) -> None:
        """A value whose elements are made of those of other large values.

        Args:
            bits: whether an exponent is in units of log 2.
            factors: Python for the coefficients of a sum that is not the value itself.
        """
        if not self.products or any(a not in self.names for a in n.args):
            raise EmitError(f"{n} is computed from more than the elements of tiles")
        parts = [self.names[a] for a in n.args]
        here = max((self.at[part] for part in parts if part in self.at), default=0)
        read = []
        for part in parts:
            if self.at.get(part) == here:
                read.append(part)
            else:
                self._store(part)
                read.append(f"load({part}_tile + at)")
        self.at[name] = here
        self.names[n] = name
        self.products[here].lines.append((n, name, self._code(n, read, bits, factors)))

    def _code(self, n: Node, read: Sequence[str], bits: bool, factors: Sequence[str]) -> str:
        if n.op == "map" and n.attr == "exp":
            return f"exp2({read[0]})" if bits else f"exp2(LOG2E * {read[0]})"
        if n.op == "map" and n.attr == "reciprocal":
            return f"reciprocal({read[0]})"
        if n.op == "sum":
            return " + ".join(f"{self._number(c)} * {x}" for c, x in zip(factors, read, strict=True))
        if n.op == "contract":
            return " * ".join(read)
        raise EmitError(f"the CPU target has no C++ for {n.op}")

    def _number(self, code: str) -> str:
        if code not in self.numbers:
            self.numbers.append(code)
        return f"number_{self.numbers.index(code)}"

    def _store(self, name: str) -> None:
        """Have a variable in memory: that of one thread, or what another walk has left."""
        self.stored[name] = None
        if name not in self.at:
            self.keep(name)

    # -- sums --------------------------------------------------------------------------------------------------------

    def sum(self, operand: Node, reduced: Kind, partner: Memory | None, out: Memory, per_slot: bool) -> None:
        """Add a tile, times a partner, to memory, summed over its rows or its lanes."""
        name = self.names[operand]
        self._store(name)
        self.slotted |= per_slot
        where = {**self.indices, "slots": "slot"}
        over = "sum_rows" if reduced == self.grid.rows else "sum_lanes"
        other = self.grid.lanes if reduced == self.grid.rows else self.grid.rows
        arguments = ["rows", COUNTS[self.grid.lanes], f"{name}_tile"]
        if partner is None:
            arguments += ["nullptr", "0"] if over == "sum_rows" else ["nullptr"]
        elif COLUMNS in partner.axes:
            arguments += [partner.width, partner.at(where), partner.stride(reduced)]
        else:
            arguments += [partner.at(where), *([partner.stride(reduced)] if over == "sum_rows" else [])]
        arguments.append(out.at(where))
        if COLUMNS in out.axes or over == "sum_lanes":
            arguments.append(out.stride(other))
        self.sums.append(f"{over}({', '.join(arguments)});")

    # -- the function ------------------------------------------------------------------------------------------------

    def call(self) -> list[str]:
        """The Python lines that call the function."""
        widths = (f"{m.code}.shape[{m.axes.index(COLUMNS) - len(m.axes)}]" for m in self._matrices())
        sizes = ["slots" if self.slotted else "threads", "A", "B", "T_q", "T_k", *widths]
        tensors = [*(m.code for m in self.memory.values()), *(["first", "column"] if self.grid is NEAR else [])]
        numbers = f", ({', '.join(self.numbers)},)" if self.numbers else ""
        return _wrapped([f'call("{self.function}", ({", ".join(tensors)},), ({", ".join(sizes)},){numbers})'], 8)

    def _matrices(self) -> list[Memory]:
        return [m for m in self.memory.values() if COLUMNS in m.axes]

    def text(self) -> str:
        """The C++ of the function."""
        grid, memory, threads = self.grid, list(self.memory.values()), "slots" if self.slotted else "threads"
        lines = [f"const Size {threads} = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];"]
        lines += [f"const Size {m.width} = size[{5 + at}];" for at, m in enumerate(self._matrices())]
        lines += [f"const float number_{at} = number[{at}];" for at in range(len(self.numbers))]
        lines.append(f"const Size lanes = padded({COUNTS[grid.lanes]});")
        for at, m in enumerate(memory):
            shape = ", ".join(x if isinstance(x, str) else COUNTS[x] for x in m.axes)
            lines.append(f"float* const {m.name} = static_cast<float*>(tensor[{at}]);  // [{shape}]")
        if grid is NEAR:
            for at, name in enumerate(("first", "column")):
                lines.append(f"const Size* const {name} = static_cast<Size*>(tensor[{len(memory) + at}]);")
        lines += [f"#pragma omp parallel num_threads({threads})", "{"]
        lines += [f"  Tile {x}_tile({COUNTS[grid.lanes]});" for x in self.stored if x not in self.memory]
        lines += [line if line.startswith("#") else f"  {line}" for line in self._loops()]
        lines.append("}")
        made = dict.fromkeys(product.name for product in self.products)
        made |= dict.fromkeys(variable for product in self.products for _, variable, _ in product.lines)
        head = [f"// {grid.title}: {', '.join(made) or 'sums'}"]
        head.append(f'extern "C" void {self.function}(void* const* tensor, const Size* size, const double* number) {{')
        return "\n".join(_wrapped([*head, *(x if x.startswith("#") else f"  {x}" for x in lines), "}"]))

    def _loops(self) -> list[str]:
        """The loops over tiles, and what is done to each."""
        grid = self.grid
        outer, count = INDICES[grid.batch[0]], COUNTS[grid.batch[0]]
        if self.slotted:  # which thread adds what is the same in every run, so that sums are
            ends = [f"{s} * {count} / slots" for s in ("slot", "(slot + 1)")]
            if grid is NEAR:
                ends = [f"share({s}, slots, {count}, first)" for s in ("slot", "slot + 1")]
            loops = ["for (Size slot = 0; slot < slots; ++slot)"]
            loops.append(f"  for (Size {outer} = {ends[0]}, end = {ends[1]}; {outer} < end; ++{outer}) {{")
            schedule = "static, 1"
        else:
            loops = [f"for (Size {outer} = 0; {outer} < {count}; ++{outer}) {{"]
            schedule = "dynamic"
        body = [f"for (Size row = 0; row < {COUNTS[grid.rows]}; row += CHUNK) {{"]
        body.append(f"  const Size rows = std::min(CHUNK, {COUNTS[grid.rows]} - row);")
        body += [
            f"  float* const {x}_tile = {self.memory[x].at(self.indices)};" for x in self.stored if x in self.memory
        ]
        body += [f"  {line}" for product in self.products for line in self._product(product)]
        body += [*(f"  {line}" for line in self.sums), "}"]
        if grid is NEAR:
            walk = [f"for (Size pair = first[{outer}]; pair < first[{outer} + 1]; ++pair) {{"]
            body = [*walk, "  const Size b = column[pair];", *(f"  {line}" for line in body), "}"]
        deep = "  " * len(loops)
        return [f"#pragma omp for schedule({schedule})", *loops, *(deep + line for line in body), deep[2:] + "}"]

    def _product(self, product: Product) -> list[str]:
        name = product.name
        lines = [f"product(rows, lanes, [&](Vec {name}, Size at) {{"]
        for variable, code in [(name, ""), *((variable, code) for _, variable, code in product.lines)]:
            if code:
                lines.append(f"  const Vec {variable} = {code};")
            if variable in self.stored:
                lines.append(f"  store({variable}_tile + at, {variable});")
        return [*lines, f"}}, {', '.join(self._term(x, y) for x, y in product.terms)});"]

    def _term(self, x: Memory | None, y: Memory | None) -> str:
        by_rows = "" if x is None else f"{x.at(self.indices)}, {x.stride(self.grid.rows)}"
        by_lanes = "" if y is None else y.at(self.indices)
        if x is None or y is None:
            return f"Lanes{{{by_lanes}}}" if x is None else f"Rows{{{by_rows}}}"
        if (COLUMNS in x.axes) != (COLUMNS in y.axes):
            raise EmitError(f"columns of one of {x.code} and {y.code} alone")
        return (
            f"Columns{{{x.width}, {by_rows}, {by_lanes}}}"
            if COLUMNS in x.axes
            else f"RowsLanes{{{by_rows}, {by_lanes}}}"
        )


def _wrapped(lines: Sequence[str], margin: int = 0) -> list[str]:
    """Lines of code of at most 120 columns beside a margin, broken at spaces."""
    made = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        if len(line) + margin <= 120 or "//" in line:
            made.append(line)
            continue
        made += textwrap.wrap(
            line.strip(),
            120 - margin,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return made
