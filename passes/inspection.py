"""What people read of a site: its derivation, its kernels, and runnable graphs of its forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from polyattn.codegen import target
from polyattn.codegen.evaluate import Evaluation, block_length
from polyattn.codegen.shift import move
from polyattn.passes.derive import Step, derive
from polyattn.passes.forms import softmax_form
from polyattn.passes.kernels import exact_plan, kernels
from polyattn.passes.log import Log, formulas
from polyattn.rewriter.features import full, rank
from polyattn.rewriter.lowrank import Approximation
from polyattn.rewriter.order import plan
from polyattn.rewriter.plan import walk


@dataclass(frozen=True)
class Derivation:
    """The rules applied to one form, in order, and the costs of exact attention and of both backwards.

    ``str`` is the readable log; ``shape`` (``n_q``, ``n_k``, ``d``, ``e``, ``chunk``) adds numbers to it.
    """

    steps: tuple[Step, ...]
    form: str
    degree: int | None
    gradient: str
    shape: Mapping[str, int] | None = None

    def costs(self) -> dict[str, sympy.Expr]:
        """FLOPs per head of the plans, in n, d, e, r, r' and C; a backward is given all that the forward computed."""
        found = {}
        dense = exact_plan(self.form)
        found["exact forward"] = dense.cost(["O"])
        found["exact backward"] = dense.cost(_gradients(dense.outputs), walk([dense.outputs["O"]]))
        for gradient in ("consistent", "substituted"):
            made = plan(derive(self.form, self.degree, gradient)[-1].program)
            found["low-rank forward"] = made.cost(["O"])
            found[f"{gradient} backward"] = made.cost(_gradients(made.outputs), walk([made.outputs["O"]]))
        return found

    def __str__(self) -> str:
        others = {name: derive(self.form, self.degree, name)[-1].program for name in ("consistent", "substituted")}
        log = Log(self.form, self.degree, self.gradient)
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


def derivation(
    *,
    causal: bool,
    degree: int | None,
    gradient: str,
    shape: Mapping[str, int] | None = None,
    weighted: bool = False,
    band: bool = False,
) -> Derivation:
    """The derivation of softmax attention; ``str`` of it is the readable log, with numbers if a shape is given.

    ``weighted``: with weights of the keys, as shifted queries leave them (codegen/shift.py); ``band``: without a mask,
    with an exact near field.
    """
    return derivation_of(softmax_form(causal, weighted, band), degree, gradient, shape)


def derivation_of(form: str, degree: int | None, gradient: str, shape: Mapping[str, int] | None = None) -> Derivation:
    """The derivation of any form of ``passes/forms.py``."""
    return Derivation(derive(form, degree, gradient), form, degree, gradient, shape)


def sources(
    *, causal: bool, degree: int | None, gradient: str, weighted: bool = False, band: bool = False
) -> dict[str, str]:
    """Texts by name: ``forward.specification``, ``forward.cpu``, ``forward.triton``, and the same of ``backward``."""
    made = kernels(causal, degree, gradient, weighted, band)
    specs = {"forward": made.forward, "backward": made.backward(("dQ", "dK", "dV"))}
    return {f"{name}.{kind}": text for name, spec in specs.items() for kind, text in target.sources(spec).items()}


def graphs(
    *,
    causal: bool,
    degree: int,
    gradient: str,
    shape: Mapping[str, int],
    scale: float,
    chunk: int | None,
    shift: str = "none",
    band: bool = False,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Runnable aten graphs of the rewritten forward (Q, K, V → O, D) and backward (… G, O, D → dQ, dK, dV).

    Their inputs are [heads, groups, n_q, ·] and [heads, n_k, ·] float32; loops over blocks stand unrolled.
    ``chunk`` is the chunk length of a causal site, None without a mask; ``shift`` one of ``codegen.shift.STATISTICS``.
    """
    from functorch import make_fx

    made = kernels(causal, degree, gradient, shift != "none", band)
    d, e = shape["d"], shape["e"]
    heads, groups = shape["batch"] * shape["kv_heads"], shape["heads"] // shape["kv_heads"]
    scalars = {"s": scale, **Approximation(degree).values}
    basis = full(d, degree)
    block = chunk if chunk is not None else block_length(rank(basis), groups)
    q, k, v = (
        torch.zeros(heads, groups, shape["n_q"], d),
        torch.zeros(heads, shape["n_k"], d),
        torch.zeros(heads, shape["n_k"], e),
    )
    g, denominators = torch.zeros(heads, groups, shape["n_q"], e), torch.ones(heads, groups, shape["n_q"])

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = {"V": v, **move(q, k, scale, shift, chunk or 0).inputs}
        result = Evaluation(made.forward, inputs, scalars, basis, block).run()
        return result["O"], result["D"]

    def backward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(("Q", "K", "V", "G", "O", "D"), tensors, strict=True))
        moved = move(inputs["Q"], inputs["K"], scale, shift, chunk or 0)
        inputs.update(moved.inputs)
        names = ("dQ", "dK", "dV", *(["dB"] if "B" in moved.inputs else []))
        result = Evaluation(made.backward(names), inputs, scalars, basis, block).run()
        return result["dQ"], moved.key_gradient(result["dK"], result.get("dB"), scale), result["dV"]

    return make_fx(forward)(q, k, v), make_fx(backward)(q, k, v, g, torch.zeros_like(g), denominators)
