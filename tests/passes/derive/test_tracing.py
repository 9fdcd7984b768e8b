"""Lift and differentiate are rules like others: what they refuse, and the outputs that they declare."""

from __future__ import annotations

import pytest
from programs import program

from polyattn.errors import RewriteError
from polyattn.passes.derive.derive import derive, exact, lifting
from polyattn.passes.derive.forms import FORMS, softmax
from polyattn.passes.derive.tracing import Differentiate, Lift
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.verify import output_axes
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.families.skeleton.rule import SkeletonRule
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.rewriter.rules.rule import ApproximateRule

EMPTY = Program((), {})


@pytest.mark.parametrize("name", FORMS)
def test_lift_makes_the_outputs_that_it_declares(name: str) -> None:
    form = FORMS[name]
    gradients = {f"d{t.name}": t.kinds for t in form.inputs if t.name in form.differentiable}
    assert output_axes(exact(form, backward=False)) == {"O": form.out}
    assert output_axes(exact(form)) == {"O": form.out, **gradients}


@pytest.mark.parametrize("rule", [PolynomialRule(2), SkeletonRule()], ids=lambda rule: rule.title)
def test_differentiate_adds_the_gradients(rule: ApproximateRule) -> None:
    steps = {step.rule: step.program for step in derive(softmax(CAUSAL), rule, "consistent")}
    assert set(steps["approximate"].outputs) == {"O"}
    assert set(steps["differentiate"].outputs) == {"O", "dQ", "dK", "dV"}
    assert steps["differentiate"].outputs.keys() == output_axes(exact(softmax(CAUSAL))).keys()


def test_a_lift_onto_something_is_refused() -> None:
    with pytest.raises(RewriteError, match="lift: the program has outputs already: O"):
        Lift(softmax(NONE), True).apply(program("O[i,b] = G[i,b]"))


def test_what_has_gradients_is_not_differentiated_again() -> None:
    with pytest.raises(RewriteError, match="differentiate: the program has outputs beside O: dQ, dK, dV"):
        Differentiate(softmax(NONE), (), ()).apply(exact(softmax(NONE)))


def test_notes_say_what_is_traced() -> None:
    assert Lift(softmax(CAUSAL), True).note == ("softmax(s Q Kᵀ, causal) V and its autograd graph, traced (math.md §1)")
    assert Lift(softmax(CAUSAL), False).note == "softmax(s Q Kᵀ, causal) V (math.md §1)"


def test_rules_that_a_log_shows_together_are_one_rule() -> None:
    (together,) = lifting(softmax(NONE), False)
    assert [rule.name for rule in together.rules] == ["lift", "inline", "reuse"]
    assert (together.name, together.note) == ("lift", "softmax(s Q Kᵀ) V (math.md §1)")
    assert together.apply(EMPTY).outputs == exact(softmax(NONE), False).outputs
    with pytest.raises(RewriteError, match="lift: the program has outputs already"):
        together.apply(exact(softmax(NONE), False))
