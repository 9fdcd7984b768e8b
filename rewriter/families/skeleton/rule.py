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
from polyattn.rewriter.algebra.expr import CHUNK, HEAD, Def, Expr, Factor, Indicator, Kind, Leaf, Map, Program, Term
from polyattn.rewriter.algebra.programs import prune
from polyattn.rewriter.rules.absorb import ABSORB
from polyattn.rewriter.rules.rule import ApproximateRule, Rule

M = sympy.Symbol("m", positive=True)
"""Number of landmarks on each side."""
OF_KEYS, OF_QUERIES = Kind("ρ", M, feature=True), Kind("σ", M, feature=True)
LK, LQ = Leaf("LK", (OF_KEYS, HEAD)), Leaf("LQ", (OF_QUERIES, HEAD))
CORE = Leaf("Z", (OF_KEYS, OF_QUERIES))


@dataclass(frozen=True)
class SkeletonRule(ApproximateRule):
    """exp(S) → Φ Z Rᵀ for a score S = s U Wᵀ."""

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

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        """See :meth:`ApproximateRule.ranks`."""
        return {M: shape.get("rank", 512)}

    @property
    def then(self) -> tuple[Rule, ...]:
        """See :attr:`ApproximateRule.then`."""
        return (ABSORB,)

    @property
    def after_differentiation(self) -> tuple[Rule, ...]:
        """Sums over tokens that have an axis of landmarks are written out."""
        return (INLINE_LANDMARKS,)

    def rewrite(self, program: Program) -> Program:
        """See :meth:`ApproximateRule.rewrite`."""
        made: dict[str, Def] = {}

        def features(side: Factor, coefficient: sympy.Expr, marks: Leaf) -> Def:
            token, width = side.indices
            (mark,) = ir.fresh((marks.kinds[0],), ())
            text = f"S_{side.tensor.name}{marks.label[1]}"
            x = Expr((token, mark), (Term(coefficient, (side, Factor(marks, (mark, width)))),))
            return made.setdefault(text, Def(text, x))

        def change(factor: Factor) -> Expr | None:
            if not (isinstance(factor.tensor, Map) and factor.tensor.function == "exp" and _is_score(factor)):
                return None
            score = factor.tensor.argument
            definition = score.expr if isinstance(score, Def) else None
            if definition is None or len(definition.terms) != 1 or len(definition.terms[0].factors) != 2:
                raise RewriteError(f"the score {score.name} is not a product U Wᵀ of two token matrices")
            i, j = definition.indices
            (term,) = definition.terms
            left = next(f for f in term.factors if i in f.indices)
            right = next(f for f in term.factors if j in f.indices)
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
            kept = tuple(t for t in x.terms if _near(t))
            changed = Expr(x.out, tuple(t for t in x.terms if not _near(t)))
            found = ir.map_factors(changed, change) if changed.terms else changed
            return ir.collect(Expr(x.out, (*kept, *found.terms)))

        program = program.rewrite(rewritten)
        return Program((*made.values(), *program.defs), program.outputs)


def _inline(program: Program) -> Program:
    """``inline``: sums over tokens that still have an axis of landmarks are written out where they are used.

    What tracing names on the way of a gradient, Σ_j R[j,σ] V[j,b] and the like, then stands in one product again, which
    ``stack`` and the planner take apart in their own order.
    """

    def change(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        if not isinstance(tensor, Def) or not {OF_KEYS, OF_QUERIES} & set(tensor.kinds):
            return None
        sums = any(index.kind.token for term in tensor.expr.terms for index in term.bound(tensor.expr.out))
        return tensor.expr if sums else None

    return prune(program.rewrite(lambda x: ir.map_factors(x, change)))


INLINE_LANDMARKS = Rule(
    "inline",
    "N[j,b] = Σ_j R[j,σ] V[j,b];  x N → x Σ_j R[j,σ] V[j,b]",
    "math.md §2",
    "so are sums over tokens that have an axis of landmarks",
    _inline,
)


def _near(term: Term) -> bool:
    return any(isinstance(f.tensor, Indicator) and f.tensor.which == "near" for f in term.factors)


def _is_score(factor: Factor) -> bool:
    return sum(index.kind.token for index in factor.indices) == 2
