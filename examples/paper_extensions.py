"""Beyond the plain layer: several heads, a causal mask, and prompt tuning, where only the input has a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import paper_model
import torch
from paper_gradients import COMPONENTS, GRADIENTS, compiled, errors, gradients, relative
from paper_model import Config, Model
from torch.utils.flop_counter import FlopCounterMode

from polyattn.passes.derive.derive import derive
from polyattn.passes.derive.forms import PAPER, softmax
from polyattn.passes.derive.kernels import kernels
from polyattn.rewriter.algebra.expr import N_K, N_Q, R1, D, E, N, R
from polyattn.rewriter.algebra.monomials import full, rank
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import walk

VARIANTS: Mapping[str, dict[str, Any]] = {
    "2 heads, added": {"heads": 2},
    "2 heads, concatenated": {"heads": 2, "concat": True},
    "causal mask": {"causal": True},
    "2 heads, concatenated, causal mask": {"heads": 2, "concat": True, "causal": True},
    "GELU in place of the MLP": {"mlp": False},
}


def variants(
    base: Config, tokens: int, names: Iterable[str], degrees: Iterable[int]
) -> dict[tuple[str, str, int], dict[str, float]]:
    """(variant, gradient, degree) → the worst relative error over the layers of dX, dW and dW_V."""
    found = {}
    for name in names:
        config = dataclasses.replace(base, **VARIANTS[name])
        model = Model(config).double()
        x = paper_model.inputs(config, tokens).double()
        loss = paper_model.losses(config, tokens)["cross-entropy"]
        exact = gradients(model, model, x, loss)
        for gradient in GRADIENTS:
            for degree in degrees:
                # inside a chunk a causal site is exact: one chunk over all tokens would approximate nothing
                run = compiled(model, degree, gradient, causal_chunk=max(1, tokens // 4))
                every = errors(gradients(run, model, x, loss), exact)
                found[name, gradient, degree] = {
                    component: max(error for (_, of), error in every.items() if of == component)
                    for component in COMPONENTS
                }
    return found


@dataclasses.dataclass(frozen=True)
class Trained:
    """One backward of the compiled model: what it needed, and its floating point operations."""

    needs: tuple[tuple[bool, bool, bool], ...]
    """Per layer, first to last: whether the attention's backward was asked for dQ, dK and dV."""
    around: int
    """FLOPs of the matrix products around the attentions, as torch counts them while they run."""
    attention: int
    """FLOPs of the attentions' backward, from the specification of what was asked for."""
    prompt_error: float | None
    """Relative error of the prompt's gradient against float64 autograd through exact attention."""
    weights_without: int
    """Parameters that got no gradient."""

    @property
    def total(self) -> int:
        return self.around + self.attention


def prompt_tuning(base: Config, tokens: int, degree: int = 2, gradient: str = "substituted") -> dict[str, Trained]:
    """The same loss with everything trained, with the weights alone, and with a prompt alone.

    The prompt is a quarter of the tokens: a trained matrix in front of a frozen text, as in prompt tuning.
    """
    length = max(1, tokens // 4)
    x = paper_model.inputs(base, tokens).double()
    prompt, text = x[:, :length], x[:, length:]
    loss = paper_model.losses(base, tokens)["cross-entropy"]
    offsets = [torch.zeros((), dtype=torch.float64)] * base.layers
    found = {}
    for name, train_prompt, train_weights in (
        ("prompt and weights", True, True),
        ("weights alone", False, True),
        ("prompt alone (prompt tuning)", True, False),
    ):
        model = Model(base).double().requires_grad_(train_weights)
        soft = prompt.clone().requires_grad_(train_prompt)

        def value(run: Any, soft: torch.Tensor = soft) -> torch.Tensor:
            return loss(run(torch.cat([soft, text], dim=1), offsets))

        reached = value(compiled(model, degree, gradient))
        needs: list[tuple[bool, bool, bool]] = []
        with FlopCounterMode(display=False, custom_mapping=counting(degree, gradient, needs)) as counter:
            reached.backward()  # type: ignore[no-untyped-call]
        attention = counter.get_flop_counts()["Global"][torch.ops.polyattn.attention_backward]
        around = counter.get_total_flops() - attention
        missing = sum(parameter.grad is None for parameter in model.parameters())
        error = None
        if soft.grad is not None:
            (exact,) = torch.autograd.grad(value(model), [soft])
            error = relative(soft.grad, exact)
        found[name] = Trained(tuple(reversed(needs)), around, attention, error, missing)
    return found


def counting(degree: int, gradient: str, needs: list[tuple[bool, bool, bool]]) -> dict[Any, Callable[..., int]]:
    """A formula for torch's counter: the FLOPs of one attention's backward, restricted to what is needed."""
    import polyattn.runtime.ops  # noqa: F401  (the operator is registered when it is imported)

    operator = torch.ops.polyattn.attention_backward
    places = {argument.name: place for place, argument in enumerate(operator.default._schema.arguments)}

    def formula(*arguments: Any, **_: Any) -> int:
        q, k, v = (arguments[places[name]] for name in "qkv")
        asked = arguments[places["needs"]]
        needs.append((asked[0], asked[1], asked[2]))
        wanted = tuple(name for name, need in zip(("dQ", "dK", "dV"), asked, strict=True) if need)
        return int(q.shape[0] * q.shape[1]) * backward_flops(
            wanted, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], degree, gradient
        )

    formula._get_raw = True  # type: ignore[attr-defined]  # torch's way to ask for tensors, not shapes
    return {operator: formula}


def backward_flops(
    wanted: tuple[str, ...], n_q: int, n_k: int, d: int, e: int, degree: int, gradient: str, causal: bool = False
) -> int:
    """FLOPs per head of the backward that computes only what is wanted."""
    cost = kernels(softmax(CAUSAL if causal else NONE), PolynomialRule(degree), gradient).backward(wanted).cost()
    return int(cost.subs({N_Q: n_q, N_K: n_k, D: d, E: e, R: rank(full(d, degree)), R1: rank(full(d, degree - 1))}))


def algebra_flops(tokens: int, width: int, degree: int = 2) -> tuple[int, int]:
    """FLOPs of the paper's layer, backward after its forward: (dX, dW and dW_V, dX alone)."""
    made = plan(derive(PAPER, PolynomialRule(degree), "substituted")[-1].program)
    forward = list(walk([made.outputs["O"]]))
    sizes = {N: tokens, D: width, E: width, R: rank(full(width, degree)), R1: rank(full(width, degree - 1))}
    everything = made.cost(["dX", "dW", "dW_V"], forward)
    return int(everything.subs(sizes)), int(made.cost(["dX"], forward).subs(sizes))
