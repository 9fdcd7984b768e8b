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
from operands import spec_inputs

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import CHUNK, HEAD, Def, Expr, Factor, Kind, Leaf, Map, Term
from polyattn.rewriter.algebra.programs import Program, is_near, is_pair, ordered, sides
from polyattn.rewriter.rules.absorb import ABSORB
from polyattn.rewriter.rules.inline_features import InlineFeatures
from polyattn.rewriter.rules.rule import ApproximateRule, Rule

M = sympy.Symbol("m", positive=True)
"""Number of features."""
OMEGA = Kind("ω", M, feature=True)
P, C = Leaf("P", (OMEGA, HEAD)), Leaf("c", (OMEGA,))


@dataclass(frozen=True)
class PositiveRule(ApproximateRule):
    """exp(S) → Φ(U) Φ(W)ᵀ for a score S = s U Wᵀ."""

    formula = "exp(s Q Kᵀ) → Φ(Q) Φ(K)ᵀ"
    source = "positive random features, exp(s q·k) = E exp(s p·q − s/2 ‖q‖²) exp(s p·k − s/2 ‖k‖²)"
    note = "exp(S) → Φ Φᵀ"
    title = "positive features"
    features_note = "P are m projections, c their weights."
    inputs_note = "Projections P [H, m, d], weights c [H, m]."
    inputs = P, C
    rank = M
    domain = "any"
    bound = "measured"

    @property
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """See :attr:`ApproximateRule.growth`."""
        return {M: 2, CHUNK: 2}

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        """See :meth:`ApproximateRule.ranks`."""
        return {M: shape.get("rank", 64)}

    def then(self, gradient: str) -> tuple[Rule, ...]:
        """See :meth:`ApproximateRule.then`."""
        return (InlineFeatures((OMEGA,), "features"), ABSORB) if gradient == "consistent" else (ABSORB,)

    def rewrite(self, program: Program) -> Program:
        """Replaces exp of a score everywhere except in the near field."""
        made: dict[str, Def] = {}

        def features(side: Factor, coefficient: sympy.Expr) -> Def:
            token, width = side.indices
            (omega,) = ir.fresh((OMEGA,), ())
            linear = Term(coefficient, (side, Factor(P, (omega, width))))
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


def operands(
    d: int, e: int, n_q: int, n_k: int, m: int = 6, heads: int = 2, groups: int = 2
) -> dict[str, torch.Tensor]:
    """Inputs of a specification with m features."""
    generator = torch.Generator().manual_seed(m)
    p = 0.4 * torch.randn(heads, m, d, generator=generator, dtype=torch.float64)
    c = 0.3 + torch.rand(heads, m, generator=generator, dtype=torch.float64)
    return {**spec_inputs(d, e, n_q, n_k, heads, groups), "P": p, "c": c}


def dense(q: torch.Tensor, k: torch.Tensor, x: Mapping[str, torch.Tensor], s: float) -> torch.Tensor:
    """The approximation of exp(s q kᵀ), written out: q [heads, groups, n_q, d], k [heads, n_k, d]."""

    def features(y: torch.Tensor) -> torch.Tensor:
        linear = s * y @ x["P"].mT[:, None]
        return x["c"][:, None, None] * (linear - s / 2 * y.square().sum(-1, keepdim=True)).exp()

    return features(q) @ features(k[:, None]).mT
