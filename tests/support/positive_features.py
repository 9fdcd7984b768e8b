"""A family of features that the source does not know, for tests: positive random ones, exp(s q·k) → Φ(q) Φ(k)ᵀ.

    Φ(x)[ω] = c_ω exp(s x·p_ω − s/2 ‖x‖²)

Its one feature axis, its inputs P and c and its rule stand here and nowhere else, so that whatever derives, schedules
or emits its kernels does so by what the values say of themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import CHUNK, HEAD, Def, Expr, Factor, Kind, Leaf, Map, Program, Term
from polyattn.rewriter.algebra.programs import is_near, is_pair, ordered, sides
from polyattn.rewriter.families.skeleton.inline import InlineLandmarks
from polyattn.rewriter.rules.absorb import ABSORB
from polyattn.rewriter.rules.rule import ApproximateRule, Rule

S = sympy.Symbol("s", positive=True)
F = sympy.Symbol("m", positive=True)
"""Number of features."""
OMEGA = Kind("ω", F, feature=True)
P, C = Leaf("P", (OMEGA, HEAD)), Leaf("c", (OMEGA,))


@dataclass(frozen=True)
class PositiveRule(ApproximateRule):
    """exp(S) → Φ(U) Φ(W)ᵀ for a score S = s U Wᵀ, with coordinates scaled by √s where ``rooted`` says so."""

    rooted: bool = False

    formula = "exp(s Q Kᵀ) → Φ(Q) Φ(K)ᵀ"
    source = "positive random features, exp(s q·k) = E exp(s p·q − s/2 ‖q‖²) exp(s p·k − s/2 ‖k‖²)"
    note = "exp(S) → Φ Φᵀ"
    title = "positive features"
    features_note = "P are f projections, c their weights."
    inputs_note = "Projections P [H, f, d], weights c [H, f]."
    inputs = P, C
    rank = F
    domain = "any"
    bound = "measured"

    @property
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """See :attr:`ApproximateRule.growth`."""
        return {F: 2, CHUNK: 2}

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        """See :meth:`ApproximateRule.ranks`."""
        return {F: shape.get("rank", 64)}

    def then(self, gradient: str) -> tuple[Rule, ...]:
        """See :meth:`ApproximateRule.then`."""
        return (InlineLandmarks((OMEGA,)), ABSORB) if gradient == "consistent" else (ABSORB,)

    def rewrite(self, program: Program) -> Program:
        """Replaces exp of a score everywhere except in the near field."""
        made: dict[str, Def] = {}

        def features(side: Factor, coefficient: sympy.Expr) -> Def:
            token, width = side.indices
            (omega,) = ir.fresh((OMEGA,), ())
            linear = Term(sympy.sqrt(coefficient) if self.rooted else coefficient, (side, Factor(P, (omega, width))))
            norm = Def(f"N_{side.tensor.name}", Expr((token,), (Term(sympy.Integer(1), (side, side)),)))
            made.setdefault(norm.label, norm)
            x = Expr((token, omega), (linear, Term(-coefficient / 2, (Factor(norm, (token,)),))))
            return made.setdefault(f"S_{side.tensor.name}", Def(f"S_{side.tensor.name}", x))

        def change(factor: Factor) -> Expr | None:
            tensor = factor.tensor
            if not (isinstance(tensor, Map) and tensor.function == "exp" and is_pair(tensor)):
                return None
            found = sides(tensor.argument)
            if isinstance(found, str) or not isinstance(tensor.argument, Def):
                raise RewriteError(str(found))
            i, j = tensor.argument.expr.indices
            (term,) = tensor.argument.expr.terms
            (omega,) = ir.fresh((OMEGA,), ())
            q, k = (Map("exp", features(side, term.coefficient)) for side in found)
            weight = Factor(C, (omega,))
            product = (Factor(q, (i, omega)), weight, weight, Factor(k, (j, omega)))
            return Expr((i, j), (Term(sympy.Integer(1), product),))

        def rewritten(x: Expr) -> Expr:
            kept = tuple(t for t in x.terms if is_near(t))
            changed = Expr(x.out, tuple(t for t in x.terms if not is_near(t)))
            found = ir.map_factors(changed, change) if changed.terms else changed
            return ir.collect(Expr(x.out, (*kept, *found.terms)))

        program = program.rewrite(rewritten)
        return ordered(Program((*made.values(), *program.defs), program.outputs))


def dense(q: torch.Tensor, k: torch.Tensor, x: Mapping[str, torch.Tensor], s: float, rooted: bool) -> torch.Tensor:
    """The approximation of exp(s q kᵀ), written out: q [heads, groups, n_q, d], k [heads, n_k, d]."""

    def features(y: torch.Tensor) -> torch.Tensor:
        linear = (s**0.5 if rooted else s) * y @ x["P"].mT[:, None]
        return x["c"][:, None, None] * (linear - s / 2 * y.square().sum(-1, keepdim=True)).exp()

    return features(q) @ features(k[:, None]).mT
