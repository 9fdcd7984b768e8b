"""The rule ``absorb``: a scaled sum that nothing else reads takes the scale in.

N[i] = U[i] + W[i];  z[i] N[i] → z[i] U[i] + z[i] W[i]
"""

from __future__ import annotations

from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Tensor
from polyattn.rewriter.algebra.programs import Program, prune
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class Absorb(Rule):
    """A definition read once, as one factor among others of an output's only term, is written out there."""

    name = "absorb"
    formula = "diag(z) (U + W) → diag(z) U + diag(z) W"
    source = "math.md §2: diag(a) U Vᵀ diag(b) = (diag(a) U)(diag(b) V)ᵀ"
    note = "diag(z) (U + W) = diag(z) U + diag(z) W, where nothing else reads U + W"

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        reads: dict[str, int] = {}

        def count(tensor: Tensor) -> None:
            if isinstance(tensor, Def):
                reads[tensor.label] = reads.get(tensor.label, 0) + 1
            else:
                for inner in ir.base_tensors(tensor):
                    count(inner)

        for _, x in program.expressions():
            for term in x.terms:
                for factor in term.factors:
                    count(factor.tensor)

        def change(factor: Factor) -> Expr | None:
            tensor = factor.tensor
            return tensor.expr if isinstance(tensor, Def) and reads[tensor.label] == 1 else None

        outputs = {
            name: ir.map_factors(x, change) if len(x.terms) == 1 and len(x.terms[0].factors) > 1 else x
            for name, x in program.outputs.items()
        }
        return prune(Program(program.defs, outputs))


ABSORB = Absorb()
