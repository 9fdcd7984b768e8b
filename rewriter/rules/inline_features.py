"""The rule ``inline`` of features that are written in the algebra: sums over tokens with their axis are written out.

N[σ,b] = Σ_j R[j,σ] V[j,b];  x N → x Σ_j R[j,σ] V[j,b]

What tracing names on the way of a gradient then stands in one product again, which ``stack`` and the planner take apart
in their own order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Kind
from polyattn.rewriter.algebra.programs import Program, prune
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class InlineFeatures(Rule):
    """Sums over tokens that still have an axis of features are written out where they are used."""

    axes_of_features: tuple[Kind, ...]
    what: str
    """The features in one word, for the log."""

    name = "inline"
    formula = "N[σ,b] = Σ_j R[j,σ] V[j,b];  x N → x Σ_j R[j,σ] V[j,b]"
    source = "math.md §2: (U Vᵀ) Z = U (Vᵀ Z), in whichever order is cheaper"

    @property
    def note(self) -> str:
        """See :attr:`Rule.note`."""
        return f"so are sums over tokens that have an axis of {self.what}"

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""

        def change(factor: Factor) -> Expr | None:
            tensor = factor.tensor
            if not isinstance(tensor, Def) or not set(self.axes_of_features) & set(tensor.kinds):
                return None
            return tensor.expr if _sums_over_tokens(tensor.expr) else None

        return prune(program.rewrite(lambda x: ir.map_factors(x, change)))


def _sums_over_tokens(x: Expr) -> bool:
    bound: Iterable[ir.Index] = (index for term in x.terms for index in term.bound(x.out))
    return any(index.kind.token for index in bound)
