"""Schedule of programs in tiles: values of key tiles, then a loop over tiles of queries, then what its sums yield.

Phases of a value: ``HEAD``, of keys alone, once for each head; ``BLOCK``, of some tiles of queries; ``END``, what needs
a sum over all tiles of queries. Values over places of both queries and keys are there for near pairs of tiles alone, of
which a call's choice says which they are, once the values that it reads are there.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

import torch

from polyattn.codegen.spec import KernelSpec, Loop
from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra.tensor import KEY_TILE, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.masks.mask import Mask
from polyattn.rewriter.planning.plan import Node, in_near_tiles, walk
from polyattn.rewriter.rules.rule import ApproximateRule

Choose = Callable[[int, slice, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""The choice of near pairs: (head, tiles of queries, the values that it reads) → ``M_near`` and ``M_far``, bool [I, J],
and inputs by name that depend on the same values, in these tiles."""


class Phase(enum.IntEnum):
    """When a value is computed."""

    HEAD = 0
    BLOCK = 1
    END = 2


def reduces_queries(n: Node) -> bool:
    """Whether a node sums over tiles of queries."""
    return n.op == "contract" and QUERY_TILE not in n.axes and any(QUERY_TILE in a.axes for a in n.args)


def phases(roots: Mapping[str, Node]) -> dict[Node, Phase]:
    """The phase of every node that outputs need, arguments first.

    Raises:
        ScheduleError: a value of tiles of queries that needs a sum over all of them, or pairs of places of far tiles.
    """
    found: dict[Node, Phase] = {}
    masked: set[Node] = set()
    """Values of pairs of places that are 0 outside of near pairs, or will be multiplied by such."""
    for n in walk(roots.values()):
        own = Phase.BLOCK if {QUERY_TILE, QUERY_PLACE} & set(n.axes) else Phase.HEAD
        phase = max([own, *(Phase.END if reduces_queries(a) else found[a] for a in n.args)])
        if phase is Phase.END and (own is Phase.BLOCK or reduces_queries(n)):
            raise ScheduleError(f"{n} needs a sum over all tiles of queries, of which it is a part")
        found[n] = phase
        if any((a.op == "mask" and a.attr == "near") or a in masked for a in n.args) and n.op == "contract":
            masked.add(n)
        if n.op == "sum" and n.args and all(a in masked for a in n.args):
            masked.add(n)
    for n in found:
        sums_pairs = n.op == "contract" and not in_near_tiles(n.axes) and any(in_near_tiles(a.axes) for a in n.args)
        if sums_pairs and not any(a in masked for a in n.args):
            raise ScheduleError(f"{n} sums over pairs of places that no mask of near tiles limits")
    return found


def schedule_tiles(
    name: str, outputs: Mapping[str, Node], mask: Mask, rule: ApproximateRule, names: Mapping[str, Node]
) -> KernelSpec:
    """Lay outputs out as loops over tiles: of keys, of queries, and of keys again.

    Args:
        names: values by the names of the derivation; those that the rule says are read by the choice of near pairs.
    """
    reads = {label: names[label] for label in rule.reads}
    found = phases({**outputs, **reads})
    tiles = {phase: tuple(n for n, p in found.items() if p is phase) for phase in Phase}
    sums = tuple(n for n in found if reduces_queries(n))
    stores: dict[Phase, list[tuple[str, Node]]] = {phase: [] for phase in Phase}
    for label, n in outputs.items():
        at = Phase.END if reduces_queries(n) else found[n]
        stores[Phase.END if at is Phase.HEAD else at].append((label, n))
    block = tuple(n for n in tiles[Phase.BLOCK] if n not in sums)
    loops = (
        Loop(KEY_TILE, False, tiles[Phase.HEAD], (), ()),
        Loop(QUERY_TILE, False, block, sums, tuple(stores[Phase.BLOCK])),
        Loop(KEY_TILE, False, tiles[Phase.END], (), tuple(stores[Phase.END])),
    )
    inputs = sorted({str(n.attr) for n in found if n.op == "input"})
    return KernelSpec(name, loops, (), tuple(inputs), mask, rule, rule.reads, tuple(names.items()))


def of_queries(n: Node) -> bool:
    """Whether an input is one of tiles of queries."""
    return QUERY_TILE in n.axes
