"""What a call's masks show, found in one pass over them: against the definition, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn.passes.match.changes import Change, Changes
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.runtime import visibility
from polyattn.runtime.visibility import Seen, look
from polyattn.runtime.written import ScoreMask

N_Q, N_K, B, H = 9, 7, 2, 3
Q, K = torch.zeros(B, H, N_Q, 1), torch.zeros(B, H, N_K, 1)
SCORES = (B, H, N_Q, N_K)
TRIL = torch.ones(N_Q, N_K, dtype=torch.bool).tril()


def shown(mask: torch.Tensor, kind: Any = "replace", causal: bool = False) -> Seen | None:
    changes = Changes((Change(kind, causal=causal),))
    return look(ScoreMask.of(changes, [mask], SCORES), NONE, Q, K)


def pairs(seen: Seen) -> torch.Tensor:
    """The pairs that such a statement means, [B, n_q, n_k]."""
    made = TRIL if seen.mask is CAUSAL else torch.ones_like(TRIL)
    made = made.expand(B, -1, -1).clone()
    if seen.keep is not None:
        made &= seen.keep[:, None]
    if seen.lost is not None:
        made &= ~seen.lost[..., None]
    return made


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.booleans(), min_size=B * N_K, max_size=B * N_K),
    st.lists(st.booleans(), min_size=B * N_Q, max_size=B * N_Q),
    st.booleans(),
    st.lists(st.integers(0, B * N_Q * N_K - 1), max_size=2),
    st.integers(1, 40),
)
def test_against_the_definition(
    keep: list[bool], seeing: list[bool], causal: bool, flips: list[int], block: int
) -> None:
    """Padding, rows that see nothing, causal or not, and some pairs flipped: what is said is the mask."""
    mask = torch.tensor(keep).view(B, 1, 1, N_K) & torch.tensor(seeing).view(B, 1, N_Q, 1)
    mask = (mask & TRIL if causal else mask).expand(B, 1, N_Q, N_K).clone()
    for flip in set(flips):
        mask.view(-1)[flip] ^= True
    before, visibility.PAIRS = visibility.PAIRS, block * B
    try:
        found = shown(mask)
        floats = shown(torch.zeros(B, 1, N_Q, N_K).masked_fill(~mask, -torch.inf), "add")
    finally:
        visibility.PAIRS = before
    assert (found is None) == (floats is None)
    if not flips:
        assert found is not None
    if found is not None:
        assert torch.equal(pairs(found), mask[:, 0])
        lost = ~mask[:, 0].any(-1)
        assert torch.equal(lost if found.lost is None else found.lost, lost)


def test_rows_that_padding_hides_from_early_queries_are_lost() -> None:
    keep = torch.arange(N_K) >= torch.tensor([[3], [0]])
    found = shown(keep[:, None, None], causal=True)
    assert found is not None
    assert found.mask is CAUSAL
    assert found.lost is not None
    assert found.lost.sum(1).tolist() == [3, 0]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(B, 1, 1, N_K, dtype=torch.bool),
        torch.ones(1, 1, 1, N_K, dtype=torch.bool).expand(B, H, N_Q, N_K),
        torch.ones(N_Q, N_K, dtype=torch.bool),
        torch.ones(1, dtype=torch.bool),
    ],
    ids=lambda mask: str(tuple(mask.shape)),
)
def test_a_mask_that_hides_nothing(mask: torch.Tensor) -> None:
    assert shown(mask) == Seen(NONE)


def test_heads_must_be_alike() -> None:
    mask = TRIL.expand(B, H, N_Q, N_K).clone()
    found = shown(mask)
    assert found == Seen(CAUSAL)
    mask[1, 2, 5, 3] = False
    assert shown(mask) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [-torch.inf, -1e4])
def test_hidden_in_every_dtype(fill: float, dtype: torch.dtype) -> None:
    mask = torch.zeros(N_K).masked_fill(torch.arange(N_K) > 3, fill).to(dtype)
    found = shown(mask, "add")
    assert found is not None
    assert found.keep is not None
    assert found.keep.tolist() == [[True] * 4 + [False] * 3] * B
    assert shown(mask.masked_fill(torch.arange(N_K) == 2, 1e-3), "add") is None
    assert shown(mask.masked_fill(torch.arange(N_K) == 2, -50.0), "add") is None
