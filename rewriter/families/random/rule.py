"""The approximate rule of positive random features: exp(s q·k) → Φ(q) Φ(k)ᵀ, in expectation (FAVOR+).

    exp(s q·k) = E_ω[exp(√s ω·q − s‖q‖²/2) exp(√s ω·k − s‖k‖²/2)],   ω normal

so that Φ[i,ω] = m^−½ exp(q_i·Ω_ω − s‖q_i‖²/2) with rows Ω, √s times normal ones, drawn once for a head and held
constant; every entry of the approximation is positive. The features are written in the algebra itself: their Jacobians,
costs and kernels are what tracing and the plan find. Near pairs keep their exp (math.md §6).

Source: Choromanski et al., *Rethinking Attention with Performers* (arXiv 2009.14794), Lemma 1.
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
"""Number of features."""
FEATURE = Kind("ω", M, feature=True)
OMEGA, LOGS = Leaf("OMEGA", (FEATURE, HEAD)), Leaf("LOGS", (FEATURE,))


@dataclass(frozen=True)
class RandomRule(ApproximateRule):
    """exp(S) → Φ(U) Φ(W)ᵀ for a score S = s U Wᵀ."""

    formula = "exp(s Q Kᵀ) → (1/m) exp(Q Ωᵀ − s‖Q‖²/2) exp(K Ωᵀ − s‖K‖²/2)ᵀ"
    source = "Choromanski et al., Rethinking Attention with Performers, Lemma 1"
    domain = "every query and key; the variance grows like exp(s‖q + k‖²)"
    bound = "unbiased; the relative deviation of an entry is (exp(s‖q + k‖²) − 1)^½ / m^½ for independent rows of Ω"

    @property
    def title(self) -> str:
        """See :attr:`ApproximateRule.title`."""
        return "random features"

    @property
    def note(self) -> str:
        """See :attr:`Rule.note`."""
        return f"{self.formula}; the one step that is no identity, but in expectation"

    @property
    def features_note(self) -> str:
        """See :attr:`ApproximateRule.features_note`."""
        return "OMEGA are m random directions, √s times normal ones, LOGS are −½ log m; all are constants."

    @property
    def inputs_note(self) -> str:
        """See :attr:`ApproximateRule.inputs_note`."""
        return "Random directions OMEGA [H, m, d], logarithms LOGS [H, m] of the root of 1/m."

    @property
    def inputs(self) -> tuple[Leaf, ...]:
        """The random directions, and the logarithms of the features' shares of the mean."""
        return OMEGA, LOGS

    @property
    def rank(self) -> sympy.Symbol:
        """See :attr:`ApproximateRule.rank`."""
        return M

    @property
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """Features, which have no degree, and chunks count like d²."""
        return {M: 2, CHUNK: 2}

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`ApproximateRule.ranks`."""
        return {M: shape.get("rank", 256)}

    def then(self, gradient: str) -> tuple[Rule, ...]:
        """After tracing, sums over tokens that have an axis of features are written out."""
        return (InlineFeatures((FEATURE,), "features"), ABSORB) if gradient == "consistent" else (ABSORB,)

    def check(self, program: Program) -> str | None:
        """Refuses a score that is not one product of a row tensor and a column tensor."""
        return next((found for score in far_scores(program) if isinstance(found := sides(score), str)), None)

    def rewrite(self, program: Program) -> Program:
        """Replaces exp of a score everywhere except in the near field."""
        made: dict[str, Def] = {}

        def features(side: Factor, coefficient: sympy.Expr, feature: ir.Index) -> Factor:
            token, width = side.indices
            product = Term(sympy.Integer(1), (side, Factor(OMEGA, (feature, width))))
            square = Term(-coefficient / 2, (side, side))
            share = Term(sympy.Integer(1), (Factor(LOGS, (feature,)),))
            text = f"S_{side.tensor.name}OMEGA"
            definition = made.setdefault(text, Def(text, Expr((token, feature), (product, square, share))))
            return Factor(Map("exp", definition), (token, feature))

        def change(factor: Factor) -> Expr | None:
            if not is_exponential(factor.tensor):
                return None
            score = factor.tensor.argument
            found = sides(score)
            if isinstance(found, str) or not isinstance(score, Def):
                raise RewriteError(str(found))
            i, j = score.expr.indices
            (term,) = score.expr.terms
            (feature,) = ir.fresh((FEATURE,), ())
            factors = tuple(features(side, term.coefficient, feature) for side in found)
            return Expr((i, j), (Term(sympy.Integer(1), factors),))

        def rewritten(x: Expr) -> Expr:
            near, far = by_distance(x)
            return ir.collect(Expr(x.out, (*near, *ir.map_factors(far, change).terms)))

        program = program.rewrite(rewritten)
        return ordered(Program((*made.values(), *program.defs), program.outputs))
