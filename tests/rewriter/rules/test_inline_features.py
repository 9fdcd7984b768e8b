"""inline of skeleton features: sums over tokens with an axis of landmarks are written out."""

from __future__ import annotations

import pytest
from programs import assert_equal, program, written

from polyattn.rewriter.families.skeleton.rule import OF_KEYS, OF_QUERIES
from polyattn.rewriter.rules.inline_features import InlineFeatures

RULE = InlineFeatures((OF_KEYS, OF_QUERIES), "landmarks")


def test_sums_over_tokens_are_written_out() -> None:
    before = program("N[σ,b] = R[j,σ] V[j,b];  O[i,b] = P[i,σ] N[σ,b]")
    after = RULE.apply(before)
    assert after.defs == ()
    assert repr(after.outputs["O"]) == "[i,b] P[i,σ] · R[j,σ] · V[j,b]"
    assert_equal(after, before)


@pytest.mark.parametrize(
    ("what", "text"),
    {
        "no sum over tokens": "U[i,σ] = Q[i,a] L[σ,a];  O[i,b] = U[i,σ] N[σ,b]",
        "no landmarks": "N[a,b] = K[j,a] V[j,b];  O[i,b] = Q[i,a] N[a,b]",
    }.items(),
)
def test_near_misses_are_left_as_they_are(what: str, text: str) -> None:
    before = program(text)
    assert written(RULE.apply(before)) == written(before), what
