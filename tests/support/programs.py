"""Programs of the algebra written as text, and their dense values on random inputs.

    program("S[i,j] = s * Q[i,a] K[j,a];  D[i] = exp(S)[i,j];  O[i,b] = exp(S)[i,j] V[j,b] 1/D[i]")

A factor is a name at indices: an input, a definition before it, ``exp(X)``, ``1/X``, ``p2(S)`` (a₀ + a₁ S + a₂ S²) or a
mask ``M``, ``M_near``, ``M_far``. A term may begin with a coefficient and ``*``. Primes tell indices of one kind apart.
Definitions come first; the outputs are those that start with O or d.
"""

from __future__ import annotations

import math
import re

import sympy
import torch

from polyattn.rewriter.algebra.expr import (
    HEAD,
    KEY,
    QUERY,
    TOKEN,
    VALUE,
    Def,
    Expr,
    Factor,
    Index,
    Indicator,
    Kind,
    Leaf,
    Map,
    Poly,
    Tensor,
    Term,
    base_tensors,
    collect,
)
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import DIRECTION
from polyattn.rewriter.families.skeleton.rule import OF_KEYS, OF_QUERIES

KINDS = {kind.letter: kind for kind in (QUERY, KEY, TOKEN, HEAD, VALUE, DIRECTION, OF_KEYS, OF_QUERIES)}
SIZES = {"i": 9, "j": 8, "t": 7, "a": 3, "b": 2, "c": 2, "ρ": 4, "σ": 5}
CHUNK = 3
WHICH = {"M": "causal", "M_near": "near", "M_far": "far"}


def symbols(degree: int) -> tuple[sympy.Symbol, ...]:
    """a₀ … of a degree."""
    return tuple(sympy.Symbol(f"a{m}", positive=True) for m in range(degree + 1))


def program(text: str) -> Program:
    """The program of a text."""
    defs: dict[str, Def] = {}
    outputs: dict[str, Expr] = {}
    for line in filter(None, (part.strip() for part in text.replace("\n", ";").split(";"))):
        head, _, body = line.partition(" = ")
        name, out = _factor(head)
        x = Expr(out, tuple(_term(part, defs) for part in _summands(body)))
        if name[0] in "Od":
            outputs[name] = x
        else:
            defs[name] = Def(name, x)
    return Program(tuple(defs.values()), outputs)


def values(made: Program) -> dict[str, torch.Tensor]:
    """The outputs of a program on inputs that depend on their names alone, float64."""
    inputs: dict[str, torch.Tensor] = {}

    def visit(tensor: Tensor) -> None:
        if isinstance(tensor, Leaf):
            inputs[tensor.label] = dense(tensor.label, tensor.axes)
        for inner in base_tensors(tensor):
            visit(inner)

    for _, x in made.expressions():
        for term in x.terms:
            for factor in term.factors:
                visit(factor.tensor)
    i, j = torch.arange(SIZES["i"])[:, None], torch.arange(SIZES["j"])[None]
    inputs["M_near"] = ((i // CHUNK == j // CHUNK) & (j <= i)).double()
    inputs["M_far"] = (j // CHUNK < i // CHUNK).double()
    inputs["M"] = inputs["M_near"] + inputs["M_far"]
    scalars = {"s": 0.7, **{f"a{m}": 1.3 / math.factorial(m) for m in range(6)}}
    return Interpreter(inputs, scalars).program(made)


def dense(name: str, axes: tuple[Kind, ...]) -> torch.Tensor:
    """The random input of a name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 0.5 * torch.randn([SIZES[k.letter] for k in axes], dtype=torch.float64, generator=generator)


def assert_equal(found: Program, wanted: Program) -> None:
    """Both programs compute the same outputs."""
    left, right = values(found), values(wanted)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-11, atol=1e-11)


def written(made: Program) -> dict[str, str]:
    """Definitions and outputs as text, factors in a fixed order: equal programs have equal texts."""
    return {name: repr(collect(x)) for name, x in made.expressions()}


def _factor(text: str) -> tuple[str, tuple[Index, ...]]:
    found = re.fullmatch(r"(.+?)\[(.*)\]", text.strip())
    assert found is not None, text
    letters = [letter for letter in found.group(2).split(",") if letter]
    return found.group(1), tuple(Index(KINDS[x[0]], x.count("'")) for x in letters)


def _summands(body: str) -> list[str]:
    return re.sub(r"(?<=\]) - ", " + -1 * ", body).split(" + ")


def _term(text: str, defs: dict[str, Def]) -> Term:
    factors = []
    coefficient = sympy.Integer(1)
    *scales, product = text.split(" * ")
    for scale in scales:
        coefficient *= sympy.sympify(scale, {x: sympy.Symbol(x, positive=True) for x in ("s", "a0", "a1", "a2")})
    for part in product.split():
        name, indices = _factor(part)
        factors.append(Factor(_tensor(name, tuple(index.kind for index in indices), defs), indices))
    return Term(coefficient, tuple(factors))


def _tensor(name: str, axes: tuple[Kind, ...], defs: dict[str, Def]) -> Tensor:
    if name in defs:
        return defs[name]
    if name in WHICH:
        return Indicator(WHICH[name], (axes[0], axes[1]))
    if name.startswith("1/"):
        return Map("reciprocal", _tensor(name[2:], axes, defs))
    inner = re.fullmatch(r"(exp|p\d)\((.*)\)", name)
    if inner is None:
        return Leaf(name, axes)
    argument = _tensor(inner.group(2), axes, defs)
    return Map("exp", argument) if inner.group(1) == "exp" else Poly(argument, symbols(int(inner.group(1)[1])))
