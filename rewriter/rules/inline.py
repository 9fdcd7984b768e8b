"""The rule ``inline``: a pair of tokens is never an intermediate.

dP[i,j] = Σ_b G[i,b] V[j,b];  x ∘ dP → x ∘ (G Vᵀ)

Scores stay named: arguments of exp, and what is multiplied by itself. An output over a pair of tokens is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor
from polyattn.rewriter.algebra.programs import Program, is_pair, prune, scores
from polyattn.rewriter.algebra.verify import output_axes
from polyattn.rewriter.rules.rule import Rule


def inline_pairs(x: Expr, keep: Iterable[str] = ()) -> Expr:
    """Replace definitions over a pair of tokens by what they stand for, except those named in ``keep``."""
    kept = set(keep)

    def change(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        return tensor.expr if isinstance(tensor, Def) and is_pair(tensor) and tensor.label not in kept else None

    return ir.map_factors(x, change)


@dataclass(frozen=True)
class Inline(Rule):
    """Definitions over pairs of tokens are written out, but for scores; what nothing uses any more is dropped."""

    name = "inline"
    formula = "dP[i,j] = Σ_b G[i,b] V[j,b];  x ∘ dP → x ∘ (G Vᵀ)"
    source = "math.md §2: a Hadamard product is a shared pair of indices"
    note = "an n × n intermediate is written out where it is used (§2)"

    def check(self, program: Program) -> str | None:
        """Refuses an output over a pair of tokens."""
        for name, kinds in output_axes(program).items():
            if sum(kind.token for kind in kinds) == 2:
                return f"the output {name} is itself over a pair of tokens"
        return None

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        keep = scores(program)
        return prune(program.rewrite(lambda x: inline_pairs(x, keep)))


INLINE = Inline()
