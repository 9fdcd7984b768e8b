"""Derive: a visible list of rules, from a form to low-rank programs (both backwards), and the programs after them.

Lift and differentiate are the steps of tracing: their right side is what torch's autograd says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from polyattn.passes.derive.forms import Form
from polyattn.passes.derive.tracing import Differentiate, Lift
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.rules.absorb import ABSORB
from polyattn.rewriter.rules.adjoint import ADJOINT
from polyattn.rewriter.rules.inline import INLINE
from polyattn.rewriter.rules.project import PROJECT
from polyattn.rewriter.rules.reuse import REUSE
from polyattn.rewriter.rules.rule import ApproximateRule, Rule
from polyattn.rewriter.rules.split import Split
from polyattn.rewriter.rules.stack import STACK


@dataclass(frozen=True)
class Together(Rule):
    """Rules that a log shows as one step, under the first one's name and note."""

    rules: tuple[Rule, ...]

    @property
    def name(self) -> str:
        """The first rule's."""
        return self.rules[0].name

    @property
    def formula(self) -> str:
        """Those of all rules."""
        return ";  ".join(rule.formula for rule in self.rules)

    @property
    def source(self) -> str:
        """The first rule's."""
        return self.rules[0].source

    @property
    def note(self) -> str:
        """The first rule's."""
        return self.rules[0].note

    def check(self, program: Program) -> str | None:
        """The first rule's: the others are checked when their turn comes."""
        return self.rules[0].check(program)

    def axes(self, program: Program) -> Mapping[str, tuple[Kind, ...]]:
        """Those that the first rule declares: what follows it is an identity."""
        return self.rules[0].axes(program)

    def rewrite(self, program: Program) -> Program:
        """One rule after the other, each with its own checks."""
        for rule in self.rules:
            program = rule.apply(program)
        return program


def lifting(form: Form, backward: bool = True) -> tuple[Together]:
    """The form, with or without its autograd graph, in the algebra; nothing approximated."""
    return (Together((Lift(form, backward), INLINE, REUSE)),)


def exact_pipeline(form: Form) -> tuple[Rule, ...]:
    """The rules of exact attention with its gradients, stacked like any other program."""
    return (*lifting(form), ABSORB, STACK)


def pipeline(form: Form, rule: ApproximateRule, gradient: str) -> tuple[Rule, ...]:
    """The rules of a derivation, in order; the first one makes a program from nothing.

    Args:
        rule: what stands in place of exp.
        gradient: ``substituted`` puts the features into the exact autograd graph (math.md §2a); ``consistent`` traces
            the vjp of the substituted forward (§2b); ``projected`` is substituted, with dQ and dK in coordinates of a
            few directions.
    """
    split = (*((Split(form.mask),) if form.mask.split else ()), *rule.before)
    if gradient == "consistent" and rule.keeps_names:
        return (*lifting(form, backward=False), *split, rule, ADJOINT, *rule.then(gradient))
    if gradient == "consistent":
        return (
            *lifting(form, backward=False),
            *split,
            rule,
            Differentiate(form, rule.inputs, rule.scalars),
            Together((INLINE, REUSE)),
            *rule.then(gradient),
            STACK,
        )
    project = (PROJECT,) if gradient == "projected" else ()
    return (*lifting(form), *split, rule, *rule.then(gradient), STACK, *project)


@dataclass(frozen=True)
class AppliedRule:
    """One rule of a derivation: its name, why it holds (with its source in math.md), the program after it."""

    rule: str
    note: str
    program: Program


@functools.cache
def after(rules: tuple[Rule, ...]) -> Program:
    """The program after a list of rules; lists that begin alike share what they have in common."""
    return rules[-1].apply(after(rules[:-1])) if rules else Program((), {})


@functools.cache
def exact(form: Form, backward: bool = True) -> Program:
    """The form and its traced autograd graph in the algebra; nothing approximated."""
    return after(lifting(form, backward))


@functools.cache
def derive(form: Form, rule: ApproximateRule, gradient: str) -> tuple[AppliedRule, ...]:
    """The derivation of the low-rank program; the last step's program computes O and every gradient.

    The arguments are those of :func:`pipeline`.
    """
    rules = pipeline(form, rule, gradient)
    return tuple(AppliedRule(made.name, made.note, after(rules[: n + 1])) for n, made in enumerate(rules))
