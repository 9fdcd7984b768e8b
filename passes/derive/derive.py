"""Derive: form → exact program → low-rank programs (both backwards), cached once per form, degree and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from polyattn.passes.derive.forms import FORMS, Form, Function
from polyattn.passes.derive.lift import Lifter, kinds_by_size, trace
from polyattn.rewriter.algebra.expr import Indicator, Program, Tensor
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.families.polynomial.rule import Approximation
from polyattn.rewriter.families.skeleton import rule as skeleton
from polyattn.rewriter.families.skeleton.rule import Skeleton
from polyattn.rewriter.notation.symbols import SUBSCRIPTS
from polyattn.rewriter.rules import exact as rules
from polyattn.rewriter.rules.project import project
from polyattn.rewriter.rules.stack import stack


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
def exact(form_name: str, backward: bool = True) -> Program:
    """The form and its traced autograd graph in the algebra; nothing approximated."""
    form = FORMS[form_name]
    return rules.reuse(rules.inline(_lift(form, form.function, form.inputs, form.scalars, backward)))


def family_of(degree: int | None) -> Approximation | Skeleton:
    """The approximate rule: a polynomial of a degree, or, without one, skeleton features."""
    return Skeleton() if degree is None else Approximation(degree)


@functools.cache
def derive(form_name: str, degree: int | None, gradient: str) -> tuple[Step, ...]:
    """The derivation of the low-rank program; the last step's program computes O and every gradient.

    ``degree`` is that of the polynomial in place of exp; None means skeleton features (families/skeleton).
    ``substituted`` puts the polynomial into the exact autograd graph (math.md §2a); ``consistent`` traces the vjp of
    the substituted forward (§2b). ``projected`` is substituted, with dQ and dK in coordinates of a few directions.
    """
    form = FORMS[form_name]
    approximation = family_of(degree)
    masked = any(isinstance(t, Indicator) for t in form.inputs)
    steps: list[Step] = []

    def note(rule: str, text: str, program: Program) -> Program:
        steps.append(Step(rule, text, program))
        return program

    substituted = gradient != "consistent"
    p = note(
        "lift",
        f"{form.text}" + (" and its autograd graph, traced (math.md §1)" if substituted else " (math.md §1)"),
        exact(form_name, substituted),
    )
    if masked:
        causal = any(isinstance(t, Indicator) and t.which == "causal" for t in form.inputs)
        p = note("split", SPLIT[causal], rules.split(p))
    p = note(
        "approximate",
        f"{approximation.text}; the one step that is no identity (§4)",
        approximation.apply(p),
    )
    if not substituted:
        p = note(
            "differentiate", "the vjp of the substituted forward, traced (§2b)", _differentiate(form, p, approximation)
        )
        p = note("inline", "an n × n intermediate is written out where it is used (§2)", rules.reuse(rules.inline(p)))
        if degree is None:
            p = note("inline", "so are sums over tokens that have an axis of landmarks", skeleton.inline(p))
    p = _as_features(p, degree, note) if degree is not None else note("absorb", ABSORB, rules.absorb(p))
    p = note("stack", STACK, stack(p))
    if gradient == "projected":
        note("project", "dQ U = dS (K U) and dK W = dSᵀ (Q W): a few directions of keys and queries (§2)", project(p))
    return tuple(steps)


SPLIT = {
    True: "M = M_near + M_far: j in the chunk of i, j in an earlier chunk (§6)",
    False: "M = M_near + M_far: j in the chunk of i or next to it, j elsewhere (§3, exact near field)",
}
STACK = "X ∘ (G Vᵀ) − X ∘ (δ 1ᵀ) = X ∘ ([G, −δ] [V, 1]ᵀ); A V and A 1 are columns of A [V, 1] (§1)"
ABSORB = "diag(z) (U + W) = diag(z) U + diag(z) W, where nothing else reads U + W"


def _as_features(p: Program, degree: int, note: Callable[[str, str, Program], Program]) -> Program:
    """Polynomials of scores become products of monomials of queries and of keys."""
    low, high = (str(g).translate(SUBSCRIPTS) for g in (degree - 1, degree))
    p = note(
        "power", "powers of the score are one polynomial per term: a₀ + a₁ S + a₂ S ∘ S + … = p(S)", rules.powers(p)
    )
    p = note(
        "kronecker", "p(U Wᵀ) = Φ(U) diag(w) Φ(W)ᵀ; (U₁ W₁ᵀ) ∘ (U₂ W₂ᵀ) = (U₁ ⊘ U₂) (W₁ ⊘ W₂)ᵀ (§2)", rules.kronecker(p)
    )
    p = note("absorb", ABSORB, rules.absorb(p))
    return note(
        "compress",
        f"the columns of Φ{low}(K) ⊘ K are columns of Φ{high}(K): a monomial times a variable (§2)",
        rules.compress(p),
    )


def _differentiate(form: Form, program: Program, approximation: Approximation | Skeleton) -> Program:
    pairs = [t.axes for t in form.inputs if isinstance(t, Indicator)]
    masks = tuple(Indicator(which, axes) for axes in pairs for which in ("near", "far"))
    inputs = [*(t for t in form.inputs if not isinstance(t, Indicator)), *masks, *approximation.inputs]
    scalars = [*form.scalars, *(c.name for c in approximation.coefficients)]

    def forward(env: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return Interpreter(env, env).program(program)["O"]

    return _lift(form, forward, inputs, scalars, backward=True)
