"""compress: a monomial times a variable is a monomial."""

from __future__ import annotations

import pytest
from programs import assert_equal, program, written

from polyattn.rewriter.families.polynomial.compress import Compress
from polyattn.rewriter.families.polynomial.kronecker import KRONECKER

S = "S[i,j] = Q[i,a] K[j,a];  O[i,b] = p2(S)[i,j] V[j,b];"


def test_lower_features_times_their_source_are_selected_features() -> None:
    before = KRONECKER.apply(program(S + "dQ[i,a] = p1(S)[i,j] K[j,a] B[j]"))
    after = Compress(2).apply(before)
    assert repr(after.outputs["dQ"]) == "[i,a] B[j] · w1[β] · Φ1(Q)[i,β] · C[β,a,α] · Φ2(K)[j,α]"
    assert after.outputs["O"] == before.outputs["O"]
    assert_equal(after, before)


@pytest.mark.parametrize(
    ("what", "output"),
    {
        "features of the highest degree": "dQ[i,a] = p2(S)[i,j] K[j,a] B[j]",
        "another tensor": "dV[i,b] = p1(S)[i,j] V[j,b]",
        "its source at another token": "dQ[i,a] = p1(S)[i,j] K[j',a] B[j'] B[j]",
    }.items(),
)
def test_near_misses_are_left_as_they_are(what: str, output: str) -> None:
    before = KRONECKER.apply(program(S + output))
    assert written(Compress(2).apply(before)) == written(before), what


def test_the_note_has_the_degrees() -> None:
    assert Compress(3).note == "the columns of Φ₂(K) ⊘ K are columns of Φ₃(K): a monomial times a variable (§2)"
