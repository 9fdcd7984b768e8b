"""Tensors: what a factor of an expression indexes, and the axes that it has.

An axis is a ``Kind`` with a symbolic size; an ``Index`` is one use of it inside a term.  Everything that a factor can
name is a ``Tensor``: inputs, masks, elementwise functions, features, weights, selections, parts of stacks; what holds
expressions itself, named intermediates and stacks, is in ``expr``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy


@dataclass(frozen=True)
class Kind:
    """A sort of axis: its letter, its symbolic size, and whether it runs over tokens, or over features of a rule."""

    letter: str
    size: sympy.Expr
    token: bool = False
    feature: bool = field(default=False, compare=False)

    def __repr__(self) -> str:
        return f"{self.letter}:{self.size}"


@dataclass(frozen=True)
class Index:
    """One index of a kind; the number tells indices of one kind apart inside a term."""

    kind: Kind
    number: int = 0

    def __repr__(self) -> str:
        return self.kind.letter + ("'" * self.number if self.number < 4 else str(self.number))


# Symbols of the costs (math.md's letters).
N_Q, N_K, D, E, R, R1, CHUNK = sympy.symbols("n_q n_k d e r r' C", positive=True)
D1, E1 = sympy.symbols("d' e'", positive=True)
"""Directions of queries and keys, and of values (rewriter/rules/project.py)."""
N = sympy.Symbol("n", positive=True)
RANK_LETTERS = "αβγδε"
"""Axes of monomials by degree, from the top."""
QUERY = Kind("i", N_Q, token=True)
KEY = Kind("j", N_K, token=True)
TOKEN = Kind("t", N, token=True)
T_Q, T_K = sympy.symbols("T_q T_k", positive=True)
"""Tokens of a tile: of queries, of keys."""
NEAR_SHARE = sympy.Symbol("ν", positive=True)
"""The share of the pairs of tiles that are near."""
QUERY_TILE, KEY_TILE = Kind("I", N_Q / T_Q), Kind("J", N_K / T_K)
QUERY_PLACE, KEY_PLACE = Kind("i", T_Q, token=True), Kind("j", T_K, token=True)
"""A token of a sequence in tiles is a tile and a place in it (rewriter/rules/tile.py)."""
HEAD = Kind("a", D)
VALUE = Kind("b", E)
DIRECTION = Kind("c", D1)


class Tensor:
    """What a factor indexes: an input, a named intermediate, a function of one, features, masks, …"""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The axes, in order."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """How formulas and messages call it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Leaf(Tensor):
    """An input tensor."""

    label: str
    axes: tuple[Kind, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return self.axes

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return self.label


@dataclass(frozen=True)
class Indicator(Tensor):
    """0/1 on a pair of tokens: ``causal`` (j ≤ i) or ``all``, or a part of it.

    ``near``: of ``causal``, j ≤ i in i's chunk; of ``all``, j in i's chunk or in one next to it. ``far``: the others.
    """

    which: str
    axes: tuple[Kind, Kind]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return self.axes

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return {"causal": "M", "all": "M", "near": "M_near", "far": "M_far"}[self.which]


@dataclass(frozen=True)
class Map(Tensor):
    """An elementwise function (``exp``, ``reciprocal``) of a tensor."""

    function: str
    argument: Tensor

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return self.argument.kinds

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return f"1/{self.argument.name}" if self.function == "reciprocal" else f"{self.function}({self.argument.name})"


@dataclass(frozen=True)
class Poly(Tensor):
    """A polynomial of a score, elementwise: Σ_m coefficients[m] · score^m; S itself is (0, 1)."""

    score: Tensor
    coefficients: tuple[sympy.Expr, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return self.score.kinds

    @property
    def degree(self) -> int:
        """The highest power."""
        return len(self.coefficients) - 1

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        parts = []
        for power, c in enumerate(self.coefficients):
            if c == 0:
                continue
            base = "" if power == 0 else self.score.name + ("" if power == 1 else f"^{power}")
            parts.append(str(c) if not base else base if c == 1 else f"{c}·{base}")
        return "(" + " + ".join(parts or ["0"]) + ")"


@dataclass(frozen=True)
class Feature(Tensor):
    """Feature map of a token-level tensor: one row of features per token; the family lives in ``features``."""

    source: Tensor
    degree: int
    rank: Kind

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return (self.source.kinds[0], self.rank)

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return f"Φ{self.degree}({self.source.name})"


@dataclass(frozen=True)
class Weights(Tensor):
    """Weight of each monomial: coefficients[|α|] · |α|!/α! (math.md §2, symmetric compression)."""

    coefficients: tuple[sympy.Expr, ...]
    rank: Kind

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return (self.rank,)

    @property
    def degree(self) -> int:
        """The degree of the polynomial that they weigh monomials for."""
        return len(self.coefficients) - 1

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return f"w{self.degree}"


@dataclass(frozen=True)
class Select(Tensor):
    """The constant C[β, a, α] = 1 where monomial α is monomial β times x_a (degree g−1 → g)."""

    lower: Kind
    head: Kind
    upper: Kind
    degree: int

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        return (self.lower, self.head, self.upper)

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return "C"


@dataclass(frozen=True)
class StackedPart(Tensor):
    """Columns ``[:, part]`` of a stacked tensor, as they lay in its Concat."""

    whole: Tensor
    part: int
    widths: tuple[Kind | None, ...]
    """The column kind of every part of the stack; None is a single column without an axis."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """See :attr:`Tensor.kinds`."""
        width = self.widths[self.part]
        return (*self.whole.kinds[:-1], *(() if width is None else (width,)))

    @property
    def name(self) -> str:
        """See :attr:`Tensor.name`."""
        return f"{self.whole.name}[{self.part}]"
