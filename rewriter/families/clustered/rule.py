"""The approximate rule of clustered attention: exp(s q·k) around the mean query of a tile of similar ones (math.md §8).

With the mean query μ_I of a tile and δ = q − μ_I, exp(s q·k) = exp(s μ_I·k) exp(s δ·k), where δ·(k − c_IJ) is small for
most pairs of tiles (I, J): c_IJ is the mean of the keys of J with the weights that the mean query gives them. Of such a
pair a query of I sees one key, of the logit and the mass that its keys have together:

    exp(S[I,i,J,j]) → exp(X[I,i,J]) exp(Y[I,J,j]),   Y = s μ_I·(k_Jj − k̄_J),   X = s q_Ii·c_IJ − s μ_I·(c_IJ − k̄_J)

That is the expansion of order 0. Order 1 adds the first order in δ, with the moments inside pairs pooled over the far
pairs of a query's tile, so that no pair has a moment [d, e] of its own; order 2 the variance of the logits inside
pairs, pooled likewise. Everything is written in the algebra: gradients, costs and code follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Index, Indicator, Leaf, Map, Tensor, Term
from polyattn.rewriter.algebra.programs import Program, by_distance, factors, far_scores, is_exponential, ordered, prune
from polyattn.rewriter.algebra.tensor import (
    HEAD,
    KEY_PLACE,
    KEY_TILE,
    NEAR_SHARE,
    QUERY_PLACE,
    QUERY_TILE,
    T_K,
    T_Q,
)
from polyattn.rewriter.families.clustered.names import Names, term
from polyattn.rewriter.rules.rule import ApproximateRule, Rule
from polyattn.rewriter.rules.shift import SHIFT, SHIFT_RULE
from polyattn.rewriter.rules.tile import TILE

ONE = sympy.Integer(1)
SHARE_Q = Leaf("W_Q", (QUERY_TILE, QUERY_PLACE))
"""What a query counts in the mean of its tile: one over their number, 0 where a place is empty."""
SHARE_K = Leaf("W_K", (KEY_TILE, KEY_PLACE))
"""What a key counts in the mean of its tile: its factor over the sum of theirs."""
LOG_B = Leaf("LOG_B", (KEY_TILE, KEY_PLACE))
"""Logarithms of the keys' factors B."""
TOP = Leaf("TOP", (QUERY_TILE,))
"""Logarithm of the sum of the exponentials of a tile's mean query, from which the shares of far pairs are measured."""
FLOOR = Leaf("FLOOR", (QUERY_TILE,))
"""The least number of the dtype, so that a tile without far pairs has shares of 0."""
_I, _J = Index(QUERY_TILE), Index(KEY_TILE)
_i, _j, _a, _b = Index(QUERY_PLACE), Index(KEY_PLACE), Index(HEAD), Index(HEAD, 1)


@dataclass(frozen=True)
class ClusteredRule(ApproximateRule):
    """exp(S) → exp(X) exp(Y) for far pairs of tiles, with corrections of the order 0, 1 or 2 in the distance of a query
    from the mean of its tile."""

    order: int = 1

    formula = "exp(S[I,i,J,j]) → exp(X[I,i,J]) exp(Y[I,J,j]) + …"
    source = "math.md §8, the polynomial method made local"
    domain = "pairs of tiles in which x = s δ·(k − c) is small: those that a call does not find to be near"
    bound = "|x|ᵖ⁺¹ e^|x| / (p + 1)! of a far entry for order p, beside how pairs differ from the pooled moments"

    @property
    def title(self) -> str:
        """See :attr:`ApproximateRule.title`."""
        return f"clustered, order {self.order}"

    @property
    def note(self) -> str:
        """See :attr:`Rule.note`."""
        return f"{self.formula} for far pairs of tiles (§8), order {self.order}: the one step that is no identity"

    @property
    def features_note(self) -> str:
        """See :attr:`ApproximateRule.features_note`."""
        return (
            "Tiles of T_q queries and T_k keys; ν is the share of the pairs of tiles that are near. MU are mean "
            "queries of tiles, KBAR mean keys, C the keys that the mean query of a tile sees in place of a tile of "
            "keys, DP their masses; SHIFT, TOP, W_Q and W_K are constants."
        )

    @property
    def inputs_note(self) -> str:
        """See :attr:`ApproximateRule.inputs_note`."""
        return "SHIFT and W_Q [H, I, T_q], TOP and FLOOR [H, I], W_K and LOG_B [H, J, T_k]; M_near [H, I, J], bool."

    @property
    def inputs(self) -> tuple[Leaf, ...]:
        """Constants: a row's shift, a query's share of its tile's mean, a tile's share of its keys, a tile's top."""
        return (SHIFT, SHARE_Q, SHARE_K, LOG_B, *((TOP, FLOOR) if self.order else ()))

    @property
    def gradients(self) -> tuple[str, ...]:
        """See :attr:`ApproximateRule.gradients`: the exact autograd graph would need a moment [d, e] of every pair of
        tiles; the consistent gradient needs none, and errs as little on trained heads."""
        return ("consistent",)

    @property
    def keeps_names(self) -> bool:
        """See :attr:`ApproximateRule.keeps_names`."""
        return True

    @property
    def reads(self) -> tuple[str, ...]:
        """See :attr:`ApproximateRule.reads`."""
        return "MU", "KBAR", "CK", "DP", "NP"

    @property
    def before(self) -> tuple[Rule, ...]:
        """See :attr:`ApproximateRule.before`: tokens in tiles, logits measured from a row's shift."""
        return TILE, SHIFT_RULE

    @property
    def rank(self) -> sympy.Symbol:
        """See :attr:`ApproximateRule.rank`: tokens of a tile of keys, in place of which stands one."""
        return T_K

    @property
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """Tiles count like d, shares do not grow with it."""
        return {T_Q: 1, T_K: 1, NEAR_SHARE: 0}

    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`ApproximateRule.ranks`."""
        return {T_K: shape.get("tile_k", 64), T_Q: shape.get("tile_q", 64), NEAR_SHARE: 0.125}

    def then(self, gradient: str) -> tuple[Rule, ...]:
        """Nothing is left to be brought into features."""
        return ()

    def check(self, program: Program) -> str | None:
        """Refuses a score that is not s Q Kᵀ − SHIFT over tiles."""
        return next((found for score in far_scores(program) if isinstance(found := _sides(score), str)), None)

    def rewrite(self, program: Program) -> Program:
        """Replaces exp of a score everywhere except in near pairs, and names what is left: PN is the exponential of
        near pairs, sums over the places of a tile and over tiles are definitions of their own."""
        names = Names()
        weighted = any(f.tensor.name == "B" for f in factors(program))

        def change(factor: Factor) -> Expr | None:
            if not is_exponential(factor.tensor):
                return None
            found = _sides(factor.tensor.argument)
            if isinstance(found, str):
                raise RewriteError(found)
            return _Expansion(*found, names, weighted).order(self.order)

        def rewritten(x: Expr) -> Expr:
            near, far = by_distance(x)
            exact = [_near(t, names) for t in near]
            expanded = map(_merged, ir.map_factors(far, change).terms)
            return ir.collect(Expr(x.out, (*exact, *(names.sums(t, x.out) for t in expanded if not _is_zero(t)))))

        program = program.rewrite(rewritten)
        return prune(ordered(Program((*names.made.values(), *program.defs), program.outputs)))


def _sides(score: Tensor) -> tuple[sympy.Expr, Leaf, Leaf] | str:
    """Scale, queries and keys of a score s Q Kᵀ − SHIFT over tiles; or why it is none."""
    if not isinstance(score, Def):
        return f"the score {score.name} has no definition"
    products = [t for t in score.expr.terms if not any(f.tensor == SHIFT for f in t.factors)]
    if len(products) != 1 or len(score.expr.terms) != 2:
        return f"the score {score.name} is not one product and a shift: {score.expr}"
    (term,) = products
    tensors = {f.tensor.kinds: f.tensor for f in term.factors}
    q, k = tensors.get((QUERY_TILE, QUERY_PLACE, HEAD)), tensors.get((KEY_TILE, KEY_PLACE, HEAD))
    if len(term.factors) != 2 or not isinstance(q, Leaf) or not isinstance(k, Leaf):
        return f"the score {score.name} is no product of queries and keys in tiles: {score.expr}"
    return term.coefficient, q, k


def _near(term: Term, names: Names) -> Term:
    """A term over near pairs with PN in place of the mask, the keys' factors and the exponential."""
    exponential = next((f for f in term.factors if is_exponential(f.tensor)), None)
    if exponential is None:
        return term
    score = exponential.tensor.argument if isinstance(exponential.tensor, Map) else None
    assert isinstance(score, Def)
    factors = [f for f in term.factors if f is not exponential and f.tensor.name not in ("M_near", "B")]
    terms = score.expr.terms
    if len(factors) < len(term.factors) - 2:  # a factor B of the keys, which becomes a summand of the exponent
        j = tuple(index for index in score.expr.indices if index.kind in LOG_B.axes)
        terms = (*terms, Term(ONE, (Factor(LOG_B, j),)))
    logits = names.find("SN", Expr(score.expr.out, terms))
    near = Factor(Indicator("near", (QUERY_TILE, KEY_TILE)), (_I, _J))
    made = names.define("PN", (_I, _i, _J, _j), Term(ONE, (near, Factor(Map("exp", logits), (_I, _i, _J, _j)))))
    return Term(term.coefficient, (*factors, Factor(made, exponential.indices)))


def _merged(term: Term) -> Term:
    """A far term in which the mask is part of E and LAMBDA, and the keys' factors of OMEGA and W_K."""
    inside = {"M_far", "B"} if {f.tensor.name for f in term.factors} & {"E", "LAMBDA"} else set[str]()
    return Term(term.coefficient, tuple(f for f in term.factors if f.tensor.name not in inside))


def _is_zero(term: Term) -> bool:
    """Whether a term is the sum of the deviations of keys from their mean, which is zero."""
    held: dict[Index, list[str]] = {}
    for factor in term.factors:
        for index in factor.indices:
            held.setdefault(index, []).append(factor.tensor.name)
    return any(sorted(names) == ["KAPPA", "W_K"] for index, names in held.items() if index.kind == KEY_PLACE)


class _Expansion:
    """What stands in place of exp(S), for one score, and the definitions that it reads."""

    def __init__(self, scale: sympy.Expr, q: Leaf, k: Leaf, names: Names, weighted: bool) -> None:
        self.scale, self.q, self.names = scale, q, names
        define = names.define
        self.far = Indicator("far", (QUERY_TILE, KEY_TILE))
        self.mu = define("MU", (_I, _a), term((SHARE_Q, _I, _i), (q, _I, _i, _a)))
        self.mean = define("KBAR", (_J, _a), term((SHARE_K, _J, _j), (k, _J, _j, _a)))
        self.kappa = define("KAPPA", (_J, _j, _a), term((k, _J, _j, _a)), term((self.mean, _J, _a), c=-ONE))
        bias = (term((LOG_B, _J, _j)),) if weighted else ()
        y = define("Y", (_I, _J, _j), term((self.mu, _I, _a), (self.kappa, _J, _j, _a), c=scale), *bias)
        self.omega = define("OMEGA", (_I, _J, _j), term((Map("exp", y), _I, _J, _j)))
        self.mass = define("DP", (_I, _J), term((self.omega, _I, _J, _j)))
        sums = define("KP", (_I, _J, _a), term((self.omega, _I, _J, _j), (self.kappa, _J, _j, _a)))
        away = define("CK", (_I, _J, _a), term((sums, _I, _J, _a), (Map("reciprocal", self.mass), _I, _J)))
        c = define("C", (_I, _J, _a), term((self.mean, _J, _a)), term((away, _I, _J, _a)))
        offset = define("XI", (_I, _J), term((self.mu, _I, _a), (away, _I, _J, _a), c=-scale))
        products = term((q, _I, _i, _a), (c, _I, _J, _a), c=scale)
        x = define("X", (_I, _i, _J), products, term((offset, _I, _J)), term((SHIFT, _I, _i), c=-ONE))
        self.e = define("E", (_I, _i, _J), term((self.far, _I, _J), (Map("exp", x), _I, _i, _J)))

    def order(self, order: int) -> Expr:
        """What stands in place of exp(S[I,i,J,j])."""
        far = (self.e, _I, _i, _J), (self.omega, _I, _J, _j)
        terms = [term(*far)]
        if order:
            difference = term((self.q, _I, _i, _a)), term((self.mu, _I, _a), c=-ONE)
            delta = self.names.define("DELTA", (_I, _i, _a), *difference)
            total = self.names.define("DFAR", (_I, _i), term((self.e, _I, _i, _J), (self.mass, _I, _J)))
            share, per_key = (self.share(), _I, _J), (SHARE_K, _J, _j)
            first = (total, _I, _i), share, per_key, (delta, _I, _i, _a), (self.kappa, _J, _j, _a)
            terms.append(term(*first, c=self.scale))
            if order == 2:
                square = term(per_key, (self.kappa, _J, _j, _a), (self.kappa, _J, _j, _b))
                inside = self.names.define("CB", (_J, _a, _b), square)
                pooled = self.names.define("CA", (_I, _a, _b), term(share, (inside, _J, _a, _b)))
                both = term((delta, _I, _i, _a), (pooled, _I, _a, _b), (delta, _I, _i, _b), c=self.scale**2 / 2)
                half = self.names.define("HALF", (_I, _i), both)
                terms.append(term(*far, (half, _I, _i)))
        return Expr((_I, _i, _J, _j), tuple(terms))

    def share(self) -> Def:
        """LAMBDA[I,J], the share of a far pair in what the mean query of its tile sees of all far pairs."""
        define = self.names.define
        product = term((self.mu, _I, _a), (self.mean, _J, _a), c=self.scale)
        z = define("Z", (_I, _J), product, term((TOP, _I), c=-ONE))
        weight = define("WP", (_I, _J), term((self.far, _I, _J), (Map("exp", z), _I, _J), (self.mass, _I, _J)))
        whole = define("WFAR", (_I,), term((weight, _I, _J)), term((FLOOR, _I)))
        return define("LAMBDA", (_I, _J), term((weight, _I, _J), (Map("reciprocal", whole), _I)))
