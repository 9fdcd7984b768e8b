"""Grids of tiles, and which units of a program in tiles are computed in one walk over one of them.

A large value has three axes of tiles and places, or four. It is made tile by tile: rows, and lanes that vectors run
along, for every element of a batch. What is summed over rows or lanes is added up while the tile is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy

from polyattn.codegen.cpu.tile_values import CHOSEN
from polyattn.codegen.cpu.units import TOKENS_AND_TILES, Fused, Part, Single, Stacked, Unit
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.planning.plan import Node


@dataclass(frozen=True)
class Grid:
    """How large values over some axes are walked."""

    title: str
    name: str
    batch: tuple[Kind, ...]
    """The first is the one that threads share."""
    rows: Kind
    lanes: Kind

    @property
    def kinds(self) -> frozenset[Kind]:
        """All axes."""
        return frozenset({*self.batch, self.rows, self.lanes})


NEAR = Grid("near pairs of tiles", "near_pairs", (QUERY_TILE, KEY_TILE), QUERY_PLACE, KEY_PLACE)
KEYS = Grid("tiles of keys", "key_tiles", (KEY_TILE,), QUERY_TILE, KEY_PLACE)
QUERIES = Grid("tiles of queries", "query_tiles", (QUERY_TILE,), KEY_TILE, QUERY_PLACE)
GRIDS = (KEYS, QUERIES, NEAR)
"""In order of preference: what near pairs read is there when they are walked, once."""


def grid_of(n: Node) -> Grid | None:
    """The grid of a large value; None for a value that is not large.

    Raises:
        EmitError: a large value over axes that no grid has.
    """
    kinds = TOKENS_AND_TILES & set(n.axes)
    if len(kinds) < 3:
        return None
    found = next((grid for grid in GRIDS if grid.kinds == kinds), None)
    if found is None or kinds != set(n.axes):
        raise EmitError(f"no grid has the axes of {n}")
    return found


@dataclass(frozen=True)
class Walk:
    """Units that are computed in one walk over a grid."""

    grid: Grid
    units: tuple[Unit, ...]


CHOICE = "choice"
"""The place in an order where near pairs are chosen."""


def _grid(unit: Unit) -> Grid | None:
    """The grid of a unit: that of what it makes, or of what it sums."""
    found = {grid for n in (*unit.makes, *unit.needs) if (grid := grid_of(n)) is not None}
    if len(found) > 1:
        raise EmitError(f"{unit.makes[0]} is computed from values of two grids")
    return next(iter(found), None)


def sums(unit: Unit) -> bool:
    """Whether a unit of a grid sums over it."""
    return all(grid_of(n) is None for n in unit.makes)


def as_product(unit: Unit) -> Unit:
    """A product of two small values that is large, as a stacked one of one part; any other unit as it is."""
    if not isinstance(unit, Single) or unit.node.op != "contract" or len(unit.needs) != 2:
        return unit
    n = unit.node
    if grid_of(n) is None or any(grid_of(a) is not None or a.op == "mask" for a in n.args):
        return unit
    patterns, result = n.attr
    shared = {*patterns[0], *patterns[1]} - set(result)
    if len(shared) != 1 or not shared <= set(patterns[0]) & set(patterns[1]):
        raise EmitError(f"{n} is no product of matrices")
    (left, right), axes = n.args, tuple(tuple(result.index(x) if x in result else -1 for x in p) for p in patterns)
    return Stacked(n, (Part(sympy.Integer(1), left, axes[0], right, axes[1]),), (), axes[0], axes[1])


def order(units: Sequence[Unit], reads: Sequence[Node]) -> Iterator[Unit | Walk | str]:
    """Units by themselves, walks over grids and the choice of near pairs, which reads some values, in an order.

    Raises:
        EmitError: values of near pairs that cannot be computed in one walk, or that the choice reads.
    """
    waiting = [as_product(unit) for unit in units]
    grids = {unit.makes[0]: _grid(unit) for unit in waiting}
    done: set[Node] = set()
    chosen = False

    def after_choice(unit: Unit) -> bool:
        return any(n.op == "mask" or (n.op == "input" and str(n.attr) in CHOSEN) for n in unit.makes)

    while waiting:
        if not chosen and set(reads) <= done:
            chosen = True
            yield CHOICE
        ready = [
            unit
            for unit in waiting
            if grids[unit.makes[0]] is None and set(unit.needs) <= done and (chosen or not after_choice(unit))
        ]
        if ready:
            done.update(ready[0].makes)
            waiting.remove(ready[0])
            yield ready[0]
            continue
        walk = next((found for grid in GRIDS if (found := _walk(grid, waiting, grids, done)) is not None), None)
        if walk is None:
            raise EmitError(f"no order of walks computes {waiting[0].makes[0]}")
        for unit in walk.units:
            done.update(unit.makes)
            waiting.remove(unit)
        yield walk


def _walk(grid: Grid, waiting: Sequence[Unit], grids: dict[Node, Grid | None], done: set[Node]) -> Walk | None:
    """What a walk over a grid can compute from what is there; None for nothing, or a part of the near pairs."""
    made, own = set(done), [unit for unit in waiting if grids[unit.makes[0]] is grid]
    taken = []
    for unit in own:
        if set(unit.needs) <= made:
            taken.append(unit)
            if not sums(unit):
                made.update(unit.makes)
    if not taken or (grid is NEAR and len(taken) < len(own)):
        return None
    return Walk(grid, tuple(taken))


def is_elementwise(unit: Unit) -> bool:
    """Whether a unit computes every element of a tile from those of others."""
    return isinstance(unit, Single) and not sums(unit)


def of_sum(unit: Unit) -> tuple[Node, tuple[tuple[Node, Node | None], ...]]:
    """The large operand of a sum over a grid; what it makes, each with its partner."""
    if isinstance(unit, Fused):
        return unit.operand, tuple(zip(unit.nodes, unit.partners, strict=True))
    n = unit.makes[0]
    large = [a for a in n.args if grid_of(a) is not None]
    if n.op != "contract" or len(large) != 1 or len(n.args) > 2:
        raise EmitError(f"the CPU target has no sum over tiles for {n}")
    return large[0], ((n, next((a for a in n.args if a is not large[0]), None)),)
