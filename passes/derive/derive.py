"""Derive: form → exact program → low-rank programs (both backwards), cached once per form, degree and gradient."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from polyattn.passes.derive.forms import Form, Function
from polyattn.passes.derive.lift import Lifter, kinds_by_size, trace
from polyattn.rewriter.algebra.expr import Indicator, Program, Tensor
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.rules.inline import INLINE
from polyattn.rewriter.rules.project import PROJECT
from polyattn.rewriter.rules.reuse import REUSE
from polyattn.rewriter.rules.rule import ApproximateRule, Rule
from polyattn.rewriter.rules.split import split_rule
from polyattn.rewriter.rules.stack import STACK


@dataclass(frozen=True)
class Step:
    """One rule of a derivation: its name, why it holds (with its source in math.md), the program after it."""

    rule: str
    note: str
    program: Program


def _lift(form: Form, function: Function, inputs: Sequence[Tensor], scalars: Sequence[str], backward: bool) -> Program:
    """Trace a function {name: tensor} → O (and its vjp) on tiny inputs and lift the graph."""
    size = kinds_by_size([k for t in inputs for k in t.kinds] + list(form.out))
    generator = torch.Generator().manual_seed(0)

    def dense(tensor: Tensor) -> torch.Tensor:
        return torch.rand([size[k] for k in tensor.kinds], dtype=torch.float64, generator=generator)

    names = [t.name for t in inputs]
    values = [dense(t) for t in inputs] + [torch.full((), 0.5, dtype=torch.float64) for _ in scalars]
    wanted = form.differentiable

    def forward(*args: torch.Tensor) -> torch.Tensor:
        return function(dict(zip([*names, *scalars], args, strict=True)))

    def joint(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        env = dict(zip([*names, *scalars], args[:-1], strict=True))
        free = {name: env[name] for name in wanted}
        pulled = torch.func.vjp(lambda part: function({**env, **part}), free)
        out, pull = pulled[0], pulled[1]
        (gradients,) = pull(args[-1])
        return (out, *(gradients[name] for name in wanted))

    leaves: list[Tensor | sympy.Symbol] = [*inputs, *(sympy.Symbol(s, positive=True) for s in scalars)]
    if not backward:
        return Lifter(leaves).lift(trace(forward, values).graph, ["O"])
    graph = trace(joint, [*values, dense(form.cotangent)]).graph
    return Lifter([*leaves, form.cotangent]).lift(graph, ["O", *("d" + name for name in wanted)])


@functools.cache
def exact(form: Form, backward: bool = True) -> Program:
    """The form and its traced autograd graph in the algebra; nothing approximated."""
    return REUSE.apply(INLINE.apply(_lift(form, form.function, form.inputs, form.scalars, backward)))


def pipeline(form: Form, rule: ApproximateRule, gradient: str) -> tuple[Rule, ...]:
    """The rules of a derivation, in order, after the form has been lifted (with its autograd graph, but for the
    consistent gradient).

    ``substituted`` puts the features into the exact autograd graph (math.md §2a); ``consistent`` traces the vjp of the
    substituted forward (§2b). ``projected`` is substituted, with dQ and dK in coordinates of a few directions.
    """
    rules: list[Rule] = []
    if form.mask.chunked:
        rules.append(split_rule(form.mask))
    rules.append(Rule(rule.name, rule.formula, rule.source, rule.note, rule.rewrite))
    if gradient == "consistent":
        rules += [_differentiate_rule(form, rule), INLINE, *rule.after_differentiation]
    rules += [*rule.then, STACK]
    if gradient == "projected":
        rules.append(PROJECT)
    return tuple(rules)


@functools.cache
def derive(form: Form, rule: ApproximateRule, gradient: str) -> tuple[Step, ...]:
    """The derivation of the low-rank program; the last step's program computes O and every gradient.

    Args:
        rule: what stands in place of exp.
        gradient: ``consistent``, ``substituted`` or ``projected``; see :func:`pipeline`.
    """
    both = gradient != "consistent"
    note = f"{form.text}" + (" and its autograd graph, traced (math.md §1)" if both else " (math.md §1)")
    program = exact(form, both)
    steps = [Step("lift", note, program)]
    for made in pipeline(form, rule, gradient):
        program = made.apply(program)
        if made is INLINE:
            program = REUSE.apply(program)
        steps.append(Step(made.name, made.note, program))
    return tuple(steps)


def _differentiate_rule(form: Form, rule: ApproximateRule) -> Rule:
    return Rule(
        "differentiate",
        "O → O, dX for every input X",
        "math.md §2b, consistent gradient",
        "the vjp of the substituted forward, traced (§2b)",
        functools.partial(_differentiate, form, rule),
    )


def _differentiate(form: Form, rule: ApproximateRule, program: Program) -> Program:
    pairs = [t.axes for t in form.inputs if isinstance(t, Indicator)]
    masks = tuple(Indicator(which, axes) for axes in pairs for which in ("near", "far"))
    inputs = [*(t for t in form.inputs if not isinstance(t, Indicator)), *masks, *rule.inputs]
    scalars = [*form.scalars, *(c.name for c in rule.scalars)]

    def forward(env: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return Interpreter(env, env).program(program)["O"]

    return _lift(form, forward, inputs, scalars, backward=True)
