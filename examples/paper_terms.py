"""The algebra's own gradients of one layer softmax(X W Xᵀ) X W_V: the five terms of dX, dW and dW_V.

They are read off ``derive(PAPER, PolynomialRule(degree), "substituted")``: the autograd graph of the layer as torch
traces it, with the low-rank form in place of exp. Nothing here knows the paper's formulas but ``written_out``, which is
what the terms are compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from paper_gradients import relative

from polyattn.passes.derive.derive import AppliedRule, derive, exact
from polyattn.passes.derive.forms import FORMS, PAPER
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Tensor
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.families.polynomial.rule import PolynomialRule

TERMS = (
    "fᵀ G W_Vᵀ",
    "(f∘q)ᵀ X W",
    "−fᵀ diag(δ) X W",
    "(f∘q) X Wᵀ",
    "−diag(δ) f X Wᵀ",
)
"""The paper's five (its Lemmas D.10 to D.14), with f = softmax(X W Xᵀ), c = f X W_V, q = G (X W_V)ᵀ and
δ = rowsum(G ∘ c)."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What the algebra derived, and how far it is from autograd."""

    steps: tuple[AppliedRule, ...]
    exact: dict[str, str]
    """Each of the five terms as the traced autograd graph has it: name → text in index notation."""
    low_rank: dict[str, str]
    """The same after the rewrite: no pair of tokens is left."""
    exact_errors: dict[str, float]
    """Relative error of each exact term against the formula that is written out."""
    low_rank_errors: dict[str, float]
    gradient_errors: dict[str, float]
    """Relative error of the derived dX, dW and dW_V against float64 autograd through the exact layer."""


def five_terms(degree: int = 2, tokens: int = 32, width: int = 4, seed: int = 0) -> Terms:
    """Derive, write out, evaluate, compare."""
    env = layer(tokens, width, seed)
    steps = derive(PAPER, PolynomialRule(degree), "substituted")
    rewritten = next(step.program for step in steps if step.rule == "compress")  # before columns are stacked
    scalars = PolynomialRule(degree).values
    wanted = written_out(env)

    found: list[tuple[dict[str, str], dict[str, float]]] = []
    for program in (exact(PAPER), rewritten):
        summands = {f"term {number}": term for number, term in enumerate(split(program, "dX"))}
        values = Interpreter(env, scalars).program(Program(program.defs, summands))
        names = {label: nearest(value, wanted) for label, value in values.items()}
        assert sorted(names.values()) == sorted(TERMS), f"dX has {len(summands)} terms, matched as {names}"
        texts = {names[label]: repr(term) for label, term in summands.items()}
        errors = {names[label]: relative(value, wanted[names[label]]) for label, value in values.items()}
        found.append(({name: texts[name] for name in TERMS}, {name: errors[name] for name in TERMS}))

    derived = Interpreter(env, scalars).program(steps[-1].program)
    reference = autograd(env)
    gradients = {name: relative(derived[name], reference[name]) for name in reference}
    return Terms(steps, found[0][0], found[1][0], found[0][1], found[1][1], gradients)


def split(program: Program, output: str) -> list[Expr]:
    """The summands of an output, with every intermediate matrix written out that is made from the cotangent G."""

    def holds_cotangent(tensor: Tensor) -> bool:
        return tensor.name == "G" or any(holds_cotangent(inner) for inner in ir.base_tensors(tensor))

    def open_matrix(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        return tensor.expr if isinstance(tensor, Def) and len(tensor.kinds) == 2 and holds_cotangent(tensor) else None

    whole = program.outputs[output]
    while any(open_matrix(factor) is not None for term in whole.terms for factor in term.factors):
        whole = ir.map_factors(whole, open_matrix)
    return [Expr(whole.out, (term,)) for term in whole.terms]


def layer(tokens: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    """X, W, W_V and a cotangent G in float64; logits stay below about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x = 2.0 * torch.rand(tokens, width, dtype=torch.float64, generator=generator) - 0.5
    values = {"X": x, "W": 0.25 / width * normal(width, width), "W_V": width**-0.5 * normal(width, width)}
    return {**values, "G": torch.tanh(x @ normal(width, width))}


def autograd(env: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """dX, dW and dW_V of exact attention."""
    form = FORMS["paper"]
    free = {name: env[name].clone().requires_grad_() for name in form.differentiable}
    found = torch.autograd.grad(form.function(free), list(free.values()), env["G"])
    return dict(zip(("d" + name for name in free), found, strict=True))


def written_out(env: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The five terms of dX as the paper states them, dense."""
    x, w, w_v, g = (env[name] for name in ("X", "W", "W_V", "G"))
    f = torch.softmax(x @ w @ x.T, dim=-1)
    q = g @ (x @ w_v).T
    delta = torch.diag((g * (f @ x @ w_v)).sum(-1))
    terms: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: f.T @ g @ w_v.T,
        lambda: (f * q).T @ x @ w,
        lambda: -f.T @ delta @ x @ w,
        lambda: (f * q) @ x @ w.T,
        lambda: -delta @ f @ x @ w.T,
    )
    return {name: term() for name, term in zip(TERMS, terms, strict=True)}


def nearest(value: torch.Tensor, wanted: Mapping[str, torch.Tensor]) -> str:
    return min(wanted, key=lambda name: relative(value, wanted[name]))
