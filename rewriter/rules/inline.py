"""The rule ``inline``: a pair of tokens is never an intermediate.

dP[i,j] = Σ_b G[i,b] V[j,b];  x ∘ dP → x ∘ (G Vᵀ)
"""

from __future__ import annotations

from collections.abc import Iterable

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Program
from polyattn.rewriter.algebra.programs import is_pair, prune, scores
from polyattn.rewriter.rules.rule import Rule


def inline_pairs(x: Expr, keep: Iterable[str] = ()) -> Expr:
    """``inline``: replace definitions over a pair of tokens by what they stand for, except those named in ``keep``."""
    kept = set(keep)

    def change(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        return tensor.expr if isinstance(tensor, Def) and is_pair(tensor) and tensor.label not in kept else None

    return ir.map_factors(x, change)


def inline(program: Program) -> Program:
    """``inline`` everywhere but for scores; definitions over pairs that nothing uses any more are dropped."""
    keep = scores(program)
    return prune(program.rewrite(lambda x: inline_pairs(x, keep)))


INLINE = Rule(
    "inline",
    "dP[i,j] = Σ_b G[i,b] V[j,b];  x ∘ dP → x ∘ (G Vᵀ)",
    "math.md §2: a Hadamard product is a shared pair of indices",
    "an n × n intermediate is written out where it is used (§2)",
    inline,
)
