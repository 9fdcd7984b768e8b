"""reuse: a product that an earlier definition names is that definition."""

from __future__ import annotations

import pytest
from programs import assert_equal, program

from polyattn.rewriter.rules.reuse import REUSE

NAMED = "S[i,j] = s * Q[i,a] K[j,a];  N[i,b] = exp(S)[i,j] V[j,b];"


def test_a_named_product_is_not_computed_again() -> None:
    """rowsum(P ∘ dP) = rowsum(G ∘ O)."""
    before = program(NAMED + "O[i] = exp(S)[i,j] V[j,b] G[i,b]")
    after = REUSE.apply(before)
    assert repr(after.outputs["O"]) == "[i] G[i,b] · N[i,b]"
    assert_equal(after, before)


def test_names_of_indices_do_not_matter() -> None:
    before = program(NAMED + "O[i,a] = exp(S)[i,j'] V[j',b'] G[i,b'] Q[i,a]")
    after = REUSE.apply(before)
    assert repr(after.outputs["O"]) == "[i,a] G[i,b] · N[i,b] · Q[i,a]"
    assert_equal(after, before)


@pytest.mark.parametrize(
    ("what", "output"),
    {
        "the summed token occurs elsewhere": "O[i] = exp(S)[i,j] V[j,b] G[i,b] B[j]",
        "the summed token is the output's": "O[j] = exp(S)[i,j] V[j,b] G[i,b]",
        "another sum": "O[i] = exp(S)[i,j] W[j,b] G[i,b]",
        "a token of each row": "O[i] = exp(S)[i,j] V[j',b] G[i,b] B[j] B[j']",
    }.items(),
)
def test_near_misses_are_left_as_they_are(what: str, output: str) -> None:
    before = program(NAMED + output)
    after = REUSE.apply(before)
    assert "N[" not in repr(after.outputs["O"]), what
    assert_equal(after, before)


def test_sums_and_scaled_products_have_no_name() -> None:
    before = program("N[i,b] = 2 * A[i,j] V[j,b];  O[i] = A[i,j] V[j,b] G[i,b]")
    assert "N[" not in repr(REUSE.apply(before).outputs["O"])
