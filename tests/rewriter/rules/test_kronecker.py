"""kronecker: polynomials of a product are products of features."""

from __future__ import annotations

import pytest
from programs import assert_equal, program

from polyattn.errors import RewriteError
from polyattn.rewriter.families.polynomial.kronecker import KRONECKER

OUT = "O[i,b] = p2(S)[i,j] V[j,b];  dV[j,b] = p1(S)[i,j] G[i,b]"


def test_a_polynomial_becomes_features() -> None:
    before = program("S[i,j] = s * Q[i,a] K[j,a];" + OUT)
    after = KRONECKER.apply(before)
    assert after.defs == ()
    assert repr(after.outputs["O"]) == "[i,b] V[j,b] · w2[α] · Φ2(K)[j,α] · Φ2(Q)[i,α]"
    assert repr(after.outputs["dV"]) == "[j,b] G[i,b] · w1[β] · Φ1(K)[j,β] · Φ1(Q)[i,β]"
    assert_equal(after, before)


def test_sides_may_be_definitions() -> None:
    before = program("U[i,a] = Q[i,a'] W[a',a];  S[i,j] = U[i,a] K[j,a];  O[i,b] = p2(S)[i,j] V[j,b]")
    after = KRONECKER.apply(before)
    assert "Φ2(U)" in repr(after.outputs["O"])
    assert_equal(after, before)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("S[i,j] = Q[i,a] K[j,a] + B[i,j];", "kronecker: the score S is a sum, not a product"),
        ("S[i,j] = Q[i,a] K[j,a] B[j];", "the score S is not a product U Wᵀ of two token matrices"),
        ("S[i,j] = B[i,j];", "the score S is not a product U Wᵀ of two token matrices"),
        ("", "the score S has no definition"),
    ],
)
def test_near_misses_are_refused(score: str, reason: str) -> None:
    """exp(Q Kᵀ + B) has no single pair of features."""
    with pytest.raises(RewriteError, match=reason):
        KRONECKER.apply(program(score + OUT))
