"""The kernels of softmax attention: forward and backward specifications of a form, degree and gradient, cached."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from polyattn.codegen.schedule import schedule, substitute
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import ScheduleError
from polyattn.passes.derive import derive
from polyattn.passes.forms import softmax_form
from polyattn.rewriter.order import plan
from polyattn.rewriter.plan import Node, Plan, node


@dataclass(frozen=True)
class Kernels:
    """Specifications of one site's forward and backward, and the plan that they were made from.

    The forward returns O and the denominators D; the backward forms its states again.
    """

    plan: Plan
    forward: KernelSpec
    saved: tuple[tuple[Node, Node], ...]

    def backward(self, wanted: Sequence[str]) -> KernelSpec:
        """The backward for some of dQ, dK, dV: what is not wanted is not computed."""
        known = dict(self.saved)
        outputs = {name: substitute(self.plan.outputs[name], known) for name in wanted}
        return schedule("backward", outputs, self.plan.near)


@functools.cache
def kernels(causal: bool, degree: int, gradient: str) -> Kernels:
    """The kernels of softmax attention, derived once per (causal, degree, gradient)."""
    made = plan(derive(softmax_form(causal), degree, gradient)[-1].program)
    out = made.outputs["O"]
    if out.op != "contract" or len(out.args) != 2:
        raise ScheduleError(f"the output is not numerator times 1/denominator but {out}")
    inverse = next(a for a in out.args if a.op == "map" and a.attr == "reciprocal")
    numerator = next(a for a in out.args if a is not inverse)
    (denominator,) = inverse.args
    o, d = node("input", (), out.axes, "O"), node("input", (), denominator.axes, "D")
    # N = O ∘ D: the forward keeps the output and the denominators, not the numerator.
    restored = node("contract", (o, d), numerator.axes, (((0, 1), (0,)), (0, 1)))
    saved = [(denominator, d), (numerator, restored), (out, o)]
    outputs = {"O": out, "D": denominator}
    return Kernels(made, schedule("forward", outputs, made.near), tuple(saved))
