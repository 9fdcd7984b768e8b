"""The approximate rule of skeleton features: exp(s q·k) → Φ(q) Z R(k)ᵀ (math.md §2, "Exponential features").

    Φ[i,ρ] = exp(s q_i·κ_ρ),  R[j,σ] = exp(s k_j·λ_σ)

with landmarks κ of the keys, λ of the queries, and a core Z, all of them inputs that are held constant.  The features
are written in the algebra itself, a matrix product and an exp: their Jacobian, dΦ_ρ/dq = s Φ_ρ κ_ρ, is what tracing
finds, and their cost is what the plan counts.  Under a causal mask the near field keeps its exp (§6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import CHUNK, HEAD, Def, Expr, Factor, Kind, Leaf, Map, Term
from polyattn.rewriter.algebra.programs import Program, by_distance, far_scores, is_exponential, ordered, sides
from polyattn.rewriter.rules.absorb import ABSORB
from polyattn.rewriter.rules.inline_features import InlineFeatures
from polyattn.rewriter.rules.rule import ApproximateRule, Rule

M = sympy.Symbol("m", positive=True)
"""Number of landmarks on each side."""
OF_KEYS, OF_QUERIES = Kind("ρ", M, feature=True), Kind("σ", M, feature=True)
LK, LQ = Leaf("LK", (OF_KEYS, HEAD)), Leaf("LQ", (OF_QUERIES, HEAD))
CORE = Leaf("Z", (OF_KEYS, OF_QUERIES))


@dataclass(frozen=True)
class SkeletonRule(ApproximateRule):
    """Exponentials of landmarks and a core in place of exp of a score s U Wᵀ, written in the algebra itself."""

    formula = "exp(s Q Kᵀ) → exp(s Q κᵀ) Z exp(s K λᵀ)ᵀ"
    source = "math.md §2, exponential (skeleton) features: CUR, generalised Nyström"
    domain = "queries and keys like those that landmarks and core were fitted to"
    bound = "measured on rows that the fit did not see: Σ_j |P̃_ij − P_ij|"

    @property
    def title(self) -> str:
        """See :attr:`ApproximateRule.title`."""
        return "skeleton features"

    @property
    def note(self) -> str:
        """See :attr:`ApproximateRule.note`."""
        return f"{self.formula}; the one step that is no identity (§4)"

    @property
    def features_note(self) -> str:
        """See :attr:`ApproximateRule.features_note`."""
        return "LK and LQ are m landmarks of keys and of queries, Z is the core; all are constants."

    @property
    def inputs_note(self) -> str:
        """See :attr:`ApproximateRule.inputs_note`."""
        return "Landmarks LK of keys and LQ of queries [H, m, d], core Z [H, m, m]."

    @property
    def inputs(self) -> tuple[Leaf, ...]:
        """Landmarks of keys and of queries, and the core."""
        return LK, LQ, CORE

    @property
    def rank(self) -> sympy.Symbol:
        """See :attr:`ApproximateRule.rank`."""
        return M

    @property
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """Landmarks, which have no degree, and chunks count like d²."""
        return {M: 2, CHUNK: 2}

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`ApproximateRule.ranks`."""
        return {M: shape.get("rank", 512)}

    def then(self, gradient: str) -> tuple[Rule, ...]:
        """After tracing, sums over tokens that have an axis of landmarks are written out."""
        return (InlineFeatures((OF_KEYS, OF_QUERIES), "landmarks"), ABSORB) if gradient == "consistent" else (ABSORB,)

    def check(self, program: Program) -> str | None:
        """Refuses a score that is not one product of a row tensor and a column tensor."""
        return next((found for score in far_scores(program) if isinstance(found := sides(score), str)), None)

    def rewrite(self, program: Program) -> Program:
        """Replaces exp of a score everywhere except in the near field."""
        made: dict[str, Def] = {}

        def features(side: Factor, coefficient: sympy.Expr, marks: Leaf) -> Def:
            token, width = side.indices
            (mark,) = ir.fresh((marks.kinds[0],), ())
            text = f"S_{side.tensor.name}{marks.label[1]}"
            x = Expr((token, mark), (Term(coefficient, (side, Factor(marks, (mark, width)))),))
            return made.setdefault(text, Def(text, x))

        def change(factor: Factor) -> Expr | None:
            if not is_exponential(factor.tensor):
                return None
            score = factor.tensor.argument
            found = sides(score)
            if isinstance(found, str) or not isinstance(score, Def):
                raise RewriteError(str(found))
            left, right = found
            i, j = score.expr.indices
            (term,) = score.expr.terms
            phi = features(left, term.coefficient, LK)
            psi = features(right, term.coefficient, LQ)
            (rho,), (sigma,) = ir.fresh((OF_KEYS,), ()), ir.fresh((OF_QUERIES,), ())
            product = (
                Factor(Map("exp", phi), (i, rho)),
                Factor(CORE, (rho, sigma)),
                Factor(Map("exp", psi), (j, sigma)),
            )
            return Expr((i, j), (Term(sympy.Integer(1), product),))

        def rewritten(x: Expr) -> Expr:
            near, far = by_distance(x)
            return ir.collect(Expr(x.out, (*near, *ir.map_factors(far, change).terms)))

        program = program.rewrite(rewritten)
        return ordered(Program((*made.values(), *program.defs), program.outputs))
