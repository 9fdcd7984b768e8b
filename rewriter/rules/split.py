"""The rule ``split``: a mask is the pairs of tokens that are near and those that are far (math.md §3, §6).

M → M_near + M_far
"""

from __future__ import annotations

from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Indicator
from polyattn.rewriter.algebra.programs import Program, factors
from polyattn.rewriter.masks.mask import Mask
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class Split(Rule):
    """A mask becomes its near pairs and its far ones; the note says which pairs are near."""

    mask: Mask

    name = "split"
    formula = "M → M_near + M_far"
    source = "math.md §3, exact near field; §6, causal mask"

    @property
    def note(self) -> str:
        """See :attr:`Rule.note`."""
        return self.mask.split

    def check(self, program: Program) -> str | None:
        """Refuses a mask without near pairs, and a program that the mask is not in."""
        if not self.mask.split:
            return f"the mask {self.mask.name} has no near pairs"
        found = [f.tensor for f in factors(program) if isinstance(f.tensor, Indicator)]
        if self.mask.indicator not in found:
            held = f"it holds {found[0].name}" if found else "it holds none"
            return f"the program has no factor M of the mask {self.mask.name}: {held}"
        return None

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""

        def change(factor: Factor) -> Expr | None:
            if factor.tensor != self.mask.indicator or not isinstance(factor.tensor, Indicator):
                return None
            near, far = (ir.of(Indicator(which, factor.tensor.axes)) for which in ("near", "far"))
            return ir.add(near, far)

        return program.rewrite(lambda x: ir.map_factors(x, change))
