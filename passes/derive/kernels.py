"""The kernels of softmax attention: forward and backward specifications of a form, degree and gradient, cached."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy

from polyattn.codegen.phases import schedule_tiles
from polyattn.codegen.schedule import schedule, substitute
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import ScheduleError
from polyattn.passes.derive.derive import after, derive, exact_pipeline
from polyattn.passes.derive.forms import Form, softmax
from polyattn.rewriter.algebra.expr import of
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import E1, E
from polyattn.rewriter.masks.mask import CAUSAL, NONE, Mask, Sums
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import Node, Plan, cost, node
from polyattn.rewriter.rules.rule import ApproximateRule


@dataclass(frozen=True)
class Kernels:
    """Specifications of one site's forward and backward, and the plan that they were made from.

    The forward returns O and the denominators D; the backward forms its states again.
    """

    plan: Plan
    forward: KernelSpec
    saved: tuple[tuple[Node, Node], ...]
    mask: Mask
    rule: ApproximateRule
    names: Mapping[str, Node] = field(default_factory=dict)
    """What the derivation calls values, where it keeps names."""
    backwards: dict[tuple[str, ...], KernelSpec] = field(default_factory=dict, repr=False, compare=False)
    """Those that have been asked for."""

    def backward(self, wanted: Sequence[str]) -> KernelSpec:
        """The backward for some of dQ, dK, dV: what is not wanted is not computed."""
        names = tuple(wanted)
        if names not in self.backwards:
            known = dict(self.saved)
            outputs = {name: substitute(self.plan.outputs[name], known) for name in names}
            self.backwards[names] = _schedule(
                "backward", outputs, self.mask, self.rule, {k: substitute(n, known) for k, n in self.names.items()}
            )
        return self.backwards[names]

    def cost(self, few_values: bool = False) -> sympy.Expr:
        """FLOPs per head of what runs, forward and all of the backward: tiles that are computed again count again.

        ``few_values``: dQ and dK are computed with values of width e', and dV by itself.
        """
        if not few_values:
            return self.forward.cost() + self.backward(("dQ", "dK", "dV")).cost()
        return self.forward.cost() + self.backward(("dQ", "dK")).cost().subs(E, E1) + self.backward(("dV",)).cost()


def _schedule(
    name: str, outputs: Mapping[str, Node], mask: Mask, rule: ApproximateRule, names: Mapping[str, Node]
) -> KernelSpec:
    if mask.sums is Sums.TILES:
        return schedule_tiles(name, outputs, mask, rule, names)
    return schedule(name, outputs, mask, rule)


def saved_by_forward(made: Plan) -> dict[Node, Node]:
    """What the backward reads in place of computing it again: O, the denominators D, and the numerator as O ∘ D.

    Raises:
        ScheduleError: an output that is not a numerator times one over a denominator.
    """
    out = whole = made.outputs["O"]
    while out.op == "sum" and len(out.args) == 1 and out.attr[0] == (1,):
        (out,) = out.args
    inverse = [a for a in out.args if a.op == "map" and a.attr == "reciprocal"]
    if out.op != "contract" or len(out.args) != 2 or len(inverse) != 1:
        raise ScheduleError(f"the output is not numerator times 1/denominator but {out}")
    numerator = next(a for a in out.args if a is not inverse[0])
    (denominator,) = inverse[0].args
    o, d = node("input", (), whole.axes, "O"), node("input", (), denominator.axes, "D")
    if numerator.axes != whole.axes or len(denominator.axes) != 1:
        return {denominator: d, whole: o}
    restored = node("contract", (o, d), numerator.axes, (((0, 1), (0,)), (0, 1)))
    return {denominator: d, numerator: restored, whole: o}


@functools.cache
def exact_plan(form: Form) -> Plan:
    """The plan of a form and its gradients with nothing approximated, ordered and stacked like any other."""
    return plan(after(exact_pipeline(form)))


@dataclass(frozen=True)
class ExactNodes:
    """Nodes of exact attention. Gradients, by name, read the inputs G, O and D: of the output, and of whole rows."""

    numerator: Node
    denominator: Node
    gradients: Mapping[str, Node]


@functools.cache
def exact_nodes(mask: Mask) -> ExactNodes:
    """What exact attention is computed from where its pairs of tokens are few (runtime/rectangle.py)."""
    made = exact_plan(softmax(CAUSAL if mask.hides else NONE))
    known = saved_by_forward(made)
    denominator = next(n for n, read in known.items() if read.attr == "D")
    numerator = next(n for n, read in known.items() if read.op == "contract")
    return ExactNodes(
        numerator, denominator, {name: substitute(made.outputs[name], known) for name in ("dQ", "dK", "dV")}
    )


def exact_cost(form: Form) -> sympy.Expr:
    """FLOPs per head of exact attention, forward and a backward that computes the scores again (math.md §7)."""
    made = exact_plan(form)
    known = saved_by_forward(made)
    gradients = [substitute(n, known) for name, n in made.outputs.items() if name != "O"]
    return made.cost(["O"]) + cost(gradients, made.near)


@functools.cache
def kernels(form: Form, rule: ApproximateRule, gradient: str) -> Kernels:
    """The kernels of a form of softmax attention, derived once for each rule and gradient."""
    program = derive(form, rule, gradient)[-1].program
    made = plan(program)
    made = replace(made, near=form.mask.near_chunks)
    labels = [d.label for d in program.defs] if rule.keeps_names else []
    names = plan(Program(program.defs, {label: of(program[label]) for label in labels})).outputs
    known = saved_by_forward(made)
    denominator = next(n for n, read in known.items() if read.attr == "D")
    outputs = {"O": made.outputs["O"], "D": denominator}
    forward = _schedule("forward", outputs, form.mask, rule, names)
    return Kernels(made, forward, tuple(known.items()), form.mask, rule, names)
