"""Matrix products of an emitted file in tiles: stacked ones, ones that share an operand, sums over near pairs."""

from __future__ import annotations

from collections.abc import Sequence

from polyattn.codegen.cpu.layout import number
from polyattn.codegen.cpu.tile_values import (
    AFTER,
    END,
    HEAD,
    LETTERS,
    PAIRS,
    SIZES,
    TileValues,
    Value,
    arranged,
    in_bits,
)
from polyattn.codegen.cpu.units import Fused, Part, Stacked
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.planning.plan import Node, in_near_tiles


class TileProducts(TileValues):
    """Products of one specification as they are computed."""

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.stacks: dict[str, Value] = {}
        """Operands by the expressions that make them."""

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
            code = arranged(self.values[n].name, order)
            codes.append(code if factor == "1" else f"{factor} * {code}")
        place = self._place([n for n, _, _ in parts if n is not None])
        full = len(parts) == 1 and set(axes) <= set(parts[0][1])
        text = codes[0] if full else f"side_by_side(({', '.join(SIZES[kind] for kind in kinds)},), {', '.join(codes)})"
        if text.isidentifier():
            return Value(text, (*kinds, None), place, owned=False)
        if text not in self.stacks:
            name = self._fresh("operand")
            self.lines[place].append(f"{name} = {text}")
            self.stacks[text] = Value(name, (*kinds, None), place, owned=False)
        return self.stacks[text]

    def _stacked(self, unit: Stacked) -> None:
        n = unit.node
        pairs = in_near_tiles(n.axes)
        if any(part.hidden for part in unit.parts):
            self.masked.add(n)

        def sign(part: Part) -> tuple[str, str]:
            """Coefficients of the left and right operands: on the one that there is, on queries rather than keys."""
            factor = number(part.coefficient)
            if n in self.exponents:
                factor = in_bits(factor)
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
        made: tuple[Kind | None, ...] = self._pair_axes(n.axes) if pairs else n.axes
        result = ("P" if pairs else "") + out
        self._set(n, f'torch.einsum("{texts[0]}, {texts[1]} -> {result}", {", ".join(codes)})', place, made)

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
        sizes = [in_near_tiles(a.axes) or self.values[a].axes[:1] == (None,) for a in n.args]
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
