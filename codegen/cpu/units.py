"""What is computed together by the CPU target of programs in tiles: stacked products, products that share an operand.

A matrix product with a few columns more costs next to nothing, passes over memory do. So a sum of products over the
same axes, x yᵀ + u wᵀ + z 1ᵀ, is one product [x, u, z] [y, w, 1]ᵀ, and products of one large operand that sum over the
same axes are one product with their other operands side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import sympy

from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.planning.plan import Node, in_near_tiles, walk

TOKENS_AND_TILES = {QUERY_TILE, QUERY_PLACE, KEY_TILE, KEY_PLACE}


@dataclass(frozen=True)
class Part:
    """One summand of a stacked product: coefficient · left · right; None is a column of ones.

    Axes are numbered by their places in the sum; −1 is summed over. Where ``hidden``, ``right`` is a mask, of which the
    logarithm is meant.
    """

    coefficient: sympy.Expr
    left: Node | None
    left_axes: tuple[int, ...]
    right: Node | None
    right_axes: tuple[int, ...]
    hidden: bool = False


@dataclass(frozen=True)
class Single:
    """One node by itself."""

    node: Node

    @property
    def makes(self) -> tuple[Node, ...]:
        """The nodes that it computes."""
        return (self.node,)

    @property
    def needs(self) -> tuple[Node, ...]:
        """The nodes that it reads."""
        return self.node.args


@dataclass(frozen=True)
class Stacked:
    """A sum of products over the same axes: batch, rows of the left operands, rows of the right ones."""

    node: Node
    parts: tuple[Part, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def makes(self) -> tuple[Node, ...]:
        """See :attr:`Single.makes`."""
        return (self.node,)

    @property
    def needs(self) -> tuple[Node, ...]:
        """See :attr:`Single.needs`."""
        return tuple(n for part in self.parts for n in (part.left, part.right) if n is not None)


@dataclass(frozen=True)
class Fused:
    """Products of one large operand that sum over the same of its axes; a partner None is a column of ones."""

    operand: Node
    nodes: tuple[Node, ...]
    partners: tuple[Node | None, ...]
    reduced: tuple[int, ...]
    """Axes of the operand, by place."""
    batch: tuple[int, ...]
    """Axes of the operand that partners have too and that are not summed over, by place."""

    @property
    def makes(self) -> tuple[Node, ...]:
        """See :attr:`Single.makes`."""
        return self.nodes

    @property
    def needs(self) -> tuple[Node, ...]:
        """See :attr:`Single.needs`."""
        return (self.operand, *(n for n in self.partners if n is not None))


Unit = Single | Stacked | Fused


def units(roots: Mapping[str, Node]) -> list[Unit]:
    """The units that compute some outputs, arguments first."""
    nodes = list(walk(roots.values()))
    users: dict[Node, list[Node]] = {n: [] for n in nodes}
    for n in nodes:
        for a in n.args:
            users[a].append(n)
    outputs = set(roots.values())
    inner = {n for n in nodes if len(users[n]) == 1 and n not in outputs}
    stacked = {n: sum_of for n in nodes if (sum_of := _stacked(n, inner)) is not None}
    for n in nodes:  # exp(x) M = exp(x + log M)
        exponential = next((a for a in n.args if a.op == "map" and a.attr == "exp" and a in inner), None)
        mask = next((a for a in n.args if a.op == "mask" and a.attr == "far"), None)
        if n.op == "contract" and exponential is not None and mask is not None and exponential.args[0] in stacked:
            (logits,) = exponential.args
            if logits in inner and (with_mask := _hide(stacked[logits], mask)) is not None:
                stacked[logits] = with_mask
    absorbed = {a for n in stacked for a in n.args if a in inner and a.op == "contract" and _is_absorbed(a, stacked[n])}
    groups: dict[tuple[Node, tuple[int, ...], tuple[int, ...]], list[tuple[Node, Node | None]]] = {}
    for n in nodes:
        if n in absorbed or n in stacked:
            continue
        key = _group(n)
        if key is not None:
            groups.setdefault(key[:3], []).append((n, key[3]))
    found: dict[Node, Unit] = {}
    for (operand, reduced, batch), members in groups.items():
        if len(members) > 1:
            fused = Fused(operand, tuple(n for n, _ in members), tuple(p for _, p in members), reduced, batch)
            found.update((n, fused) for n in fused.nodes)
    for n in nodes:
        if n not in found and n not in absorbed:
            found[n] = stacked.get(n) or Single(n)
    return list(_ordered(roots.values(), found))


def _hide(unit: Stacked, mask: Node) -> Stacked | None:
    """The unit with the logarithm of a mask added, whose axes are among those of the right operands."""
    axes = tuple(unit.node.axes.index(kind) for kind in mask.axes)
    if set(axes) & set(unit.rows):
        return None
    part = Part(sympy.Integer(1), None, (), mask, axes, hidden=True)
    return replace(unit, parts=(*unit.parts, part))


def _ordered(roots: Iterable[Node], units: Mapping[Node, Unit]) -> Iterator[Unit]:
    done: set[Node] = set()

    def visit(n: Node) -> Iterator[Unit]:
        if n in done:
            return
        unit = units[n]
        for needed in unit.needs:
            yield from visit(needed)
        if n not in done:
            done.update(unit.makes)
            yield unit

    for root in roots:
        yield from visit(root)


def _is_absorbed(n: Node, by: Stacked) -> bool:
    return all(n is not needed for needed in by.needs)


def _large(n: Node) -> bool:
    """Whether a value has three axes of tiles and places: as many elements as there are tokens times tiles."""
    return len(TOKENS_AND_TILES & set(n.axes)) >= 3


def _group(n: Node) -> tuple[Node, tuple[int, ...], tuple[int, ...], Node | None] | None:
    """The large operand of a product, which of its axes it sums over, which it shares with its partner; the partner."""
    if n.op != "contract" or len(n.args) > 2:
        return None
    patterns, result = n.attr
    sizes = [len(TOKENS_AND_TILES & set(a.axes)) for a in n.args]
    at = sizes.index(max(sizes))
    operand, own = n.args[at], patterns[at]
    if not _large(operand):
        return None
    reduced = tuple(p for p, x in enumerate(own) if x not in result)
    if not reduced or (
        operand.axes[reduced[0]] in (QUERY_TILE, KEY_TILE) and in_near_tiles(operand.axes) and len(reduced) < 2
    ):
        return None
    if len(n.args) == 1:
        kept = tuple(p for p, x in enumerate(own) if x in result)
        return (operand, reduced, _usual_batch(operand, reduced, kept), None) if kept else None
    partner, other = n.args[1 - at], patterns[1 - at]
    free = [x for x in other if x not in own]
    if len(free) > 1 or any(own[p] not in other for p in reduced) or any(x not in result for x in free):
        return None
    batch = tuple(p for p, x in enumerate(own) if x in other and x in result)
    return operand, reduced, batch, partner


def _usual_batch(operand: Node, reduced: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, ...]:
    """The batch that products with this operand have, which a sum of it alone joins: the tile of what is summed over,
    and for a sum over tiles the other tile."""
    kinds = {operand.axes[p] for p in reduced}
    tile = {
        frozenset({KEY_PLACE}): KEY_TILE,
        frozenset({QUERY_PLACE}): QUERY_TILE,
        frozenset({KEY_TILE}): QUERY_TILE,
        frozenset({QUERY_TILE}): KEY_TILE,
    }.get(frozenset(kinds))
    return tuple(p for p in kept if operand.axes[p] == tile)


def _stacked(n: Node, inner: set[Node]) -> Stacked | None:
    """A sum whose first product says which of its axes are batch, rows and columns; or None."""
    if n.op != "sum" or len(n.args) < 2 or len(n.axes) < 3 or not set(n.axes) <= TOKENS_AND_TILES:
        return None
    coefficients, orders = n.attr
    for lead, order in zip(n.args, orders, strict=True):
        split = _split(lead, order) if lead in inner else None
        if split is None or None in order:
            continue
        left, right = set(split[1]), set(split[3])
        batch = tuple(p for p in range(len(n.axes)) if p in left and p in right)
        rows = tuple(p for p in range(len(n.axes)) if p in left and p not in right)
        columns = tuple(p for p in range(len(n.axes)) if p in right and p not in left)
        if not rows or not columns:
            continue
        if not {n.axes[p] for p in rows} & {QUERY_TILE, QUERY_PLACE}:
            rows, columns = columns, rows  # queries are the rows
        parts = []
        for a, c, o in zip(n.args, coefficients, orders, strict=True):
            part = _part(a, c, o, set(rows), set(columns), a in inner)
            if part is None:
                break
            parts.append(part)
        else:
            return Stacked(n, tuple(parts), batch, rows, columns)
    return None


def _split(n: Node, order: tuple[int | None, ...]) -> tuple[Node, tuple[int, ...], Node, tuple[int, ...]] | None:
    """The operands of a product with the places of their axes in a sum that reads it in an order; −1: summed over."""
    if n.op != "contract" or len(n.args) != 2 or any(a.op == "mask" for a in n.args):
        return None
    patterns, result = n.attr
    place = {result[axis]: at for at, axis in enumerate(order) if axis is not None}
    sides = [tuple(place.get(x, -1) for x in pattern) for pattern in patterns]
    reduced = [[x for x in pattern if x not in result] for pattern in patterns]
    if len(reduced[0]) > 1 or sorted(reduced[0]) != sorted(reduced[1]):
        return None
    return n.args[0], sides[0], n.args[1], sides[1]


def _part(
    n: Node, c: sympy.Expr, order: tuple[int | None, ...], rows: set[int], columns: set[int], may_open: bool
) -> Part | None:
    split = _split(n, order) if may_open else None
    if split is not None:
        left, left_axes, right, right_axes = split
        if set(left_axes) & columns and set(right_axes) & rows:
            left, left_axes, right, right_axes = right, right_axes, left, left_axes
        if not set(left_axes) & columns and not set(right_axes) & rows:
            return Part(c, left, left_axes, right, right_axes)
    axes = tuple(order.index(axis) for axis in range(len(n.axes)))
    if not set(axes) & columns:
        return Part(c, n, axes, None, ())
    if not set(axes) & rows:
        return Part(c, None, (), n, axes)
    return None
