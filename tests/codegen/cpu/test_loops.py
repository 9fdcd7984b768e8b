"""The kinds of loops of the CPU target."""

from __future__ import annotations

import pytest
from rules import kernels

from polyattn.codegen.cpu.layout import Sizes, Value
from polyattn.codegen.cpu.loops import Chunks, ChunkSumsCode, LoopCode, NeighboursCode, walk

STATE = Value("state_1", ("b̂", "α"))
V, PHI = Value("v", ("j", "b̂")), Value("phi", ("α", "j"))


@pytest.mark.parametrize(
    ("causal", "window", "kinds"),
    [
        (False, False, [LoopCode, LoopCode]),
        (True, False, [Chunks]),
        (False, True, [ChunkSumsCode, NeighboursCode]),
    ],
    ids=["full", "causal", "local window"],
)
def test_the_mask_says_which_kind(causal: bool, window: bool, kinds: list[type[LoopCode]]) -> None:
    spec = kernels(causal, 2, "consistent", window=window).forward
    assert [type(walk(spec, loop)) for loop in spec.loops] == kinds


def test_titles() -> None:
    made = [LoopCode("i"), LoopCode("j"), Chunks(), Chunks(descending=True), ChunkSumsCode("j"), NeighboursCode("i")]
    assert [walked.title for walked in made] == [
        "blocks of queries",
        "blocks of keys",
        "chunks",
        "chunks, last to first",
        "chunks of keys",
        "chunks of queries",
    ]


def test_a_window_sees_neighbours_of_the_other_token_only() -> None:
    assert [NeighboursCode("i").tokens(x) for x in "ij"] == ["start : start + block", "below:above"]
    assert [NeighboursCode("j").tokens(x) for x in "ij"] == ["below:above", "start : start + block"]
    assert [Chunks().tokens(x) for x in "ij"] == ["start : start + block"] * 2
    assert "rows, T_k = max(0, above - below), min(block, n_k - start)" in NeighboursCode("j").header()[2]


def test_how_sums_are_read_and_added_to() -> None:
    sizes = Sizes(kernels(False, 2, "consistent").forward)
    assert LoopCode("j").add(STATE, [V, PHI]) == "state_1.baddbmm_(v.mT, phi.mT)"
    assert ChunkSumsCode("j").add(STATE, [V, PHI]) == "state_1[start // block].copy_(torch.bmm(v.mT, phi.mT))"
    assert LoopCode("j").total(STATE) == STATE
    assert NeighboursCode("i").total(STATE).name == "far_state_1"
    assert NeighboursCode("i").prologue([STATE], ["x = far_state_1"], sizes) == [
        "far_state_1 = state_1[start // block]  # [H, e + 1, r]"
    ]
    assert NeighboursCode("i").prologue([STATE], ["x = y"], sizes) == []
    assert ChunkSumsCode("j").finish([STATE]) == ["elsewhere(state_1)"]
    assert LoopCode("j").finish([STATE]) == []


def test_only_a_causal_chunk_hides_pairs() -> None:
    assert Chunks.masks is not None
    assert [kind.masks for kind in (LoopCode, ChunkSumsCode, NeighboursCode)] == [None] * 3
