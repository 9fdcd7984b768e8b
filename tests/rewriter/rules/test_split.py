"""split: a mask becomes near pairs and far ones."""

from __future__ import annotations

import pytest
from programs import assert_equal, program

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import KEY, QUERY, Factor, Indicator
from polyattn.rewriter.masks.mask import CAUSAL, LOCAL_WINDOW, NONE, Mask
from polyattn.rewriter.rules.split import Split

MASKED = "S[i,j] = s * Q[i,a] K[j,a];  N[i,b] = M[i,j] exp(S)[i,j] V[j,b];  O[i,b] = N[i,b] z[i]"


def test_a_mask_is_near_and_far() -> None:
    before = program(MASKED)
    after = Split(CAUSAL).apply(before)
    assert repr(after["N"].expr) == "[i,b] M_near[i,j] · V[j,b] · exp(S)[i,j] + M_far[i,j] · V[j,b] · exp(S)[i,j]"
    assert_equal(after, before)


def test_the_note_is_the_masks() -> None:
    assert Split(CAUSAL).note == CAUSAL.split
    assert Split(LOCAL_WINDOW).note == LOCAL_WINDOW.split
    assert Split(CAUSAL) == Split(CAUSAL) != Split(LOCAL_WINDOW)


@pytest.mark.parametrize(
    ("mask", "text", "reason"),
    [
        (NONE, MASKED, "split: the mask none has no near pairs"),
        (CAUSAL, "O[i,b] = A[i,j] V[j,b]", "has no factor M of the mask causal: it holds none"),
        (CAUSAL, MASKED.replace("M[", "M_near["), "has no factor M of the mask causal: it holds M_near"),
        (LOCAL_WINDOW, MASKED, "has no factor M of the mask local window: it holds M"),
    ],
)
def test_near_misses_are_refused(mask: Mask, text: str, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        Split(mask).apply(program(text))


def test_the_factor_is_the_one_that_forms_hold() -> None:
    (factor,) = (f for f in program(MASKED)["N"].expr.terms[0].factors if isinstance(f.tensor, Indicator))
    assert factor == Factor(Indicator("causal", (QUERY, KEY)), factor.indices)
    assert factor.tensor == CAUSAL.indicator
