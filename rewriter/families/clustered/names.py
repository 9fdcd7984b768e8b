"""Names for the sums of a program in tiles: the same sum has one name, sums over places come before sums over tiles."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Index, Kind, Tensor, Term
from polyattn.rewriter.algebra.tensor import KEY_PLACE, KEY_TILE

ONE = sympy.Integer(1)
_LABELS = {
    ("OMEGA", "V"): "NP",
    ("KAPPA", "V", "W_K"): "MB",
    ("LAMBDA", "MB"): "MA",
    ("E", "NP"): "NFAR",
}
"""By what is multiplied and summed."""


def term(*factors: tuple[Tensor | Index, ...], c: sympy.Expr = ONE) -> Term:
    """A product of tensors at indices, each given as a tensor and its indices."""
    made = []
    for tensor, *indices in factors:
        assert isinstance(tensor, Tensor)
        made.append(Factor(tensor, tuple(index for index in indices if isinstance(index, Index))))
    return Term(c, tuple(made))


class Names:
    """Definitions by label, and by what they stand for."""

    def __init__(self) -> None:
        self.made: dict[str, Def] = {}
        self._by_expr: dict[str, Def] = {}

    def define(self, label: str, out: tuple[Index, ...], *terms: Term) -> Def:
        """A definition, once."""
        return self.find(label, Expr(out, terms))

    def find(self, label: str, x: Expr) -> Def:
        """The definition of an expression: the one that there is, or a new one with this label."""
        new = ir.fresh((index.kind for index in x.indices), ())
        mapping = dict(zip(x.indices, new, strict=True))
        terms = (ir.avoid(t, t.bound(x.out), frozenset((*new, *mapping))).rename(mapping) for t in x.terms)
        normal = ir.collect(Expr(new, tuple(terms)))
        key = repr(normal)
        if key not in self._by_expr:
            unique, number = label, 1
            while unique in self.made:
                number += 1
                unique = f"{label}{number}"
            self.made[unique] = self._by_expr[key] = Def(unique, normal)
        return self._by_expr[key]

    def sums(self, x: Term, out: Iterable[Index | None]) -> Term:
        """The term with its sums over keys named: first those over the places of a tile, then those over tiles."""
        for kind in (KEY_PLACE, KEY_TILE):
            for index in sorted((i for i in x.bound(out) if i.kind == kind), key=repr):
                x = self._sum(x, index, kind)
        return x

    def _sum(self, x: Term, index: Index, kind: Kind) -> Term:
        inner = tuple(f for f in x.factors if index in f.indices)
        rest = tuple(f for f in x.factors if f not in inner)
        open_ = tuple(dict.fromkeys(i for f in inner for i in f.indices if i != index))
        order = tuple(sorted(open_, key=lambda i: (i.kind.letter not in "I", i.kind.letter not in "iJ", repr(i))))
        label = _LABELS.get(tuple(sorted(f.tensor.name for f in inner)), f"T_{kind.letter}")
        made = self.find(label, Expr(order, (Term(ONE, inner),)))
        return Term(x.coefficient, (Factor(made, order), *rest))
