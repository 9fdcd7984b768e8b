"""Python source of a specification in tiles for CPUs: torch calls, head by head, over blocks of tiles of queries.

Values over pairs of places are computed for lists of near pairs of tiles, some at a time: tiles are gathered,
multiplied as batches of matrices, and what is summed over keys or queries is added at its tile. All else is dense.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import ClassVar

import sympy

from polyattn.codegen.cpu.layout import number
from polyattn.codegen.cpu.tile_products import TileProducts
from polyattn.codegen.cpu.tile_values import AFTER, BLOCK, CHOSEN, END, HEAD, PAIRS, SIZES, in_bits
from polyattn.codegen.cpu.units import Fused, Single, Stacked, Unit, units
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import QUERY_TILE
from polyattn.rewriter.planning.plan import Node, in_near_tiles, walk

PAIR_ELEMENTS = 1 << 19
"""Pairs of tokens of near tiles that are computed at a time, so that they stay in the cache."""
HELPERS = '''
def side_by_side(shape, *parts):
    """Columns of several values, each broadcast to the shape; a value without columns is one."""
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
'''


class TileWriter(TileProducts):
    """The parts of an emitted file of a specification in tiles."""

    parameters: ClassVar[str] = "inputs, scalars, block, choose"
    """What the emitted function ``run`` takes."""

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.reads = [(name, n) for name, n in spec.names if name in spec.reads]
        self.outputs = {name: n for loop in spec.loops for name, n in loop.stores}
        made = units({**dict(self.reads), **self.outputs})
        self.uses = dict.fromkeys([*self.outputs.values(), *(n for _, n in self.reads)], 2)
        for unit in made:
            for n in unit.needs:
                self.uses[n] = self.uses.get(n, 0) + 1
        singles = {unit.node for unit in made if isinstance(unit, Single)}
        read = {unit.node.args[0] for unit in made if isinstance(unit, Single) and unit.node.attr == "exp"}
        alone = {n for n in read if self.uses[n] == 1}
        self.exponents = {unit.node for unit in made if isinstance(unit, Stacked)} & alone
        for n in singles:
            if n.op == "sum" and len(n.args) == 1 and n.attr[0][0] != 1 and self._takes_factor(n.args[0], singles):
                self.factors[n.args[0]] = number(n.attr[0][0])
                if n in alone:
                    self.exponents.add(n)
                    self.factors[n.args[0]] = in_bits(number(n.attr[0][0]))
        self._write(made)

    def _takes_factor(self, n: Node, singles: set[Node]) -> bool:
        """Whether a value is a product by itself, read once, whose operands can take its factor."""
        if n.op != "contract" or len(n.args) != 2 or n not in singles or self.uses.get(n, 0) != 1:
            return False
        patterns, result = n.attr
        return bool({x for p in patterns for x in p} - set(result)) and not any(in_near_tiles(a.axes) for a in n.args)

    # -- order -------------------------------------------------------------------------------------------------------

    def _write(self, made: Sequence[Unit]) -> None:
        """All units in order: first what the choice of near pairs reads, then the choice, then the others."""
        waiting = {n for _, n in self.reads}
        for unit in made:
            if waiting and any(n.op == "mask" or (n.op == "input" and str(n.attr) in CHOSEN) for n in unit.makes):
                raise EmitError(f"the choice of near pairs reads what waits for {unit.makes[0]}")
            self._unit(unit)
            if waiting:
                waiting -= set(unit.makes)
                if not waiting:
                    self._choose()
        self._stores()

    def _choose(self) -> None:
        read = ", ".join(f'"{name}": {self.values[n].name}' for name, n in self.reads)
        self.lines[BLOCK] += [
            f"chosen = choose(h, tiles, {{{read}}})",
            'near, hidden = chosen["M_near"], ~chosen["M_far"]',
            "off = Q.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(Q.dtype).min / 2)",
        ]

    def _stores(self) -> None:
        for name, n in self.outputs.items():
            value = self.values[n]
            if value.place in (BLOCK, AFTER):
                self.lines[AFTER].append(f'outputs["{name}"][h, tiles] = {value.name}')
            else:
                self.lines[END].append(f'outputs["{name}"][h] = {value.name}')

    def _unit(self, unit: Unit) -> None:
        if isinstance(unit, Stacked):
            self._stacked(unit)
        elif isinstance(unit, Fused):
            self._fused(unit)
        else:
            self._single(unit.node)

    def _globals(self) -> list[str]:
        """Constants and helpers of the file."""
        return [f"PAIR_ELEMENTS = {PAIR_ELEMENTS}", f"LOG2E = {math.log2(math.e)!r}", "", HELPERS]

    def _first(self) -> list[str]:
        """Lines for what is computed from sizes alone."""
        return ["step = max(1, PAIR_ELEMENTS // (T_q * T_k))"]

    # -- the file ----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """The emitted file."""
        spec = self.spec
        assert spec.rule is not None
        named = [name for name in spec.inputs if name not in self.chosen]
        cost = textwrap.fill(f"FLOPs per head: {spec.cost()}", 118, break_long_words=False)
        head = [
            f'"""{spec.name} of attention, {spec.rule.title}, {spec.mask.title}: {", ".join(self.outputs)}.',
            "",
            "Tokens are in tiles: queries [H, A, T_q, ·], keys and values [H, B, T_k, ·]; inputs are "
            + ", ".join(named)
            + ".",
            "choose(head, tiles, values) says which pairs of tiles are near, and yields "
            + (", ".join(sorted(self.chosen)) or "nothing else")
            + " where they are no inputs.",
            spec.rule.inputs_note,
            "",
            cost,
            '"""',
            "",
            "import torch",
            "",
            *self._globals(),
            "",
            "@torch.no_grad()",
            f"def run({self.parameters}):",
            '    """Outputs by name, [H, tiles, ...]."""',
        ]
        body = [f'{name} = scalars["{name}"]' for name in _symbols(self.outputs.values())]
        body += [
            'Q, K = inputs["Q"], inputs["K"]',
            "H, A, T_q, d = Q.shape",
            '_, B, T_k, e = inputs["V"].shape',
            "one, all_tiles = Q.new_ones(1), A",
            *self._first(),
            "outputs = {}",
        ]
        for name, n in self.outputs.items():
            body.append(f'outputs["{name}"] = Q.new_empty({_wide(n)})')
        body.append("for h in range(H):")
        body += _in(1, self.lines[HEAD]) + _in(1, self.before)
        body += _in(1, ["for at in range(0, all_tiles, block):"])
        block = ["tiles = slice(at, min(at + block, all_tiles))", "A = tiles.stop - tiles.start", *self.lines[BLOCK]]
        if self.lines[PAIRS]:
            block += ["rows, columns = near.nonzero(as_tuple=True)", *self.zeros]
            block += ["for p in range(0, len(rows), step):"]
            block += _in(1, ["a, b = rows[p : p + step], columns[p : p + step]", *self.lines[PAIRS]])
        block += self.lines[AFTER]
        body += _in(2, block) + _in(1, self.lines[END])
        body.append("return outputs")
        return "\n".join([*head, *_in(1, body)]) + "\n"


def _in(depth: int, lines: Sequence[str]) -> list[str]:
    return ["    " * depth + line for line in lines]


def _wide(n: Node) -> str:
    """The shape of an output, as Python."""
    names: dict[Kind, str] = {**SIZES, QUERY_TILE: "all_tiles"}
    return ", ".join(["H", *(names[kind] for kind in n.axes)])


def _symbols(roots: Iterable[Node]) -> list[str]:
    """Names of the symbols in the coefficients of what outputs need."""
    coefficients = (c for n in walk(roots) if n.op == "sum" for c in n.attr[0])
    return sorted({s.name for c in coefficients for s in sympy.sympify(c).free_symbols})
