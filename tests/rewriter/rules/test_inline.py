"""inline: matrices over pairs of tokens are written out where they are read, scores stay named."""

from __future__ import annotations

import pytest
from programs import assert_equal, program, written

from polyattn.errors import RewriteError
from polyattn.rewriter.rules.inline import INLINE

PAIRS = """
    S[i,j] = s * Q[i,a] K[j,a];  P[i,j] = exp(S)[i,j] B[j];  W[i,j] = G[i,b] V[j,b]
    O[i] = P[i,j] W[i,j]
"""


def test_pairs_are_written_out_but_for_scores() -> None:
    before = program(PAIRS)
    after = INLINE.apply(before)
    assert [d.label for d in after.defs] == ["S"]
    assert repr(after.outputs["O"]) == "[i] B[j] · G[i,b] · V[j,b] · exp(S)[i,j]"
    assert_equal(after, before)


def test_indices_that_meet_are_told_apart() -> None:
    """W sums over b and is read where b is the output's."""
    before = program("W[i,j] = G[i,b] V[j,b];  O[i,b] = W[i,j] V[j,b]")
    after = INLINE.apply(before)
    assert repr(after.outputs["O"]) == "[i,b] G[i,b'] · V[j,b'] · V[j,b]"
    assert_equal(after, before)


def test_what_is_multiplied_by_itself_is_a_score() -> None:
    before = program("S[i,j] = Q[i,a] K[j,a];  O[i,b] = S[i,j] S[i,j] V[j,b]")
    assert INLINE.apply(before).defs == before.defs


def test_values_of_single_tokens_stay_named() -> None:
    before = program("N[i,b] = A[i,j] V[j,b];  O[i,b] = z[i] N[i,b]")
    assert written(INLINE.apply(before)) == written(before)


def test_an_output_over_a_pair_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"inline: the output O is itself over a pair of tokens"):
        INLINE.apply(program("P[i,j] = G[i,b] V[j,b];  O[i,j] = P[i,j] B[j]"))
