"""Blocks of the pairs of tokens under a causal mask: rectangles in which every query sees every key (math.md §8).

A sequence is cut into segments. A query meets the keys of its own segment one by one. All earlier keys it meets in
blocks: for every binary digit of the number of its segment one, of as many segments as the digit is worth, with the
queries that have those keys before them. Blocks come in the order of their queries, so that what is known of the tokens
of a block's keys is complete when the block's turn comes:

    segments  0 | 1   2 | 3   4 | 5   6 | 7
    blocks      0→1     2→3     4→5     6→7      (keys → queries)
                  0,1 → 2,3         4,5 → 6,7
                        0,1,2,3 → 4,5,6,7
"""

from __future__ import annotations

from dataclasses import dataclass

MOST = 63
"""Blocks at most: one less than there are segments."""


@dataclass(frozen=True)
class Block:
    """Pairs of the queries and the keys at some positions, each a contiguous range."""

    queries: slice
    keys: slice

    @property
    def shape(self) -> tuple[int, int]:
        """How many queries and keys."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def pairs(self) -> int:
        """Pairs of tokens."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Blocks:
    """How a causal sequence is cut."""

    segment: int
    """Tokens of a segment, the last of which may have fewer; 0: there is no order of tokens, and no segment."""
    blocks: tuple[Block, ...]
    """In the order of their queries."""
    own_pairs: int = 0
    """Pairs of tokens of one segment that a causal mask shows."""

    @property
    def pairs(self) -> int:
        """All pairs of tokens that a mask shows."""
        return self.own_pairs + sum(block.pairs for block in self.blocks)

    @classmethod
    def whole(cls, n_q: int, n_k: int) -> Blocks:
        """All pairs as one block, where every query sees every key."""
        return cls(0, (Block(slice(0, n_q), slice(0, n_k)),))

    @classmethod
    def of(cls, tokens: int, least: int) -> Blocks:
        """The blocks of a sequence whose segments are to have at least ``least`` tokens; none where it is too short."""
        segments = 1
        while 2 * segments <= MOST + 1 and tokens >= 2 * segments * max(least, 1):
            segments *= 2
        length = -(-tokens // segments)
        made = []
        for first in range(1, segments):
            size = first & -first  # the least binary digit: blocks of the others began with an earlier segment
            if first * length < tokens:
                queries = slice(first * length, min((first + size) * length, tokens))
                made.append(Block(queries, slice((first - size) * length, first * length)))
        lengths = (min(length, tokens - at) for at in range(0, tokens, length))
        return cls(length, tuple(made), sum(part * (part + 1) // 2 for part in lengths))
