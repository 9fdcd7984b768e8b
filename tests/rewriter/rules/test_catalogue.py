"""docs/rules.md is made from the rules themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polyattn.passes.derive.catalogue import catalogue, flat
from polyattn.passes.derive.derive import derive, exact_pipeline, pipeline
from polyattn.passes.derive.forms import FORMS, softmax
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.families.skeleton.rule import SkeletonRule
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.rewriter.rules.rule import ApproximateRule, Rule

ROOT = Path(__file__).parents[3]
GRADIENTS = ("consistent", "substituted", "projected")
RULES = [PolynomialRule(2), SkeletonRule()]


def names(rules: tuple[Rule, ...]) -> str:
    return " ".join(rule.name for rule in flat(rules))


def test_the_page_is_what_the_rules_say(golden: Callable[..., None]) -> None:
    """``make golden`` writes it."""
    golden("rules.md", catalogue(), folder=ROOT / "docs")


def test_a_stale_page_fails(golden: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "rules.md").write_text(catalogue().replace("compress", "squeeze"), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"rules\.md changed"):
        golden("rules.md", catalogue(), {}, tmp_path)


def test_lists_of_rules_are_as_they_are_read() -> None:
    consistent = pipeline(softmax(NONE), PolynomialRule(2), "consistent")
    assert names(consistent) == (
        "lift inline reuse approximate differentiate inline reuse power kronecker absorb compress stack"
    )
    projected = pipeline(softmax(CAUSAL), SkeletonRule(), "projected")
    assert names(projected) == "lift inline reuse split approximate absorb stack project"
    assert names(exact_pipeline(softmax(NONE))) == "lift inline reuse absorb stack"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.title)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_steps_of_a_derivation_are_its_list(rule: ApproximateRule, gradient: str) -> None:
    form = softmax(CAUSAL, key_bias=True)
    steps, rules = derive(form, rule, gradient), pipeline(form, rule, gradient)
    assert [(step.rule, step.note) for step in steps] == [(made.name, made.note) for made in rules]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.title)
def test_every_rule_says_what_it_is_and_is_equal_to_itself(rule: ApproximateRule, gradient: str) -> None:
    for form in FORMS.values():
        first, second = pipeline(form, rule, gradient), pipeline(form, rule, gradient)
        assert first == second
        assert hash(first) == hash(second)
        for made in flat(first):
            assert "→" in made.formula
            assert "math.md §" in made.source
            assert made.note
