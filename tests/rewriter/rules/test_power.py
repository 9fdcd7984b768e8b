"""power: one polynomial of the score per term."""

from __future__ import annotations

import pytest
from programs import assert_equal, program

from polyattn.errors import RewriteError
from polyattn.rewriter.families.polynomial.power import POWER

S = "S[i,j] = s * Q[i,a] K[j,a];  T[i,j] = Q[i,a] L[j,a];"


def test_powers_become_one_polynomial() -> None:
    before = program(S + "O[i,b] = S[i,j] S[i,j] V[j,b] + 3 * S[i,j] V[j,b] + 2 * V[j,b]")
    after = POWER.apply(before)
    assert repr(after.outputs["O"]) == "[i,b] (2 + 3·S + S^2)[i,j] · V[j,b]"
    assert_equal(after, before)


def test_polynomials_are_multiplied_and_terms_that_differ_in_them_alone_are_added() -> None:
    before = program(S + "O[i,b] = p1(S)[i,j] p1(S)[i,j] V[j,b] - p2(S)[i,j] V[j,b]")
    after = POWER.apply(before)
    assert len(after.outputs["O"].terms) == 1
    assert_equal(after, before)


def test_scores_of_different_terms_stay_apart() -> None:
    before = program(S + "O[i,b] = S[i,j] S[i,j] V[j,b] + T[i,j] T[i,j] V[j,b]")
    after = POWER.apply(before)
    assert repr(after.outputs["O"]) == "[i,b] (S^2)[i,j] · V[j,b] + (T^2)[i,j] · V[j,b]"
    assert_equal(after, before)


def test_a_constant_that_could_join_either_stays() -> None:
    before = program(S + "O[i,b] = S[i,j] S[i,j] V[j,b] + T[i,j] T[i,j] V[j,b] + V[j,b]")
    after = POWER.apply(before)
    assert len(after.outputs["O"].terms) == 3
    assert_equal(after, before)


def test_other_factors_keep_terms_apart() -> None:
    before = program(S + "O[i,b] = S[i,j] S[i,j] V[j,b] + S[i,j] V[j,b] B[j]")
    after = POWER.apply(before)
    assert len(after.outputs["O"].terms) == 2
    assert_equal(after, before)


def test_two_scores_in_one_term_are_refused() -> None:
    with pytest.raises(RewriteError, match="power: two different scores in one term of O"):
        POWER.apply(program(S + "O[i,b] = S[i,j] S[i,j] T[i,j] T[i,j] V[j,b]"))


def test_one_score_at_two_pairs_is_refused() -> None:
    with pytest.raises(RewriteError, match="two different scores in one term"):
        POWER.apply(program(S + "O[i,b] = p2(S)[i,j] p2(S)[i,j'] V[j,b] B[j']"))
