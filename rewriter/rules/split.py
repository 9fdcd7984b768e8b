"""The rule ``split``: a mask is the pairs of tokens that are near and those that are far (math.md §3, §6).

M → M_near + M_far
"""

from __future__ import annotations

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Indicator, Program
from polyattn.rewriter.masks.mask import Mask
from polyattn.rewriter.rules.rule import Rule


def split(program: Program) -> Program:
    """``split``: M = M_near + M_far."""

    def change(factor: Factor) -> Expr | None:
        if not (isinstance(factor.tensor, Indicator) and factor.tensor.which in ("causal", "all")):
            return None
        near, far = (ir.of(Indicator(which, factor.tensor.axes)) for which in ("near", "far"))
        return ir.add(near, far)

    return program.rewrite(lambda x: ir.map_factors(x, change))


def split_rule(mask: Mask) -> Rule:
    """The rule for one mask, whose note says which pairs are near."""
    return Rule("split", "M → M_near + M_far", "math.md §3, exact near field; §6, causal mask", mask.split, split)
