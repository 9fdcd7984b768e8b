"""Kernel specifications: loops over blocks of tokens, between them states without a token axis.

A loop reads rows of its inputs, computes tiles (features among them, made on the fly), adds to states what is summed
over tokens, and writes rows of its outputs.  ``evaluate`` gives a specification its meaning; the targets print it.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.tensor import RANK_LETTERS, Leaf
from polyattn.rewriter.masks.mask import NONE, Mask, Sums
from polyattn.rewriter.planning.plan import Node, flops, walk
from polyattn.rewriter.rules.rule import ApproximateRule

QUERY_SIDE = frozenset({"Q", "QP", "G", "O", "D", "dQ"})
"""Inputs and outputs whose tokens are queries; the others' are keys."""
TOKENS, FEATURES, WIDTHS = ("i", "j"), tuple(RANK_LETTERS), ("a", "b", "b̂", "c")
"""Letters of the axes that the targets know: tokens, features by degree from the top, head, value and directions."""


def letters(n: Node) -> tuple[str, ...]:
    """The axes of a node.

    Raises:
        ScheduleError: two axes of one kind, or an axis that no target knows.
    """
    found = tuple(kind.letter for kind in n.axes)
    known = {*TOKENS, *FEATURES, *WIDTHS, *(kind.letter for kind in n.axes if kind.feature)}
    if len(set(found)) != len(found) or not set(found) <= known:
        raise ScheduleError(f"no tile has the axes {list(found)} of {n.op}")
    return found


def is_state(n: Node) -> bool:
    """Whether a value has no token axis (weights are constants, not states)."""
    return n.tokens == 0 and n.op != "weights" and any(m.tokens or m.op == "input" for m in walk([n]))


def accumulates(n: Node) -> bool:
    """Whether a node sums over tokens into a value without tokens, or into a running sum."""
    return n.op == "contract" and (n.scanned or n.tokens == 0) and any(a.tokens for a in n.args)


@dataclass(frozen=True)
class Loop:
    """One pass over tokens.

    ``axis`` is the token kind that is walked in blocks; None walks chunks of both tokens together (causal), upwards
    or, with ``descending``, downwards.  ``tiles`` are in order of computation.  ``accumulate`` are states summed over
    the loop; in a causal loop a tile that uses one of them sees its value *before* the present chunk.  Where a mask has
    a local window, a loop over chunks of one token sees of the other the same chunk and its neighbours, and of a state
    the sum over all other chunks.
    """

    axis: Kind | None
    descending: bool
    tiles: tuple[Node, ...]
    accumulate: tuple[Node, ...]
    stores: tuple[tuple[str, Node], ...]


@dataclass(frozen=True)
class KernelSpec:
    """Loops in order, operations on states between them, and which states are results."""

    name: str
    loops: tuple[Loop, ...]
    states: tuple[tuple[str, Node], ...]
    """States that are read (saved by an earlier kernel) or returned, by name."""
    inputs: tuple[str, ...]
    mask: Mask = NONE
    """Which pairs of tokens are met one by one, and what the states are summed over."""
    rule: ApproximateRule | None = None
    """What stands in place of exp; None where nothing is approximated."""
    reads: tuple[str, ...] = ()
    """Where tokens are in tiles: names of the values that the choice of near pairs of tiles takes."""
    names: tuple[tuple[str, Node], ...] = ()
    """What the derivation calls values, where it keeps names."""

    @property
    def tiled(self) -> bool:
        """Whether tokens are in tiles, and loops walk tiles (codegen/phases.py)."""
        return self.mask.sums is Sums.TILES

    @property
    def chunked(self) -> bool:
        """Whether loops walk chunks, inside of which there are pairs of tokens."""
        return self.mask.chunked

    @property
    def elsewhere(self) -> bool:
        """Whether states are sums over all chunks but the near ones, of which every chunk leaves its own."""
        return self.mask.sums is Sums.ELSEWHERE

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Inputs without a token axis that the rule brings in."""
        return tuple(leaf for leaf in (() if self.rule is None else self.rule.inputs) if leaf.name in self.inputs)

    def cost(self) -> sympy.Expr:
        """FLOPs per head of all loops, as a polynomial in n, d, e, r, r' and C."""
        near = self.mask.near_chunks
        work = (flops(n, near) for loop in self.loops for n in (*loop.tiles, *loop.accumulate))
        return sympy.expand(sum(work, sympy.Integer(0)))

    def __str__(self) -> str:
        lines = [f"kernel {self.name}({', '.join(self.inputs)})"]
        for loop in self.loops:
            order = "chunks, last to first" if loop.descending else "chunks" if loop.axis is None else loop.axis.letter
            lines.append(f"  for {order}:")
            for tile in loop.tiles:
                args = ", ".join(map(repr, tile.args)) or str(tile.attr)
                lines.append(f"    {tile!r} = {tile.op}({args})")
            lines += [f"    {state!r} += …" for state in loop.accumulate]
            lines += [f"    store {name} = {made!r}" for name, made in loop.stores]
        return "\n".join(lines)
