"""Order: choose how every product is contracted, by cost (math.md §2, "the rewrite is a choice of contraction order").

A dynamic programme over the subsets of a term's factors (at most nine).  Trees are compared by the degree in n of
their largest step, then by FLOPs at nominal sizes, then by the size of the largest intermediate; at equal cost the
weights of monomials stay out of running sums, so that one sum serves every term that needs it.  Under M_far the sum
over the masked token is a running sum (§6): it must be complete before it meets the other token, and what it yields
differs from chunk to chunk, so that nothing but a token's own row is combined with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import (
    Concat,
    Def,
    Expr,
    Factor,
    Feature,
    Index,
    Indicator,
    Kind,
    Leaf,
    Map,
    Select,
    StackedPart,
    Tensor,
    Weights,
)
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.planning.plan import Node, Plan, in_near_tiles, node
from polyattn.rewriter.planning.verify import verify

NOMINAL = {
    "n_q": 65536.0,
    "n_k": 65536.0,
    "n": 65536.0,
    "d": 32.0,
    "e": 32.0,
    "d'": 16.0,
    "r": 561.0,
    "r'": 33.0,
    "m": 512.0,
    "C": 512.0,
    "T_q": 64.0,
    "T_k": 64.0,
    "ν": 0.15,
}
MAX_FACTORS = 9

_Score = tuple[int, float, float, int]
"""Degree in n of the largest step, FLOPs, elements of the largest intermediate, running sums with weights in them."""


def plan(program: Program) -> Plan:
    """Give every expression of a program an order.

    Raises:
        RewriteError: a term that cannot be contracted under its masks, one with too many factors, or an axis whose
            size has no nominal value.
    """
    made = Plan(*_Planner(program).run())
    verify(made)
    return made


def _nominal(kind: Kind) -> float:
    """The size of an axis at which orders are compared."""
    unknown = sorted(s.name for s in kind.size.free_symbols if s.name not in NOMINAL)
    if unknown:
        raise RewriteError(f"the axis {kind} has no nominal size: planning/order.py knows no {', '.join(unknown)}")
    return float(kind.size.subs({s: NOMINAL[s.name] for s in kind.size.free_symbols}))


@dataclass(frozen=True)
class _Partial:
    """The best way found to contract a subset of factors."""

    score: _Score
    node: Node
    indices: tuple[Index, ...]


class _Planner:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.near = int(
            any(
                isinstance(f.tensor, Indicator) and f.tensor.which == "near" and f.tensor.axes[0].token
                for _, x in program.expressions()
                for t in x.terms
                for f in t.factors
            )
        )
        self.cache: dict[Tensor, Node] = {}
        self.sizes: dict[sympy.Expr, float] = {}

    def run(self) -> tuple[dict[str, Node], int]:
        return {name: self.expr(x) for name, x in self.program.outputs.items()}, self.near

    def size(self, indices: Sequence[Index] | frozenset[Index]) -> float:
        total, tokens = 1.0, 0
        if in_near_tiles(index.kind for index in indices):
            total = NOMINAL["ν"]
        for index in indices:
            size = index.kind.size
            if size not in self.sizes:
                self.sizes[size] = _nominal(index.kind)
            tokens += index.kind.token
            total *= NOMINAL["C"] if tokens == 2 and index.kind.token and self.near else self.sizes[size]
        return total

    def tensor(self, tensor: Tensor) -> Node:
        """The node of a tensor, axes in the order of its kinds."""
        if tensor not in self.cache:
            self.cache[tensor] = self._tensor(tensor)
        return self.cache[tensor]

    def _tensor(self, tensor: Tensor) -> Node:
        if isinstance(tensor, Leaf):
            return node("input", (), tensor.kinds, tensor.label)
        if isinstance(tensor, Indicator):
            return node("mask", (), tensor.kinds, tensor.which)
        if isinstance(tensor, Def):
            return self.expr(tensor.expr)
        if isinstance(tensor, Map):
            return node("map", (self.tensor(tensor.argument),), tensor.kinds, tensor.function)
        if isinstance(tensor, Feature):
            return node("features", (self.tensor(tensor.source),), tensor.kinds, tensor.degree)
        if isinstance(tensor, Weights):
            return node("weights", (), tensor.kinds, tensor.coefficients)
        if isinstance(tensor, Concat):
            widths = tuple(part.indices[1].kind if len(part.indices) == 2 else None for part in tensor.parts)
            constants = tuple(
                part.terms[0].coefficient if len(part.terms) == 1 and not part.terms[0].factors else None
                for part in tensor.parts
            )
            args = tuple(self.expr(p) for p, c in zip(tensor.parts, constants, strict=True) if c is None)
            return node("concat", args, tensor.kinds, (widths, constants))
        if isinstance(tensor, StackedPart):
            return node("part", (self.tensor(tensor.whole),), tensor.kinds, (tensor.part, tensor.widths))
        raise RewriteError(f"{tensor.name} has no place in a plan; a rule should have rewritten it")

    def expr(self, x: Expr) -> Node:
        """The node of an expression, axes in the order of its open indices."""
        args, coefficients, orders = [], [], []
        for term in x.terms:
            best = self.term(term.factors, x.indices)
            args.append(best.node)
            coefficients.append(term.coefficient)
            orders.append(tuple(best.indices.index(index) if index in best.indices else None for index in x.indices))
        kinds = tuple(index.kind for index in x.indices)
        if len(args) == 1 and coefficients[0] == 1 and orders[0] == tuple(range(len(kinds))):
            return args[0]
        return node("sum", tuple(args), kinds, (tuple(coefficients), tuple(orders)))

    def term(self, factors: tuple[Factor, ...], out: tuple[Index, ...]) -> _Partial:
        """The best tree of one term."""
        far = [
            f for f in factors if isinstance(f.tensor, Indicator) and f.tensor.which == "far" and f.tensor.axes[0].token
        ]
        rest = [f for f in factors if f not in far]
        if len(rest) > MAX_FACTORS:
            raise RewriteError(f"a term of {len(rest)} factors is too long to order: {rest}")
        if not far:
            found = self._search(rest, out, None)
        else:
            i, j = far[0].indices
            sums = [(a, b) for a, b in ((j, i), (i, j)) if a not in out]
            options = [p for p in (self._search(rest, out, pair) for pair in sums) if p is not None]
            found = min(options, key=lambda p: p.score) if options else None
        if found is None:
            raise RewriteError(f"no order of {factors} keeps the running sum under M_far apart")
        return found

    def _search(
        self, factors: list[Factor], out: tuple[Index, ...], scan: tuple[Index, Index] | None
    ) -> _Partial | None:
        count = len(factors)
        full = (1 << count) - 1
        holders: dict[Index, int] = {}
        for position, factor in enumerate(factors):
            for index in factor.indices:
                holders[index] = holders.get(index, 0) | 1 << position
        best: dict[int, _Partial] = {}
        summed, along = scan if scan else (None, None)

        def gone(index: Index, subset: int) -> bool:
            return index not in out and holders[index] & ~subset == 0

        def scanned(subset: int) -> bool:
            return summed is not None and holders[summed] & ~subset == 0 and holders[summed] & subset != 0

        def pure(subset: int) -> bool:
            return along is None or holders[along] & subset == 0

        for subset in range(1, full + 1):
            candidates: list[tuple[_Score, int, int]] = []
            if subset & (subset - 1) == 0:
                position = subset.bit_length() - 1
                factor = factors[position]
                if isinstance(factor.tensor, Select):
                    continue
                start = _Partial((0, 0.0, 0.0, 0), self.tensor(factor.tensor), factor.indices)
                best[subset] = self._reduce(start, [i for i in factor.indices if gone(i, subset)], summed, along)
                continue
            left = (subset - 1) & subset
            while left:
                right = subset ^ left
                if left < right:
                    score = self._combine(factors, best, left, right, gone, scanned, pure)
                    if score is not None:
                        candidates.append((score, left, right))
                left = (left - 1) & subset
            if candidates:
                score, left, right = min(candidates)
                best[subset] = self._build(factors, best, left, right, score, gone, summed, along)
        return best.get(full)

    def _constant(self, factors: list[Factor], subset: int) -> bool:
        """Whether some factors are inputs without a token axis."""
        return all(
            isinstance(f.tensor, Leaf) and not any(k.token for k in f.tensor.kinds)
            for f in self._members(factors, subset)
        )

    @staticmethod
    def _members(factors: list[Factor], subset: int) -> list[Factor]:
        return [f for position, f in enumerate(factors) if subset >> position & 1]

    @staticmethod
    def _select(factors: list[Factor], subset: int) -> Factor | None:
        if subset & (subset - 1):
            return None
        factor = factors[subset.bit_length() - 1]
        return factor if isinstance(factor.tensor, Select) else None

    def _combine(
        self,
        factors: list[Factor],
        best: dict[int, _Partial],
        left: int,
        right: int,
        gone: Callable[[Index, int], bool],
        scanned: Callable[[int], bool],
        pure: Callable[[int], bool],
    ) -> _Score | None:
        subset = left | right
        for single, other in ((left, right), (right, left)):
            select = self._select(factors, single)
            if select is None:
                continue
            if other not in best:
                return None
            beta, a, alpha = select.indices
            held = best[other].indices
            if alpha not in held or not gone(alpha, subset) or beta in held or a in held:
                return None
            made = frozenset(held) - {alpha} | {beta, a}
            tokens = sum(i.kind.token for i in made)
            previous = best[other].score
            return (max(previous[0], tokens), previous[1], max(previous[2], self.size(made)), previous[3])
        if left not in best or right not in best:
            return None
        x, y = best[left], best[right]
        union = frozenset(x.indices) | frozenset(y.indices)
        # Under M_far: both tokens may meet only after the running sum is complete on its own side.
        chunks = 1.0
        for one, other in ((left, right), (right, left)):
            if scanned(one) and pure(one) and pure(other):
                if not self._constant(factors, other):
                    return None
                chunks = NOMINAL["n"] / NOMINAL["C"]  # once per chunk, by a constant
        if not scanned(left) and not scanned(right) and scanned(subset) and not pure(subset):
            return None
        tokens = sum(i.kind.token for i in union)
        tokens = 1 if self.near and tokens == 2 else tokens
        reduces = any(gone(i, subset) for i in union)
        work = self.size(union) * (2 if reduces else 1) * chunks
        made = frozenset(i for i in union if not gone(i, subset))
        summed_here = scanned(subset) and not scanned(left) and not scanned(right)
        weighted = int(summed_here and any(isinstance(f.tensor, Weights) for f in self._members(factors, subset)))
        return (
            max(x.score[0], y.score[0], tokens),
            x.score[1] + y.score[1] + work,
            max(x.score[2], y.score[2], self.size(made)),
            x.score[3] + y.score[3] + weighted,
        )

    def _build(
        self,
        factors: list[Factor],
        best: dict[int, _Partial],
        left: int,
        right: int,
        score: _Score,
        gone: Callable[[Index, int], bool],
        summed: Index | None,
        along: Index | None,
    ) -> _Partial:
        subset = left | right
        for single, other in ((left, right), (right, left)):
            select = self._select(factors, single)
            if select is not None:
                held = best[other]
                beta, a, alpha = select.indices
                position = held.indices.index(alpha)
                indices = (*held.indices[:position], beta, a, *held.indices[position + 1 :])
                kinds = tuple(i.kind for i in indices)
                made = node("gather", (held.node,), kinds, (position, _degree(select)), held.node.scan)
                return _Partial(score, made, indices)
        x, y = sorted((best[left], best[right]), key=lambda p: p.node.structure)
        union = list(dict.fromkeys((*x.indices, *y.indices)))
        kept = [i for i in union if not gone(i, subset)]
        lost = [i for i in union if gone(i, subset)]
        indices = tuple(sorted(kept, key=lambda i: not i.kind.token))
        number = {i: p for p, i in enumerate(union)}
        attr = (
            (tuple(number[i] for i in x.indices), tuple(number[i] for i in y.indices)),
            tuple(number[i] for i in indices),
        )
        scan = along.kind.letter if summed in lost and along is not None else None
        if not any(i.kind.token for i in union):
            scan = x.node.scan or y.node.scan  # a running sum times a constant is one of its kind
        return _Partial(score, node("contract", (x.node, y.node), tuple(i.kind for i in indices), attr, scan), indices)

    def _reduce(self, x: _Partial, lost: list[Index], summed: Index | None, along: Index | None) -> _Partial:
        if not lost:
            return x
        kept = tuple(i for i in x.indices if i not in lost)
        number = {i: p for p, i in enumerate(x.indices)}
        attr = ((tuple(number[i] for i in x.indices),), tuple(number[i] for i in kept))
        scan = along.kind.letter if summed in lost and along is not None else None
        tokens = sum(i.kind.token for i in x.indices)
        tokens = 1 if self.near and tokens == 2 else tokens
        score = (
            max(x.score[0], tokens),
            x.score[1] + self.size(x.indices),
            max(x.score[2], self.size(kept)),
            x.score[3],
        )
        return _Partial(score, node("contract", (x.node,), tuple(i.kind for i in kept), attr, scan), kept)


def _degree(select: Factor) -> int:
    assert isinstance(select.tensor, Select)
    return select.tensor.degree
