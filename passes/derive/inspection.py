"""What people read of a site: its derivation, its kernels, and runnable graphs of its forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from polyattn.codegen import targets
from polyattn.passes.derive.derive import AppliedRule, derive
from polyattn.passes.derive.forms import Form
from polyattn.passes.derive.kernels import exact_plan, kernels
from polyattn.passes.derive.log import Log, formulas
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import walk
from polyattn.rewriter.rules.rule import ApproximateRule


@dataclass(frozen=True)
class Derivation:
    """The rules applied to one form, in order, and the costs of exact attention and of both backwards.

    ``str`` is the readable log; ``shape`` (``n_q``, ``n_k``, ``d``, ``e``, ``chunk``) adds numbers to it.
    """

    steps: tuple[AppliedRule, ...]
    form: Form
    rule: ApproximateRule
    gradient: str
    shape: Mapping[str, int] | None = None

    @property
    def _gradients(self) -> tuple[str, ...]:
        """The gradients that a log compares."""
        return tuple(name for name in ("consistent", "substituted") if name in self.rule.gradients)

    def costs(self) -> dict[str, sympy.Expr]:
        """FLOPs per head of the plans, in n, d, e, r, r' and C; a backward is given all that the forward computed."""
        found = {}
        dense = exact_plan(self.form)
        found["exact forward"] = dense.cost(["O"])
        found["exact backward"] = dense.cost(_gradients(dense.outputs), walk([dense.outputs["O"]]))
        for gradient in self._gradients:
            made = plan(derive(self.form, self.rule, gradient)[-1].program)
            found["low-rank forward"] = made.cost(["O"])
            found[f"{gradient} backward"] = made.cost(_gradients(made.outputs), walk([made.outputs["O"]]))
        return found

    def __str__(self) -> str:
        others = {name: derive(self.form, self.rule, name)[-1].program for name in self._gradients}
        log = Log(self.form, self.rule, self.gradient)
        return log.write(self.steps, others, self.costs(), self.shape)

    def latex(self) -> str:
        """The formulas of every step as displays, a comment with the rule before them."""
        lines = []
        for number, step in enumerate(self.steps, 1):
            lines.append(f"% {number}. {step.rule}: {step.note}")
            lines += [rf"\[ {formula} \]" for formula in formulas(step.program)]
        return "\n".join(lines)


def _gradients(outputs: Mapping[str, object]) -> list[str]:
    return [name for name in outputs if name != "O"]


def derivation(form: Form, rule: ApproximateRule, gradient: str, shape: Mapping[str, int] | None = None) -> Derivation:
    """The derivation of a form; ``str`` of it is the readable log, with numbers if a shape is given.

    Args:
        form: one of ``passes/derive/forms.py``, such as ``softmax(CAUSAL)``.
        rule: what stands in place of exp, such as ``PolynomialRule(2)``.
        gradient: ``consistent``, ``substituted`` or ``projected``.
        shape: sizes ``n_q``, ``n_k``, ``d``, ``e`` and ``chunk``.
    """
    return Derivation(derive(form, rule, gradient), form, rule, gradient, shape)


def sources(form: Form, rule: ApproximateRule, gradient: str) -> dict[str, str]:
    """Texts by name: ``forward.specification``, ``forward.cpu``, ``forward.triton``, and the same of ``backward``."""
    made = kernels(form, rule, gradient)
    specs = {"forward": made.forward, "backward": made.backward(("dQ", "dK", "dV"))}
    return {f"{name}.{kind}": text for name, spec in specs.items() for kind, text in targets.sources(spec).items()}
