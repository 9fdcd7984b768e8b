"""The approximate rules: what stands in place of exp, where exp stays, their bound, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import dense, program, values, written

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import HEAD, KEY, QUERY, VALUE
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.families.skeleton.rule import CORE, LK, LQ, SkeletonRule
from polyattn.rewriter.rules.rule import ApproximateRule

RULES = pytest.mark.parametrize("rule", [PolynomialRule(2), SkeletonRule()], ids=lambda rule: rule.title)
PLAIN = "S[i,j] = s * Q[i,a] K[j,a];  O[i,b] = exp(S)[i,j] V[j,b]"
SPLIT = PLAIN.replace("O[i,b] = exp(S)[i,j]", "O[i,b] = M_far[i,j] exp(S)[i,j] V[j,b] + M_near[i,j] exp(S)[i,j]")


def approximated(rule: ApproximateRule) -> torch.Tensor:
    """What stands in place of exp(s Q Kᵀ), densely."""
    q, k = 0.7 * dense("Q", (QUERY, HEAD)), dense("K", (KEY, HEAD))
    if isinstance(rule, PolynomialRule):
        return torch.stack([1.3 / math.factorial(m) * (q @ k.mT) ** m for m in range(rule.degree + 1)]).sum(0)
    kappa, lam, core = (dense(leaf.label, leaf.axes) for leaf in (LK, LQ, CORE))
    return (q @ kappa.mT).exp() @ core @ (0.7 * k @ lam.mT).exp().mT


@RULES
def test_exp_becomes_the_features(rule: ApproximateRule) -> None:
    after = rule.apply(program(PLAIN))
    torch.testing.assert_close(values(after)["O"], approximated(rule) @ dense("V", (KEY, VALUE)))


@RULES
def test_near_pairs_keep_exp(rule: ApproximateRule) -> None:
    after = rule.apply(program(SPLIT))
    near = [term for term in after.outputs["O"].terms if "M_near" in repr(term)]
    assert [repr(term) for term in near] == ["M_near[i,j] · V[j,b] · exp(S)[i,j]"]
    far = [term for term in after.outputs["O"].terms if "M_far" in repr(term)]
    assert "exp(S)" not in repr(far)


def test_the_polynomial_of_a_degree() -> None:
    after = PolynomialRule(3).apply(program(PLAIN))
    assert repr(after.outputs["O"]) == "[i,b] (a0 + a1·S + a2·S^2 + a3·S^3)[i,j] · V[j,b]"


def test_skeleton_features_are_written_in_the_algebra() -> None:
    after = SkeletonRule().apply(program(PLAIN))
    assert repr(after.outputs["O"]) == "[i,b] V[j,b] · Z[ρ,σ] · exp(S_KQ)[j,σ] · exp(S_QK)[i,ρ]"
    assert repr(after["S_QK"].expr) == "[i,ρ] s · Q[i,a] · LK[ρ,a]"


@given(bound=st.floats(0.05, 3), degree=st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_bound_holds(bound: float, degree: int) -> None:
    rule = PolynomialRule(degree)
    x = torch.linspace(-bound, bound, 401, dtype=torch.float64)
    p = torch.stack([c * x**m for m, c in enumerate(rule.values.values())]).sum(0)
    assert float((p * (-x).exp() - 1).abs().max()) <= rule.relative_error(bound) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rule", "text", "reason"),
    [
        (
            PolynomialRule(2),
            "T[j] = K[j,a] u[a];  O[j,b] = exp(T)[j] V[j,b]",
            r"exp\(T\) is not the exponential of a",
        ),
        (
            SkeletonRule(),
            PLAIN.replace("K[j,a];", "K[j,a] + B[i,j];"),
            "approximate: the score S is a sum",
        ),
        (SkeletonRule(), PLAIN.replace("K[j,a];", "K[j,a] B[j];"), "the score S is not a product U Wᵀ"),
        (SkeletonRule(), "O[i,b] = exp(S)[i,j] V[j,b]", "the score S has no definition"),
    ],
)
def test_near_misses_are_refused(rule: ApproximateRule, text: str, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        rule.apply(program(text))


def test_near_pairs_may_have_any_score() -> None:
    """exp stays there, so that nothing is asked of its argument."""
    text = "S[i,j] = Q[i,a] K[j,a] + B[i,j];  O[i,b] = M_near[i,j] exp(S)[i,j] V[j,b]"
    before = program(text)
    assert written(SkeletonRule().apply(before)) == written(before)


@RULES
def test_domain_bound_and_sizes_are_said(rule: ApproximateRule) -> None:
    assert rule.domain
    assert rule.bound
    assert rule.title in ("degree 2", "skeleton features")
    assert rule.rank in rule.growth
    assert set(rule.ranks({"d": 16})) <= set(rule.growth)
    assert next(iter(rule.ranks({"d": 16}))) == rule.rank
    assert bool(rule.inputs_note) == bool(rule.inputs)
