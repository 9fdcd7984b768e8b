"""Values of an emitted file in tiles: their names and axes, views of them, sums and elementwise products."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from polyattn.codegen.cpu.layout import number
from polyattn.codegen.phases import reduces_queries
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import HEAD as HEAD_DIM
from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE, QUERY_PLACE, QUERY_TILE, VALUE
from polyattn.rewriter.planning.plan import Node

HEAD, BLOCK, PAIRS, AFTER, END = range(5)
"""Where a line stands: before the loop over tiles of queries, in it, in the loop over near pairs inside it, after that,
and after the loop over tiles of queries."""
ORDER = (QUERY_TILE, QUERY_PLACE, KEY_TILE, KEY_PLACE, HEAD_DIM, VALUE)
"""How products lie in memory."""
LETTERS = "uvwxyzabcdefghlmnopqrst"
SIZES = {QUERY_TILE: "A", QUERY_PLACE: "T_q", KEY_TILE: "B", KEY_PLACE: "T_k", HEAD_DIM: "d", VALUE: "e"}
RESERVED = {
    *("h", "at", "near", "far", "off", "hidden", "tiles", "rows", "columns", "a", "b", "d", "e", "p", "s"),
    *("H", "A", "B", "T_q", "T_k", "step", "one", "chosen", "all_tiles", "inputs", "outputs", "block", "choose"),
}
"""Variables that every file has."""
CHOSEN = ("SHIFT", "TOP")
"""Inputs that the choice of near pairs may yield."""


def arranged(code: str, order: Sequence[int | None]) -> str:
    """A value with its axes in an order, None for an axis of size one that it does not have."""
    present = [p for p in order if p is not None]
    if present != sorted(present):
        code = f"{code}.permute({', '.join(map(str, present))})"
    if None in order:
        code += f"[{', '.join('None' if p is None else ':' for p in order)}]"
    return code


def in_bits(factor: str) -> str:
    """A factor of an exponent, as Python, for an exponential to the base 2."""
    plain = factor.replace(".", "").lstrip("-").isalnum()
    return "LOG2E" if factor == "1" else f"{factor} * LOG2E" if plain else f"({factor}) * LOG2E"


@dataclass(frozen=True)
class Value:
    """A value in the emitted file: its variable, and its axes in order; None is the axis of near pairs."""

    name: str
    axes: tuple[Kind | None, ...]
    place: int
    owned: bool = True
    """Whether it has memory of its own, which an operation may write into."""


class TileValues:
    """Values of one specification as they are computed."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.lines: list[list[str]] = [[] for _ in range(5)]
        self.before: list[str] = []
        """Sums over tiles of queries, as memory."""
        self.zeros: list[str] = []
        """Sums over near pairs of a block, as memory."""
        self.values: dict[Node, Value] = {}
        self.names = {n: label for label, n in reversed(spec.names)}
        self.taken: set[str] = set(RESERVED)
        self.masked: set[Node] = set()
        self.hidden: set[Node] = set()
        """Exponentials in which the far mask is part of the exponent."""
        self.uses: dict[Node, int] = {}
        """How many units read a value."""
        self.factors: dict[Node, str] = {}
        """Products that nothing reads but their own multiple, by the factor."""
        self.exponents: set[Node] = set()
        """Products of which nothing but exp is read: in units of log 2, as torch's exp2 is three times as fast."""
        self.chosen: set[str] = set()
        """Inputs that the choice of near pairs may yield, of those that there are."""

    # -- values ------------------------------------------------------------------------------------------------------

    def _name(self, n: Node) -> str:
        base = self.names.get(n) or (str(n.attr) if n.op == "input" else f"t_{len(self.taken)}")
        name = re.sub(r"\W", "_", base)
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _fresh(self, base: str) -> str:
        number, name = 1, base
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        return name

    def _place(self, needs: Sequence[Node]) -> int:
        """Where what reads some values is computed."""
        return max([HEAD, *(self.values[n].place for n in needs)])

    def _single(self, n: Node) -> None:
        if n.op == "input":
            return self._input(n)
        if n.op == "mask":
            self.values[n] = Value("near" if n.attr == "near" else "hidden", n.axes, BLOCK, owned=False)
            return None
        if n.op == "map":
            return self._map(n)
        if n.op == "sum":
            return self._sum(n)
        if n.op == "contract":
            return self._contract(n)
        raise EmitError(f"the CPU target has no code in tiles for {n.op}")

    def _input(self, n: Node) -> None:
        name, of_queries = str(n.attr), QUERY_TILE in n.axes
        variable = self._name(n)
        if name in CHOSEN:
            self.chosen.add(name)
            source = f'chosen["{name}"] if "{name}" in chosen else inputs["{name}"][h, tiles]'
        else:
            source = f'inputs["{name}"][h, tiles]' if of_queries else f'inputs["{name}"][h]'
        place = BLOCK if of_queries else HEAD
        self.lines[place].append(f"{variable} = {source}")
        self.values[n] = Value(variable, n.axes, place, owned=False)

    def _set(self, n: Node, code: str, place: int, axes: tuple[Kind | None, ...], owned: bool = True) -> None:
        """A line that computes a value; none where it is another one as it stands."""
        if code.isidentifier():
            self.values[n] = Value(code, axes, place, owned)
            return
        name = self._name(n)
        self.lines[place].append(f"{name} = {code}")
        self.values[n] = Value(name, axes, place, owned)

    def _may_overwrite(self, n: Node) -> bool:
        return self.values[n].owned and self.uses.get(n, 0) == 1

    def _map(self, n: Node) -> None:
        (a,) = n.args
        value = self.values[a]
        if a in self.masked:
            self.hidden.add(n)
        suffix = "_" if self._may_overwrite(a) else ""
        function = "exp2" if a in self.exponents else n.attr
        self._set(n, f"{value.name}.{function}{suffix}()", value.place, value.axes)

    # -- views -------------------------------------------------------------------------------------------------------

    def _on_pairs(self, n: Node) -> tuple[str, tuple[Kind | None, ...]]:
        """A value for the near pairs at hand, as an expression, and its axes."""
        value = self.values[n]
        if value.axes and value.axes[0] is None:
            return value.name, value.axes
        tiles = [kind for kind in value.axes if kind in (QUERY_TILE, KEY_TILE)]
        code = value.name
        rest = tuple(kind for kind in value.axes if kind not in tiles)
        if value.axes[: len(tiles)] != tuple(tiles):
            order = [value.axes.index(kind) for kind in (*tiles, *rest)]
            code = f"{code}.permute({', '.join(map(str, order))})"
        if not tiles:
            return code, value.axes
        if len(tiles) == 2:
            return f"{code}[a, b]", (None, *rest)
        return f"{code}.index_select(0, {'a' if tiles == [QUERY_TILE] else 'b'})", (None, *rest)

    def _aligned(self, n: Node, place: int, order: Sequence[int | None], axes: tuple[Kind, ...]) -> str:
        """A value as an expression over the axes of a sum or product that reads its axes in an order."""
        if place == PAIRS:
            code, held = self._on_pairs(n)
            target: list[Kind | None] = [None, *(k for k in axes if k not in (QUERY_TILE, KEY_TILE))]
            order = [held.index(k) if k in held else None for k in target]
            if held[:1] != (None,):
                order[0] = None
        else:
            code = self.values[n].name
        return arranged(code, order)

    def _pair_axes(self, axes: tuple[Kind, ...]) -> tuple[Kind | None, ...]:
        return (None, *(kind for kind in axes if kind not in (QUERY_TILE, KEY_TILE)))

    # -- sums and elementwise products -------------------------------------------------------------------------------

    def _sum(self, n: Node) -> None:
        coefficients, orders = n.attr
        if len(n.args) == 1 and n.args[0] in self.factors:
            coefficients = (1,)
        place = self._place(n.args)
        axes: tuple[Kind | None, ...] = self._pair_axes(n.axes) if place == PAIRS else n.axes
        text = ""
        for c, order, a in zip(coefficients, orders, n.args, strict=True):
            part = self._aligned(a, place, order, n.axes)
            negative = c.could_extract_minus_sign() if isinstance(c, sympy.Expr) else c < 0
            factor = number(-c if negative else c)
            part = part if factor == "1" else f"{factor} * {part}"
            text += (" - " if negative else " + ") + part if text else ("-" if negative else "") + part
        alone = len(n.args) == 1
        owned = not (alone and coefficients[0] == 1)
        if not owned:
            value = self.values[n.args[0]]
            owned = value.owned and self.uses.get(n.args[0], 0) == 1
        self._set(n, text, place, axes, owned)

    def _contract(self, n: Node) -> None:
        patterns, result = n.attr
        reduced = {x for p in patterns for x in p} - set(result)
        if not reduced:
            return self._multiply(n)
        place = self._place(n.args)
        if place == PAIRS:
            return self._pair_product(n)
        letters = {x: LETTERS[x] for p in patterns for x in p}
        sides = ["".join(letters[x] for x in p) for p in patterns]
        names = ", ".join(self.values[a].name for a in n.args)
        if len(n.args) == 2:
            names = ", ".join(self._scaled(a, n) for a in n.args)
            kept = sorted(range(len(result)), key=lambda at: (ORDER.index(n.axes[at]), at))
            code = f'torch.einsum("{", ".join(sides)} -> {"".join(letters[result[at]] for at in kept)}", {names})'
            if kept != sorted(kept):
                code += f".permute({', '.join(str(kept.index(at)) for at in range(len(kept)))})"
        else:
            code = f'torch.einsum("{", ".join(sides)} -> {"".join(letters[x] for x in result)}", {names})'
            dims = [at for at, x in enumerate(patterns[0]) if x not in result]
            kept = [x for x in patterns[0] if x in result]
            if kept == list(result):
                code = f"{names}.sum({tuple(dims) if len(dims) > 1 else dims[0]})"
        self._result(n, code, place)
        return None

    def _scaled(self, a: Node, product: Node) -> str:
        """An operand of a product; the smaller one takes the factor that the product is multiplied by."""
        factor = self.factors.get(product)
        small = min(product.args, key=lambda x: (len(x.axes), product.args.index(x)))
        return f"{factor} * {self.values[a].name}" if factor is not None and a is small else self.values[a].name

    def _result(self, n: Node, code: str, place: int) -> None:
        """A product's value, or what a block adds to a sum over tiles of queries."""
        if not reduces_queries(n):
            self._set(n, code, place, n.axes)
            return
        name = self._name(n)
        self.before.append(f"{name} = 0")
        self.lines[place].append(f"{name} = {name} + {code}")
        self.values[n] = Value(name, n.axes, END)

    def _multiply(self, n: Node) -> None:
        patterns, result = n.attr
        place = self._place(n.args)
        masks = [a for a in n.args if a.op == "mask"]
        if any(m.attr == "near" for m in masks):
            place = max(place, PAIRS)
        axes: tuple[Kind | None, ...] = self._pair_axes(n.axes) if place == PAIRS else n.axes
        parts = []
        for a, pattern in zip(n.args, patterns, strict=True):
            order = [pattern.index(x) if x in pattern else None for x in result]
            if a.op == "mask" and a.attr == "near":
                continue  # the list of near pairs is the mask
            parts.append((a, self._aligned(a, place, order, n.axes), None not in order))
        far = [code for a, code, _ in parts if a.op == "mask"]
        if far:
            ((a, code, whole),) = [part for part in parts if part[0].op != "mask"]
            if a in self.hidden:
                self._set(n, code, place, axes, self.values[a].owned)
                return
            if not whole:
                raise EmitError(f"a mask wider than what it hides: {n}")
            suffix = "_" if self._may_overwrite(a) else ""
            self._set(n, f"{code}.masked_fill{suffix}({far[0]}, 0)", place, axes)
            return
        if len(parts) == 1:
            a, code, _ = parts[0]
            self._set(n, code, place, axes, self._may_overwrite(a))
            return
        (x, x_code, x_whole), (y, y_code, y_whole) = parts
        if x is not y and x_whole and self._may_overwrite(x) and self.values[x].place == place:
            self._set(n, f"{x_code}.mul_({y_code})", place, axes)
        elif x is not y and y_whole and self._may_overwrite(y) and self.values[y].place == place:
            self._set(n, f"{y_code}.mul_({x_code})", place, axes)
        else:
            self._set(n, f"{x_code} * {y_code}", place, axes)

    def _pair_product(self, n: Node) -> None:
        """A product of values of near pairs that sums over some of their axes."""
        raise NotImplementedError
