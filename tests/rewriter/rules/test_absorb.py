"""absorb: a scaled sum that nothing else reads takes the scale in."""

from __future__ import annotations

import pytest
from programs import assert_equal, program, written

from polyattn.rewriter.rules.absorb import ABSORB

SUM = "U[i,b] = A[i,j] V[j,b] + C[i,b];"


def test_the_scale_goes_in() -> None:
    before = program(SUM + "O[i,b] = z[i] U[i,b]")
    after = ABSORB.apply(before)
    assert after.defs == ()
    assert repr(after.outputs["O"]) == "[i,b] A[i,j] · V[j,b] · z[i] + C[i,b] · z[i]"
    assert_equal(after, before)


@pytest.mark.parametrize(
    ("what", "outputs"),
    {
        "another output reads it": "O[i,b] = z[i] U[i,b];  dZ[i] = U[i,b] G[i,b]",
        "read twice": "O[i,b] = U[i,b] U[i,b]",
        "not scaled": "O[i,b] = U[i,b]",
        "one term of several": "O[i,b] = z[i] U[i,b] + G[i,b]",
    }.items(),
)
def test_near_misses_are_left_as_they_are(what: str, outputs: str) -> None:
    before = program(SUM + outputs)
    assert written(ABSORB.apply(before)) == written(before), what


def test_a_definition_inside_a_function_is_read_too() -> None:
    before = program("D[i] = A[i,j];  O[i,b] = 1/D[i] D[i] G[i,b]")
    assert written(ABSORB.apply(before)) == written(before)
