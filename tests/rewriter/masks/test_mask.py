"""What each mask says of pairs of tokens, against pairs written out."""

from __future__ import annotations

import pytest
import torch

from polyattn.rewriter.masks.mask import (
    CAUSAL,
    CAUSAL_NEAR_TILES,
    LOCAL_WINDOW,
    MASKS,
    NEAR_TILES,
    NONE,
    Causal,
    Mask,
    Sums,
)
from polyattn.rewriter.masks.pairs import Pairs

N_Q, N_K, CHUNK = 11, 13, 4
I, J = torch.arange(N_Q)[:, None], torch.arange(N_K)[None]
VISIBLE = {NONE: torch.ones(N_Q, N_K, dtype=torch.bool), CAUSAL: J <= I, LOCAL_WINDOW: torch.ones(N_Q, N_K).bool()}
NEAR = {
    NONE: torch.zeros(N_Q, N_K).bool(),
    CAUSAL: (I // CHUNK == J // CHUNK) & (J <= I),
    LOCAL_WINDOW: (I // CHUNK - J // CHUNK).abs() <= 1,
}
EVERY = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.name)


@EVERY
def test_visible_and_near_pairs(mask: Mask) -> None:
    rows, columns = torch.arange(N_Q), torch.arange(N_K)
    assert torch.equal(mask.visible(rows, columns), VISIBLE[mask])
    assert torch.equal(mask.near(rows, columns, CHUNK), NEAR[mask])
    assert mask.hides is not bool(VISIBLE[mask].all())
    seen = mask.seen(rows, N_K)
    assert seen is None if not mask.hides else torch.equal(seen, VISIBLE[mask])


@EVERY
def test_near_pairs_lie_in_so_many_chunks(mask: Mask) -> None:
    """A query that is far from either end meets that many chunks of keys, its own one in part where some are hidden."""
    met = NEAR[mask][5].nonzero().squeeze(1) // CHUNK
    assert len(set(met.tolist())) == mask.near_chunks
    assert mask.chunked is (mask.near_chunks > 0)
    assert (mask.indicator is None) is not mask.chunked
    assert bool(mask.split) is mask.chunked


@EVERY
@pytest.mark.parametrize("n_q", [1, N_Q, N_K + 5])
def test_sums_over_the_keys_that_a_query_sees(mask: Mask, n_q: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, N_K, 3, generator=generator, dtype=torch.float64)
    seen = mask.visible(torch.arange(n_q), torch.arange(N_K)).double()
    torch.testing.assert_close(mask.sums_of(x, n_q).expand(2, n_q, 3), torch.einsum("ij,hja->hia", seen, x))
    torch.testing.assert_close(mask.sums_of(x[..., 0], n_q).expand(2, n_q), torch.einsum("ij,hj->hi", seen, x[..., 0]))


@EVERY
def test_far_pairs_of_joined_elements_are_the_rest(mask: Mask) -> None:
    pairs = Pairs(N_Q, N_K, mask, CHUNK if mask.chunked else None)
    i, j = torch.arange(2 * N_Q), torch.arange(2 * N_K)
    for block in ([0, 0], [0, 1], [1, 0], [1, 1]):
        rows, columns = (slice(block[0] * N_Q, (block[0] + 1) * N_Q), slice(block[1] * N_K, (block[1] + 1) * N_K))
        own = block[0] == block[1]
        assert torch.equal(pairs.seen(i, j)[rows, columns], VISIBLE[mask] & own)
        assert torch.equal(pairs.far(i, j)[rows, columns], VISIBLE[mask] & ~NEAR[mask] & own)


def test_pairs_that_are_hidden_beside_near_ones() -> None:
    """Under a causal mask those of the same chunk and of the next one; in a local window there are none."""
    i, j = torch.arange(N_Q), torch.arange(N_K)
    causal = Pairs(N_Q, N_K, CAUSAL, CHUNK).hidden_alike(i, j)
    gap = I // CHUNK - J // CHUNK
    assert torch.equal(causal, (gap == 0) | (gap == -1))
    assert torch.equal(Pairs(N_Q, N_K, LOCAL_WINDOW, CHUNK).hidden_alike(i, j), NEAR[LOCAL_WINDOW])


def test_masks_of_tiles_say_what_exact_attention_has() -> None:
    assert (NEAR_TILES.exact, CAUSAL_NEAR_TILES.exact) == (NONE, CAUSAL)
    assert [mask.tiled for mask in (NEAR_TILES, CAUSAL_NEAR_TILES, *MASKS)] == [True, True, False, False, False]
    assert (NEAR_TILES.hides, CAUSAL_NEAR_TILES.hides) == (False, True)
    assert all(mask.exact is mask for mask in MASKS)
    assert CAUSAL_NEAR_TILES != CAUSAL


def test_masks_are_keys_of_caches() -> None:
    assert Causal() == CAUSAL
    assert hash(Causal()) == hash(CAUSAL)
    assert len(set(MASKS)) == 3
    assert {mask.sums for mask in (*MASKS, NEAR_TILES)} == set(Sums)
    assert repr(CAUSAL) == "Causal()"
