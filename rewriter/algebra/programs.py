"""Questions about programs that rules and planners share."""

from __future__ import annotations

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Map, Poly, Program, Tensor


def is_pair(tensor: Tensor) -> bool:
    """Whether a tensor has two token axes, so that it must never be materialised."""
    return sum(kind.token for kind in tensor.kinds) == 2


def scores(program: Program) -> tuple[str, ...]:
    """Names of the definitions that are scores: arguments of exp, and what is multiplied by itself."""
    found: dict[str, None] = {}
    for _, expr in program.expressions():
        for term in expr.terms:
            plain = [f.tensor.label for f in term.factors if isinstance(f.tensor, Def) and is_pair(f.tensor)]
            found.update((name, None) for name in plain if plain.count(name) > 1)
            for factor in term.factors:
                inner = factor.tensor
                if isinstance(inner, Map) and isinstance(inner.argument, Def) and is_pair(inner):
                    found[inner.argument.label] = None
                if isinstance(inner, Poly) and isinstance(inner.score, Def):
                    found[inner.score.label] = None
    return tuple(found)


def prune(program: Program) -> Program:
    """Drop definitions that no output needs."""
    needed: set[str] = set()

    def visit(tensor: Tensor) -> None:
        if isinstance(tensor, Def):
            if tensor.label in needed:
                return
            needed.add(tensor.label)
        for inner in ir.base_tensors(tensor):
            visit(inner)

    for expr in program.outputs.values():
        for term in expr.terms:
            for factor in term.factors:
                visit(factor.tensor)
    return Program(tuple(d for d in program.defs if d.label in needed), program.outputs)
