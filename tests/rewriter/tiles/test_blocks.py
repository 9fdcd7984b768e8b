"""Blocks of a causal sequence: every earlier key once, in an order in which all that a block reads is complete."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn.rewriter.tiles.blocks import MOST, Blocks


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 400), least=st.integers(1, 120))
def test_every_visible_pair_is_in_one_place(tokens: int, least: int) -> None:
    cut = Blocks.of(tokens, least)
    seen = torch.zeros(tokens, tokens, dtype=torch.int64)
    for at in range(0, tokens, cut.segment):
        part = slice(at, at + cut.segment)
        seen[part, part] += torch.ones_like(seen[part, part]).tril()
    assert int(seen.sum()) == cut.own_pairs
    for block in cut.blocks:
        seen[block.queries, block.keys] += 1
    assert torch.equal(seen, torch.ones_like(seen).tril())
    assert cut.pairs == tokens * (tokens + 1) // 2
    assert len(cut.blocks) <= MOST


@given(tokens=st.integers(1, 5000), least=st.integers(1, 300))
def test_what_a_block_reads_of_its_keys_positions_is_complete(tokens: int, least: int) -> None:
    blocks = Blocks.of(tokens, least).blocks
    for at, block in enumerate(blocks):
        assert block.keys.stop == block.queries.start
        assert block.shape[0] <= block.shape[1]
        assert all(later.queries.start >= block.keys.stop for later in blocks[at:])


@given(tokens=st.integers(1, 10**6), least=st.integers(1, 10**5))
def test_segments_are_long_enough_and_no_more_than_there_are_tokens(tokens: int, least: int) -> None:
    cut = Blocks.of(tokens, least)
    if cut.blocks:
        assert cut.segment >= least
        assert all(block.shape[0] > 0 for block in cut.blocks)
    else:
        assert cut.segment == tokens


def test_without_an_order_all_pairs_are_one_block() -> None:
    cut = Blocks.whole(3, 5)
    assert (cut.segment, cut.own_pairs, cut.pairs) == (0, 0, 15)
    assert [block.shape for block in cut.blocks] == [(3, 5)]
