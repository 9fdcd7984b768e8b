"""The rule ``tile``: a token is a tile of similar tokens and a place in it (math.md §8).

Q[i,a] → Q[I,i,a],  Σ_j → Σ_J Σ_j,  M[i,j] → M[I,J]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Index, Indicator, Kind, Leaf, Map, Tensor, Term
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import KEY, KEY_PLACE, KEY_TILE, QUERY, QUERY_PLACE, QUERY_TILE
from polyattn.rewriter.algebra.verify import output_axes
from polyattn.rewriter.rules.rule import Rule

TILED: Mapping[Kind, tuple[Kind, Kind]] = {QUERY: (QUERY_TILE, QUERY_PLACE), KEY: (KEY_TILE, KEY_PLACE)}
"""What the tokens of a sequence become."""


@dataclass(frozen=True)
class Tile(Rule):
    """Tokens of queries and keys become tiles and places in them; which pairs of tokens are near is one question for
    a pair of tiles."""

    name = "tile"
    formula = "Q[i,a] → Q[I,i,a],  Σ_j → Σ_J Σ_j,  M[i,j] → M[I,J]"
    source = "math.md §8: tokens sorted by cluster"
    note = "tokens in tiles of similar ones: i is the place i of tile I, j the place j of tile J (§8)"

    def check(self, program: Program) -> str | None:
        """Refuses functions of tokens other than elementwise ones: features, polynomials, stacks."""
        for name, x in program.expressions():
            for term in x.terms:
                for factor in term.factors:
                    if not isinstance(factor.tensor, (Leaf, Def, Map, Indicator)):
                        return f"{name} reads {factor.tensor.name}, which has no form in tiles"
        return None

    def axes(self, program: Program) -> Mapping[str, tuple[Kind, ...]]:
        """The outputs, in tiles."""
        return {name: _kinds(kinds) for name, kinds in output_axes(program).items()}

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        made: dict[str, Def] = {}

        def tensor(old: Tensor) -> Tensor:
            if isinstance(old, Def):
                return made[old.label]
            if isinstance(old, Map):
                return Map(old.function, tensor(old.argument))
            if isinstance(old, Leaf):
                return Leaf(old.label, _kinds(old.axes))
            assert isinstance(old, Indicator)
            return Indicator(old.which, (TILED[old.axes[0]][0], TILED[old.axes[1]][0]))

        def expression(x: Expr) -> Expr:
            terms = []
            for term in x.terms:
                factors = []
                for factor in term.factors:
                    indices = _indices(factor.indices)
                    new = tensor(factor.tensor)
                    factors.append(Factor(new, tuple(i for i in indices if i.kind in new.kinds)))
                terms.append(Term(term.coefficient, tuple(factors)))
            return Expr(_indices(x.indices), tuple(terms))

        for definition in program.defs:
            made[definition.label] = Def(definition.label, expression(definition.expr))
        return Program(tuple(made.values()), {name: expression(x) for name, x in program.outputs.items()})


def _kinds(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    return tuple(new for kind in kinds for new in TILED.get(kind, (kind,)))


def _indices(indices: tuple[Index, ...]) -> tuple[Index, ...]:
    return tuple(Index(kind, index.number) for index in indices for kind in TILED.get(index.kind, (index.kind,)))


TILE = Tile()
