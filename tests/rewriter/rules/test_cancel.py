"""cancel: a factor and its reciprocal at the same indices are one."""

from __future__ import annotations

import pytest
from programs import assert_equal, program, written

from polyattn.rewriter.rules.cancel import CANCEL

SUM = "D[i] = A[i,j];"


def test_the_pair_goes_as_often_as_it_stands_there() -> None:
    before = program(SUM + "O[i,b] = D[i] 1/D[i] G[i,b];  dZ[i] = 1/D[i] D[i] D[i] 1/D[i] z[i]")
    after = CANCEL.apply(before)
    assert after.defs == ()
    assert repr(after.outputs["O"]) == "[i,b] G[i,b]"
    assert repr(after.outputs["dZ"]) == "[i] z[i]"
    assert_equal(after, before)


@pytest.mark.parametrize(
    ("what", "outputs"),
    {
        "at other indices": "O[i,b] = D[i] A[i,j] 1/D[i'] A[i',j] G[i,b]",
        "of another tensor": "E[i] = C[i,j];  O[i,b] = E[i] 1/D[i] G[i,b]",
        "no other factor has the index": "O[i] = D[i] 1/D[i]",
        "in different terms": "O[i,b] = D[i] G[i,b] + 1/D[i] G[i,b]",
    }.items(),
)
def test_near_misses_are_left_as_they_are(what: str, outputs: str) -> None:
    before = program(SUM + outputs)
    assert written(CANCEL.apply(before)) == written(before), what
