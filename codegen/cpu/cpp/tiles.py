"""An emitted file of a specification in tiles whose large values are computed by C++, and the others by torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyattn.codegen.cpu.cpp.grids import CHOICE, Walk, of_sum, order, sums
from polyattn.codegen.cpu.cpp.runtime import HEADER, LANES
from polyattn.codegen.cpu.cpp.walks import COLUMNS, RESERVED, Axis, Memory, WalkWriter
from polyattn.codegen.cpu.cpp.walks import LANES as PADDED
from polyattn.codegen.cpu.layout import number
from polyattn.codegen.cpu.near_tiles import TileWriter
from polyattn.codegen.cpu.tile_values import BLOCK, END, SIZES, Value, arranged, in_bits
from polyattn.codegen.cpu.units import Part, Single, Stacked, Unit
from polyattn.codegen.phases import reduces_queries
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.planning.plan import Node

SLOTS = 16
"""Threads that add to the same memory, at most: each does so in a copy of its own."""
IN_MEMORY = (QUERY_TILE, KEY_TILE, QUERY_PLACE, KEY_PLACE)
"""The order of axes in memory, before columns."""
HELPERS = f'''
def padded(size):
    """The length of an axis that vectors run along, in memory."""
    return size + -size % {LANES}


def packed(x):
    """The last two axes exchanged; the last one, along which vectors run, is padded."""
    return torch.nn.functional.pad(x.mT, (0, -x.shape[-2] % {LANES})).contiguous()


def whole(x):
    """A value in one piece."""
    return x.contiguous()


def wide(x):
    """A value in one piece whose last axis is padded."""
    missing = -x.shape[-1] % {LANES}
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
'''


class CppTileWriter(TileWriter):
    """The parts of an emitted file whose large values are C++."""

    def __init__(self, spec: KernelSpec) -> None:
        self.functions: list[str] = []
        self.large: dict[Node, str] = {}
        """Variables of large values."""
        super().__init__(spec)

    def _write(self, made: Sequence[Unit]) -> None:
        self.taken |= RESERVED
        steps = list(order(made, [n for _, n in self.reads]))
        walks = [step for step in steps if isinstance(step, Walk)]
        for step in steps:
            if isinstance(step, Walk):
                others = {n for walk in walks if walk is not step for unit in walk.units for n in unit.needs}
                self._walk(step, others)
            elif isinstance(step, str):
                assert step == CHOICE
                self._choose()
            else:
                self._unit(step)
        self._stores()

    def _choose(self) -> None:
        super()._choose()
        self.lines[BLOCK] += [
            "first = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))",
            "column = near.nonzero()[:, 1].contiguous()",
        ]

    # -- walks -------------------------------------------------------------------------------------------------------

    def _walk(self, walk: Walk, others: set[Node]) -> None:
        """Lines that call the function of a walk, and its C++."""
        function = f"{walk.grid.name}_{len(self.functions) + 1}"
        writer = WalkWriter(walk, function, self.large)
        results: list[tuple[Node, str, str, int]] = []
        for unit in reversed(walk.units):  # what is another value as it stands has its name
            same = self._same(unit.makes[0])
            if same is not None and unit.makes[0] in self.names:
                self.names.setdefault(same, self.names[unit.makes[0]])
        for unit in (unit for unit in walk.units if not sums(unit)):
            if isinstance(unit, Stacked):
                terms = self._terms(unit, writer)
                writer.product(unit.node, self._name(unit.node), terms)
            elif isinstance(unit, Single):
                self._element(unit.node, writer)
        for unit in (unit for unit in walk.units if sums(unit)):
            operand, members = of_sum(unit)
            for n, partner in members:
                results.append(self._sum_of(n, operand, partner, writer))
        read = {self.large[n] for n in others if n in self.large}
        for name in (name for name in writer.at if name in read):
            sizes = [SIZES[kind] for kind in (*walk.grid.batch, walk.grid.rows)]
            self.lines[BLOCK].append(f"{name} = Q.new_empty({', '.join(sizes)}, padded({SIZES[walk.grid.lanes]}))")
            writer.keep(name)
        self.lines[BLOCK] += writer.call()
        self.functions.append(writer.text())
        for n, name, code, place in results:
            self.lines[place].append(f"{name} = {code}")
            self.values[n] = Value(name, n.axes, place)

    def _terms(self, unit: Stacked, writer: WalkWriter) -> list[tuple[Memory | None, Memory | None]]:
        """Summands of a product: what there is by rows and by lanes."""
        n, lanes = unit.node, unit.node.axes.index(writer.grid.lanes)
        if any(part.hidden for part in unit.parts):
            self.masked.add(n)
        terms = []
        for part in unit.parts:
            by_rows: Memory | None = None
            by_lanes: Memory | None = None
            for which, operand, places in ((0, part.left, part.left_axes), (1, part.right, part.right_axes)):
                if operand is None:
                    continue
                memory = self._operand_of(n, operand, places, self._coefficient(n, part, which), writer)
                if lanes in places:
                    by_lanes = memory
                elif by_rows is not None:
                    raise EmitError(f"{n} is no product of rows and lanes of {writer.grid.title}")
                else:
                    by_rows = memory
            terms.append((by_rows, by_lanes))
        return terms

    def _operand_of(self, n: Node, operand: Node, places: Sequence[int], factor: str, writer: WalkWriter) -> Memory:
        """An operand of a product in memory, times a factor; what has lanes is packed."""
        if operand.op == "mask":
            return writer.take("off", "off", operand.axes)
        value, held = self.values[operand], {n.axes[p]: at for at, p in enumerate(places) if p >= 0}
        kinds: list[Axis] = [kind for kind in IN_MEMORY if kind in held]
        order = [held[kind] for kind in IN_MEMORY if kind in held]
        columns = list(places).index(-1) if -1 in places else None
        code = arranged(value.name, order if columns is None else [*order, columns])
        if writer.grid.lanes in held:
            axes = [*kinds[:-1], *([] if columns is None else [COLUMNS]), PADDED]
            function = "wide" if columns is None else "packed"
        else:
            axes, function = [*kinds, *([] if columns is None else [COLUMNS])], "whole"
        scaled = code if factor == "1" else f"{factor} * {code}"
        name = self._arrange(function, scaled, value.place, value.name if factor == "1" else f"scaled_{value.name}")
        return writer.take(name, name, axes)

    def _coefficient(self, n: Node, part: Part, which: int) -> str:
        """A part's coefficient, on the operand that there is, of queries rather than keys; 1 on the other."""
        if which != (0 if part.left is not None else 1):
            return "1"
        if n in self.factors:
            return self.factors[n]
        factor = number(part.coefficient)
        return in_bits(factor) if n in self.exponents else factor

    def _arrange(self, function: str, code: str, place: int, base: str) -> str:
        """A variable for a value as C++ reads it."""
        text = f"{function}({code})"
        if text not in self.stacks:
            name = self._fresh(f"{base}_{function}")
            self.lines[place].append(f"{name} = {text}")
            self.stacks[text] = Value(name, (), place, owned=False)
        return self.stacks[text].name

    def _element(self, n: Node, writer: WalkWriter) -> None:
        if n.op == "contract" and any(a.op == "mask" and a.attr != "near" for a in n.args):
            exponential = next(a for a in n.args if a.op != "mask")
            if exponential not in self.hidden:
                raise EmitError(f"the mask of {n} is no part of an exponent")
        if n.op == "map" and n.args[0] in self.masked:
            self.hidden.add(n)
        same = self._same(n)
        if same is not None:
            self.large[n] = self.large[same]
            return
        factors = [number(c) for c in n.attr[0]] if n.op == "sum" else []
        writer.element(n, self._name(n), bool(n.args) and n.args[0] in self.exponents, factors)

    def _same(self, n: Node) -> Node | None:
        """The large value that another one is, with its axes in another order, or a factor that its operands have;
        near pairs are a list of those, and what a far mask hides has exponents that are low enough."""
        if n.op == "sum" and len(n.args) == 1 and (n.attr[0] == (1,) or n.args[0] in self.factors):
            return n.args[0]
        if n.op == "contract" and len(n.args) == 2 and any(a.op == "mask" for a in n.args):
            return next(a for a in n.args if a.op != "mask")
        return None

    # -- the file ----------------------------------------------------------------------------------------------------

    parameters = "inputs, scalars, block, choose, call"

    def _globals(self) -> list[str]:
        source = "\n\n".join([f'#include "{HEADER}"', *self.functions])
        return [f"LOG2E = {math.log2(math.e)!r}", "", f'SOURCE = r"""\n{source}\n"""', "", HELPERS]

    def _first(self) -> list[str]:
        return ["threads = torch.get_num_threads()", f"slots = min(threads, {SLOTS})"]

    # -- sums --------------------------------------------------------------------------------------------------------

    def _sum_of(self, n: Node, operand: Node, partner: Node | None, writer: WalkWriter) -> tuple[Node, str, str, int]:
        """A sum over a grid: the value, its variable, its Python, and its place."""
        grid = writer.grid
        reduced = {grid.rows, grid.lanes} & set(operand.axes) - set(n.axes)
        if len(reduced) != 1:
            raise EmitError(f"{n} sums over rows and lanes of {grid.title} at once, or over neither")
        (gone,) = reduced
        free = [] if partner is None else [p for p, kind in enumerate(partner.axes) if kind not in operand.axes]
        if len(free) > 1 or (partner is not None and gone not in partner.axes):
            raise EmitError(f"{n} is no product of a tile and a matrix")
        if partner is not None and {grid.rows, grid.lanes} - {gone} & set(partner.axes):
            raise EmitError(f"{n} multiplies what it does not sum over")
        memory = None if partner is None else self._partner(partner, free, gone, writer)
        kinds = [kind for kind in IN_MEMORY if kind in n.axes]
        per_slot = grid.batch[0] not in kinds
        at_end = reduces_queries(n)
        sizes = [*(["slots"] if per_slot else []), *(SIZES[kind] for kind in kinds)]
        axes: list[Axis] = [*(["slots"] if per_slot else []), *kinds]
        if free and partner is not None:
            sizes.append(f"padded({SIZES[partner.axes[free[0]]]})")
            axes.append(COLUMNS)
        made = self._name(n)
        name = self._fresh(f"{made}_sums")
        memory_of = self.before if at_end else self.lines[BLOCK]
        memory_of.append(f"{name} = Q.new_zeros({', '.join(sizes)})")
        out = writer.take(name, name, axes)
        writer.sum(operand, gone, memory, out, per_slot)
        code = f"{name}.sum(0)" if per_slot else name
        produced = list(kinds)
        if free and partner is not None:
            kind = partner.axes[free[0]]
            code += f"[..., :{SIZES[kind]}]"
            produced.append(kind)
        positions = [produced.index(kind) for kind in n.axes]
        return n, made, arranged(code, positions), END if at_end else BLOCK

    def _partner(self, partner: Node, free: Sequence[int], gone: Kind, writer: WalkWriter) -> Memory:
        """What a tile is multiplied by, in memory."""
        value = self.values[partner]
        kinds = [kind for kind in IN_MEMORY if kind in partner.axes]
        if not free and gone == writer.grid.lanes:  # a vector runs along lanes
            kinds = [*(kind for kind in kinds if kind != gone), gone]
        positions = [partner.axes.index(kind) for kind in kinds] + list(free)
        code = arranged(value.name, positions)
        name = self._arrange("wide" if free else "whole", code, value.place, value.name)
        return writer.take(name, name, (*kinds, *([COLUMNS] if free else [])))
