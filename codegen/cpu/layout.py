"""How tiles and states of the CPU target lie in memory, and the expressions that read them as matrices.

Every tile and state has the heads as its first axis, and a *layout*, the letters of its other axes as they lie in
memory. Tiles made by matrix products and feature tiles are feature-major, tokens last; inputs keep their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from sympy.printing.str import StrPrinter

from polyattn.codegen.spec import FEATURES, TOKENS, WIDTHS, KernelSpec
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind

SIZES = {"a": "d", "b": "e", "b̂": "e + 1", "c": "d_1", "i": "T_q", "j": "T_k", "t": "T"}
"""Variables, or expressions, for the sizes of axes that are in every specification."""

Layout = tuple[str, ...]


def rank_name(letter: str) -> str:
    """The variable for the number of features of an axis: r, and r_1 one degree down."""
    level = FEATURES.index(letter)
    return "r" if level == 0 else f"r_{level}"


class Sizes:
    """The variables of an emitted file for the sizes of axes; those of a rule's own axes come from its inputs."""

    def __init__(self, spec: KernelSpec) -> None:
        self._own: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        """Variable → the expression that it is read from, for sizes that a rule brings in."""
        for leaf in spec.leaves:
            for at, kind in enumerate(leaf.axes):
                if kind.feature:
                    self._own[kind.letter] = _variable(kind)
                    self.sources.setdefault(_variable(kind), f"{leaf.name}.shape[{1 + at}]")

    def of(self, letter: str) -> str:
        """The variable, or expression, for the size of an axis.

        Raises:
            EmitError: an axis of no input.
        """
        if letter in FEATURES:
            return rank_name(letter)
        made = SIZES.get(letter) or self._own.get(letter)
        if made is None:
            raise EmitError(f"the CPU target does not know how large the axis {letter} is, which no input has")
        return made

    def shape(self, layout: Layout) -> str:
        """The shape of a tile or state, as comments give it."""
        return f"[{', '.join(['H', *map(self.of, layout)])}]"


def _variable(kind: Kind) -> str:
    if not isinstance(kind.size, sympy.Symbol):
        raise EmitError(f"the CPU target has no variable for the size {kind.size} of the axis {kind.letter}")
    return str(kind.size).replace("'", "_1")


def long(letter: str) -> bool:
    """Whether an axis runs over features: monomials, or those that a rule brings in."""
    return letter not in SIZES


def ordered(found: Iterable[str]) -> Layout:
    """Axes in the order in which this target lays them out: states with features last, tiles with tokens last."""
    short = (*WIDTHS, *TOKENS)

    def key(letter: str) -> tuple[int, int, str]:
        if long(letter):
            return (0 if tile else 2), (FEATURES.index(letter) if letter in FEATURES else len(FEATURES)), letter
        return 1, short.index(letter), letter

    found = tuple(found)
    tile = bool(set(found) & set(TOKENS))
    return tuple(sorted(found, key=key))


@dataclass(frozen=True)
class Value:
    """A Python expression and the layout of what it stands for, beside the axis of heads."""

    name: str
    layout: Layout

    def matrix(self, rows: Layout, columns: Layout) -> str | None:
        """The expression of this value as a batch of matrices, where transposing and flattening are enough."""
        if self.layout == (*rows, *columns):
            return _flat(self.name, len(rows), len(columns))
        if self.layout == (*columns, *rows):
            return _flat(self.name, len(columns), len(rows)) + ".mT"
        return None

    def spread(self, target: Layout, copy: bool = False) -> str:
        """The expression of this value broadcast to a layout that has all of its axes.

        ``copy`` lays a transposed value out anew, for a tile over which it is repeated many times.
        """
        name, wanted = self.name, tuple(x for x in target if x in self.layout)
        if wanted != self.layout:
            if len(wanted) == 2:
                name += ".mT.contiguous()" if copy else ".mT"
            else:
                name += f".permute(0, {', '.join(str(self.layout.index(x) + 1) for x in wanted)})"
        present = [x in self.layout for x in target]
        if all(present):
            return name
        dims = [":", *(":" if here else "None" for here in present)]
        return f"{name}[{_short(dims)}]"


def _flat(name: str, first: int, second: int) -> str:
    name += f".flatten(1, {first})" if first > 1 else ""
    return name + (".flatten(2)" if second > 1 else "")


def _short(dims: Sequence[str]) -> str:
    """An index without its trailing full slices, or with an ellipsis for its leading ones."""
    kept = list(dims)
    while len(kept) > 1 and kept[-1] == ":":
        kept.pop()
    leading = next(k for k, dim in enumerate(kept) if dim != ":")
    return ", ".join(["...", *kept[leading:]] if leading > 1 and len(kept) == len(dims) else kept)


class _Printer(StrPrinter):  # type: ignore[misc]
    """Python without any function: roots are powers."""

    def _print_Pow(self, expr: sympy.Expr, rational: bool = False) -> str:
        made: str = super()._print_Pow(expr, rational=True)
        return made


def number(c: object) -> str:
    """A coefficient as Python; its symbols are variables of the emitted function.

    Raises:
        EmitError: it is more than sums, products and powers of symbols and numbers.
    """
    value = sympy.sympify(c)
    if any(
        not (part.is_Number or part.is_Symbol or part.is_Add or part.is_Mul or part.is_Pow) for part in _parts(value)
    ):
        raise EmitError(f"the CPU target has no code for the coefficient {c}")
    made: str = _Printer().doprint(value)
    return made


def _parts(value: sympy.Expr) -> Iterable[sympy.Expr]:
    made: Iterable[sympy.Expr] = sympy.preorder_traversal(value)
    return made


def shared(layout: Layout) -> Layout:
    """Memory of tiles of one token axis serves queries and keys."""
    return tuple("t" if x in TOKENS else x for x in layout) if layout != TOKENS else layout


def large(layout: Layout) -> bool:
    """Whether a tile is large enough for memory of its own."""
    return len(layout) > 2 or layout == TOKENS or any(map(long, layout))


def column(k: int, wide: int, count: int) -> str:
    """The index of part ``k`` of a stack along its last axis; part ``wide`` is the one that has an axis."""
    if k != wide:
        return str(k if k < wide else k - count)
    return f"{k or ''}:{k + 1 - count or ''}"


def group(value: Value, groups: tuple[int, int]) -> str:
    """A value as a batch of matrices of as many axes as rows and as columns."""
    made = value.matrix(value.layout[: groups[0]], value.layout[groups[0] :])
    assert made is not None
    return made


def matrices(values: Sequence[Value], layout: Layout) -> tuple[str, str, tuple[int, int]] | None:
    """Two values as matrices whose product has a layout, and how many of its axes are rows and columns."""
    for left, right in ((values[0], values[-1]), (values[-1], values[0])):
        rows, columns = (tuple(x for x in v.layout if x in layout) for v in (left, right))
        summed = tuple(x for x in left.layout if x not in layout)
        if summed and rows and columns and (*rows, *columns) == layout:
            first, second = left.matrix(rows, summed), right.matrix(summed, columns)
            if first and second and set(summed) | set(columns) == set(right.layout):
                return first, second, (len(rows), len(columns))
    return None


def einsum(values: Sequence[Value], layout: Layout) -> str:
    """A sum of products as a call of einsum, for axes that do not lie as matrices."""
    names = dict(zip((*WIDTHS, *TOKENS, *FEATURES), "abcdijrstuv", strict=True))
    others = sorted({x for v in values for x in v.layout} - set(names))
    names |= dict(zip(others, "mnopqwxyz", strict=False))
    terms = ["".join(("h", *(names[x] for x in v.layout))) for v in values]
    return (
        f'torch.einsum("{",".join(terms)}->h{"".join(names[x] for x in layout)}", {", ".join(v.name for v in values)})'
    )
