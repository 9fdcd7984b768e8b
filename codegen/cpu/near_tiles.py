"""Python source of a specification in tiles for CPUs: torch calls, head by head, over blocks of tiles of queries.

Values over pairs of places are computed for lists of near pairs of tiles, some at a time: tiles are gathered, multiplied
as batches of matrices, and what is summed over keys or queries is added at its tile. All else is dense.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sympy

from polyattn.codegen.cpu.layout import number
from polyattn.codegen.cpu.units import Fused, Part, Single, Stacked, Unit, units
from polyattn.codegen.phases import of_pairs, reduces_queries
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
HELPERS = '''
def side_by_side(shape, *parts):
    """Columns of several values, each broadcast to the shape; a value without columns is one."""
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
'''


@dataclass(frozen=True)
class Value:
    """A value in the emitted file: its variable, and its axes in order; None is the axis of near pairs."""

    name: str
    axes: tuple[Kind | None, ...]
    place: int
    owned: bool = True
    """Whether it has memory of its own, which an operation may write into."""


@dataclass
class Lines:
    """Lines of one place of the file."""

    lines: list[str] = field(default_factory=list)


class TileWriter:
    """The parts of an emitted file of a specification in tiles."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.lines: list[list[str]] = [[] for _ in range(5)]
        self.before: list[str] = []
        """Sums over tiles of queries, as memory."""
        self.zeros: list[str] = []
        """Sums over near pairs of a block, as memory."""
        self.values: dict[Node, Value] = {}
        self.names = {n: label for label, n in reversed(spec.names)}
        self.taken: set[str] = set("h at near far tiles rows columns a b d e p s H A B T_q T_k step one chosen".split())
        self.stacks: dict[str, Value] = {}
        self.masked: set[Node] = set()
        self.hidden: set[Node] = set()
        """Exponentials in which the far mask is part of the exponent."""
        self.reads = [(name, n) for name, n in spec.names if name in spec.reads]
        outputs = {name: n for loop in spec.loops for name, n in loop.stores}
        self.outputs = outputs
        made = units({**dict(self.reads), **outputs})
        self.uses: dict[Node, int] = {n: 2 for n in [*outputs.values(), *(n for _, n in self.reads)]}
        for unit in made:
            for n in unit.needs:
                self.uses[n] = self.uses.get(n, 0) + 1
        self.factors: dict[Node, str] = {}
        """Products that nothing reads but their own multiple, by the factor."""
        singles = {unit.node for unit in made if isinstance(unit, Single)}
        for n in singles:
            if n.op == "sum" and len(n.args) == 1 and n.attr[0][0] != 1 and self._takes_factor(n.args[0], singles):
                self.factors[n.args[0]] = number(n.attr[0][0])
        self.chosen: set[str] = set()
        self._write(made)

    def _takes_factor(self, n: Node, singles: set[Node]) -> bool:
        """Whether a value is a product by itself, read once, whose operands can take its factor."""
        if n.op != "contract" or len(n.args) != 2 or n not in singles or self.uses.get(n, 0) != 1:
            return False
        patterns, result = n.attr
        return bool({x for p in patterns for x in p} - set(result)) and not any(of_pairs(a) for a in n.args)

    # -- order -------------------------------------------------------------------------------------------------------

    def _write(self, made: Sequence[Unit]) -> None:
        waiting = {n for _, n in self.reads}
        pending: list[Unit] = []
        done: set[Node] = set()

        def ready(unit: Unit) -> bool:
            return all(n in done for n in unit.needs)

        for unit in made:
            late = isinstance(unit, Single) and (
                unit.node.op == "mask" or (unit.node.op == "input" and str(unit.node.attr) in CHOSEN)
            )
            if (late and waiting) or not ready(unit):
                pending.append(unit)
                continue
            self._unit(unit)
            done.update(unit.makes)
            waiting -= set(unit.makes)
            if not waiting and late is False and unit.makes and not self._called:
                self._choose()
                for held in pending:
                    self._unit(held)
                    done.update(held.makes)
                pending = []
        if pending:
            raise EmitError(f"the choice of near pairs waits for {pending[0]}")
        self._stores()

    _called = False

    def _choose(self) -> None:
        self._called = True
        read = ", ".join(f'"{name}": {self.values[n].name}' for name, n in self.reads)
        self.lines[BLOCK] += [
            f"chosen = choose(h, tiles, {{{read}}})",
            'near, hidden = chosen["M_near"], ~chosen["M_far"]',
            "off = Q.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(Q.dtype).min / 2)",
        ]
        self.taken |= {"off"}

    def _stores(self) -> None:
        for name, n in self.outputs.items():
            value = self.values[n]
            if value.place in (BLOCK, AFTER):
                self.lines[AFTER].append(f'outputs["{name}"][h, tiles] = {value.name}')
            else:
                self.lines[END].append(f'outputs["{name}"][h] = {value.name}')

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

    def _unit(self, unit: Unit) -> None:
        if isinstance(unit, Stacked):
            self._stacked(unit)
        elif isinstance(unit, Fused):
            self._fused(unit)
        else:
            self._single(unit.node)

    def _place(self, needs: Sequence[Node]) -> int:
        """Where what reads some values is computed."""
        return max([HEAD, *(self.values[n].place for n in needs)])

    def _sized(self, axes: Sequence[Kind | None]) -> str:
        """A shape as Python; the number of pairs is that of the rows at hand."""
        return ", ".join("len(a)" if kind is None else SIZES[kind] for kind in axes)

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
        self._set(n, f"{value.name}.{n.attr}{suffix}()", value.place, value.axes)

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
        present = [p for p in order if p is not None]
        if present != sorted(present):
            code = f"{code}.permute({', '.join(map(str, present))})"
        if None in order:
            code += f"[{', '.join('None' if p is None else ':' for p in order)}]"
        return code

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
        if any(a.op == "mask" for a, _, _ in parts):
            ((a, code, _),) = [part for part in parts if part[0].op != "mask"]
            if a in self.hidden:
                self._set(n, code, place, axes, self.values[a].owned)
                return
            ((_, hidden, _),) = [part for part in parts if part[0].op == "mask"]
            ((a, code, whole),) = [part for part in parts if part[0].op != "mask"]
            if not whole:
                raise EmitError(f"a mask wider than what it hides: {n}")
            suffix = "_" if self._may_overwrite(a) else ""
            self._set(n, f"{code}.masked_fill{suffix}({hidden}, 0)", place, axes)
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

    # -- products ----------------------------------------------------------------------------------------------------

    def _operand(
        self, parts: Sequence[tuple[Node | None, tuple[int, ...], str]], axes: Sequence[int], kinds: Sequence[Kind]
    ) -> Value:
        """Values side by side: over some axes of a sum, then their columns.

        Args:
            parts: a value (None: ones), the places of its axes in the sum, −1 for its columns, and its coefficient.
            axes: which axes of the sum, in order; ``kinds`` are theirs.
        """
        codes = []
        for n, places, factor in parts:
            if n is not None and n.op == "mask":
                codes.append("off[:, :, None]")
                continue
            if n is None:
                codes.append("one" if factor == "1" else f"{factor} * one")
                continue
            order = [places.index(p) if p in places else None for p in axes]
            order += [places.index(-1) if -1 in places else None]
            present = [p for p in order if p is not None]
            code = self.values[n].name
            if present != sorted(present):
                code = f"{code}.permute({', '.join(map(str, present))})"
            if None in order:
                code += f"[{', '.join('None' if p is None else ':' for p in order)}]"
            codes.append(code if factor == "1" else f"{factor} * {code}")
        place = self._place([n for n, _, _ in parts if n is not None])
        full = len(parts) == 1 and set(axes) <= set(parts[0][1])
        text = codes[0] if full else f"side_by_side(({self._sized(kinds)},), {', '.join(codes)})"
        if text.isidentifier():
            return Value(text, (*kinds, None), place, owned=False)
        if text not in self.stacks:
            name = self._fresh("operand")
            self.lines[place].append(f"{name} = {text}")
            self.stacks[text] = Value(name, (*kinds, None), place, owned=False)
        return self.stacks[text]

    def _stacked(self, unit: Stacked) -> None:
        n = unit.node
        pairs = of_pairs(n)
        if any(part.hidden for part in unit.parts):
            self.masked.add(n)

        def sign(part: Part) -> tuple[str, str]:
            """Coefficients of the left and right operands: on the one that there is, and on queries rather than keys."""
            factor = number(part.coefficient)
            return (factor, "1") if part.left is not None else ("1", factor)

        sides = []
        for which, own in ((0, unit.rows), (1, unit.columns)):
            axes = (*unit.batch, *own)
            used = axes
            if pairs:  # tiles are gathered: the batch is their list
                used = tuple(p for p in axes if n.axes[p] in _of_side(n, own))
            parts = [
                ((part.left, part.left_axes), (part.right, part.right_axes))[which] + (sign(part)[which],)
                for part in unit.parts
            ]
            sides.append((self._operand(parts, used, [n.axes[p] for p in used]), used))
        letters = {p: LETTERS[p] for p in range(len(n.axes))}
        texts, codes = [], []
        for operand, used in sides:
            if pairs:
                tile = next(n.axes[p] for p in used if n.axes[p] in (QUERY_TILE, KEY_TILE))
                codes.append(f"{operand.name}.index_select(0, {'a' if tile == QUERY_TILE else 'b'})")
                texts.append("P" + "".join(letters[p] for p in used if n.axes[p] != tile) + "K")
            else:
                codes.append(operand.name)
                texts.append("".join(letters[p] for p in used) + "K")
        out = "".join(letters[p] for p, kind in enumerate(n.axes) if not pairs or kind in (QUERY_PLACE, KEY_PLACE))
        place = max(PAIRS if pairs else HEAD, *(operand.place for operand, _ in sides))
        axes = self._pair_axes(n.axes) if pairs else n.axes
        result = ("P" if pairs else "") + out
        self._set(n, f'torch.einsum("{texts[0]}, {texts[1]} -> {result}", {", ".join(codes)})', place, axes)

    def _fused(self, unit: Fused) -> None:
        value = self.values[unit.operand]
        if value.axes[:1] == (None,):
            return self._pair_products(unit.nodes, unit.operand, unit.partners, unit.reduced)
        n = unit.operand
        own = {p: LETTERS[p] for p in range(len(n.axes))}
        axes = (*unit.batch, *unit.reduced)
        kinds = [n.axes[p] for p in axes]
        parts = []
        for made, partner in zip(unit.nodes, unit.partners, strict=True):
            parts.append((partner, () if partner is None else _places(made, n, partner), "1"))
        operand = self._operand(parts, axes, kinds)
        place = max(value.place, operand.place)
        left = "".join(own.values())
        right = "".join(own[p] for p in axes) + "K"
        kept = [p for p in own if p not in unit.reduced]
        together = f'torch.einsum("{left}, {right} -> {"".join(own[p] for p in kept)}K", {value.name}, {operand.name})'
        name = self._fresh("together")
        self.lines[place].append(f"{name} = {together}")
        at = "0"
        for made, partner in zip(unit.nodes, unit.partners, strict=True):
            free = [] if partner is None else [x for x in partner.axes if x not in n.axes]
            width = f"{at} + {self._width(partner, n)}" if free else ""
            code = f"{name}[..., {at} : {width}]" if free else f"{name}[..., {at}]"
            produced: list[Kind] = [n.axes[p] for p in kept] + free
            order = [produced.index(kind) for kind in made.axes]
            if order != sorted(order):
                code += f".permute({', '.join(map(str, order))})"
            self._result(made, code, place)
            at = width or f"{at} + 1"
        return None

    def _pair_product(self, n: Node) -> None:
        sizes = [of_pairs(a) or self.values[a].axes[:1] == (None,) for a in n.args]
        at = sizes.index(True)
        patterns, result = n.attr
        reduced = tuple(p for p, x in enumerate(patterns[at]) if x not in result)
        partner = n.args[1 - at] if len(n.args) == 2 else None
        self._pair_products((n,), n.args[at], (partner,), reduced)

    def _pair_products(
        self, made: Sequence[Node], operand: Node, partners: Sequence[Node | None], reduced: Sequence[int]
    ) -> None:
        """Sums over near pairs and the places of one side, added at the tiles of the other."""
        kinds = {operand.axes[p] for p in reduced}
        if kinds == {KEY_TILE, KEY_PLACE}:
            place_gone, index, tile, place = "KEY", "a", QUERY_TILE, QUERY_PLACE
        elif kinds == {QUERY_TILE, QUERY_PLACE}:
            place_gone, index, tile, place = "QUERY", "b", KEY_TILE, KEY_PLACE
        else:
            raise EmitError(f"a sum over {kinds} of near pairs")
        summed = KEY_PLACE if place_gone == "KEY" else QUERY_PLACE
        value = self.values[operand]
        letters = {QUERY_PLACE: "i", KEY_PLACE: "j"}
        parts: list[tuple[Node | None, tuple[int, ...], str]] = []
        other = KEY_TILE if tile == QUERY_TILE else QUERY_TILE
        for partner in partners:
            if partner is None:
                parts.append((None, (), "1"))
            else:
                parts.append((partner, tuple({other: 0, summed: 1}.get(kind, -1) for kind in partner.axes), "1"))
        stack = self._operand(parts, (0, 1), (other, summed))
        left = "P" + "".join(letters[k] for k in value.axes[1:] if k is not None)
        gathered = f"{stack.name}.index_select(0, {'b' if index == 'a' else 'a'})"
        code = f'torch.einsum("{left}, P{letters[summed]}K -> P{letters[place]}K", {value.name}, {gathered})'
        sums = self._fresh("sums")
        widths = " + ".join(self._width(p, operand) for p in partners)
        memory = f"{sums} = Q.new_zeros({SIZES[tile]}, {SIZES[place]}, {widths})"
        (self.zeros if tile == QUERY_TILE else self.before).append(memory)
        self.lines[PAIRS].append(f"{sums}.index_add_(0, {index}, {code})")
        at = "0"
        where = AFTER if tile == QUERY_TILE else END
        for n, partner in zip(made, partners, strict=True):
            free = [] if partner is None else _free(partner, operand)
            width = f"{at} + {self._width(partner, operand)}" if free else ""
            code = f"{sums}[..., {at} : {width}]" if free else f"{sums}[..., {at}]"
            produced = [tile, place, *(partner.axes[p] for p in free if partner is not None)]
            order = [produced.index(kind) for kind in n.axes]
            if order != sorted(order):
                code += f".permute({', '.join(map(str, order))})"
            name = self._name(n)
            self.lines[where].append(f"{name} = {code}")
            self.values[n] = Value(name, n.axes, where, owned=False)
            at = width or f"{at} + 1"

    @staticmethod
    def _width(partner: Node | None, operand: Node) -> str:
        """How many columns a partner of an operand has."""
        free = [] if partner is None else _free(partner, operand)
        return SIZES[partner.axes[free[0]]] if free and partner is not None else "1"

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
            f"PAIR_ELEMENTS = {PAIR_ELEMENTS}",
            "",
            HELPERS,
            "",
            "@torch.no_grad()",
            "def run(inputs, scalars, block, choose):",
            '    """Outputs by name, [H, tiles, ...]."""',
        ]
        symbols = sorted({s.name for _, c in _coefficients(self.outputs.values()) for s in sympy.sympify(c).free_symbols})
        body = [f'{name} = scalars["{name}"]' for name in symbols]
        body += [
            'Q, K = inputs["Q"], inputs["K"]',
            "H, A, T_q, d = Q.shape",
            '_, B, T_k, e = inputs["V"].shape',
            "one, all_tiles = Q.new_ones(1), A",
            "step = max(1, PAIR_ELEMENTS // (T_q * T_k))",
            "outputs = {}",
        ]
        for name, n in self.outputs.items():
            source, wide = _like(name, n)
            body.append(f'outputs["{name}"] = {source}.new_empty({wide})')
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


PAIR_ELEMENTS = 1 << 18
"""Pairs of tokens of near tiles that are computed at a time, so that they stay in the cache."""
CHOSEN = ("SHIFT", "TOP")
"""Inputs that the choice of near pairs may yield."""


def _in(depth: int, lines: Sequence[str]) -> list[str]:
    return ["    " * depth + line for line in lines]


def _like(name: str, n: Node) -> tuple[str, str]:
    """The tensor whose dtype an output has, and the output's shape, as Python."""
    names: dict[Kind, str] = {QUERY_TILE: "all_tiles", QUERY_PLACE: "T_q", KEY_TILE: "B", KEY_PLACE: "T_k"}
    wide = ["H"]
    for kind in n.axes:
        wide.append(names.get(kind) or SIZES[kind])
    return "Q", ", ".join(wide)


def _coefficients(roots: object) -> list[tuple[Node, object]]:
    from polyattn.rewriter.planning.plan import walk

    assert hasattr(roots, "__iter__")
    return [(n, c) for n in walk(roots) if n.op == "sum" for c in n.attr[0]]


def _of_side(n: Node, own: Sequence[int]) -> set[Kind]:
    """Tile and place of the side that some axes of a value over pairs of places are of."""
    kinds = {n.axes[p] for p in own}
    return {QUERY_TILE, QUERY_PLACE} if QUERY_PLACE in kinds else {KEY_TILE, KEY_PLACE}


def _places(n: Node, operand: Node, partner: Node) -> tuple[int, ...]:
    """The places of a partner's axes among those of the operand; −1 for one that the operand does not have."""
    patterns, _ = n.attr
    at = n.args.index(operand)
    own, other = patterns[at], patterns[1 - at]
    return tuple(own.index(x) if x in own else -1 for x in other)


def _free(partner: Node, operand: Node) -> list[int]:
    """Which axes of a partner the operand does not have."""
    return [p for p, kind in enumerate(partner.axes) if kind not in operand.axes]


Emitted = Callable[..., dict[str, object]]
