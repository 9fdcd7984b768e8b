"""Families of feature maps behind one small interface: generation, Jacobian, cost, domain (math.md §2).

Polynomial features keep each monomial once (symmetric compression): Σ_m c_m (q·k)^m = Σ_α w_α q^α k^α with
w_α = c_|α| · |α|!/α!.  Monomials are ordered by degree and, inside a degree, so that those that start with variable
``a`` are x_a times a *suffix* of the degree below: features of a lower degree are therefore a prefix of the columns.
Nested forms, Σ_m c_m (q·k restricted to its last w_m coordinates)^m, keep of each degree the monomials in the last
variables: the same order, with fewer of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sympy
import torch

from polyattn.rewriter.algebra.tensor import R1, RANK_LETTERS, D, Kind, R


@dataclass(frozen=True)
class Basis:
    """A set of monomials in d variables: of degree m those in the last ``widths[m − 1]`` variables alone.

    Widths do not grow with the degree and the first is d; all of them d is the full form. In nested forms the variables
    are rotated so that the last ones matter most (math.md §3, "Rotation").
    """

    d: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        wider = any(a < b for a, b in itertools.pairwise(self.widths))
        if wider or any(m < 0 for m in self.widths) or self.widths[:1] not in ((), (self.d,)):
            raise ValueError(
                f"widths of monomials in {self.d} variables must start with it and not grow: {self.widths}"
            )

    @property
    def degree(self) -> int:
        """The highest degree of its monomials."""
        return len(self.widths)

    def below(self, degree: int) -> Basis:
        """The monomials of at most a degree: the first columns."""
        return Basis(self.d, self.widths[:degree])


def full(d: int, degree: int) -> Basis:
    """All monomials of at most a degree."""
    return Basis(d, (d,) * degree)


@functools.cache
def monomials(basis: Basis) -> tuple[tuple[int, ...], ...]:
    """The monomials by degree, each as its sorted tuple of variables."""
    d = basis.d
    return tuple(
        itertools.chain.from_iterable(
            itertools.combinations_with_replacement(range(d - width, d), m)
            for m, width in enumerate((d, *basis.widths))
        )
    )


def rank(basis: Basis) -> int:
    """Number of features, Σ_m C(w_m + m − 1, m); of the full form C(d + degree, degree)."""
    return 1 + sum(math.comb(width + m - 1, m) for m, width in enumerate(basis.widths, 1))


def rank_formula(degree: int) -> sympy.Expr:
    """The number of features of the full form as a polynomial in d."""
    return sympy.expand(sympy.prod([D + m for m in range(1, degree + 1)]) / sympy.factorial(degree))


@functools.cache
def multinomials(basis: Basis) -> np.ndarray:
    """|α|!/α! of every monomial, float64 [r]."""
    values = []
    for alpha in monomials(basis):
        value = math.factorial(len(alpha))
        for variable in set(alpha):
            value //= math.factorial(alpha.count(variable))
        values.append(float(value))
    return np.array(values)


@functools.cache
def degrees(basis: Basis) -> np.ndarray:
    """|α| of every monomial, int64 [r]."""
    return np.array([len(alpha) for alpha in monomials(basis)], dtype=np.int64)


@functools.cache
def selection(basis: Basis) -> np.ndarray:
    """σ(β, a): the column of monomial β·x_a, for every β one degree below; int64 [r', d].

    −1 where it is not among the columns, which happens in nested forms: there the derivative has no such term either.
    """
    place = {alpha: column for column, alpha in enumerate(monomials(basis))}
    lower = monomials(basis.below(basis.degree - 1))
    return np.array(
        [[place.get(tuple(sorted((*beta, a))), -1) for a in range(basis.d)] for beta in lower], dtype=np.int64
    )


@functools.cache
def columns(basis: Basis) -> np.ndarray:
    """The variables of every monomial, one slot per degree, ``d`` in the slots that are left: int32 [degree, r].

    With a column of ones after x, each monomial is the product of ``degree`` columns.
    """
    made = [(*alpha, *[basis.d] * (basis.degree - len(alpha))) for alpha in monomials(basis)]
    return np.array(made, dtype=np.int32).reshape(len(made), basis.degree).T.copy()


@functools.cache
def edges(basis: Basis) -> np.ndarray:
    """The inverse of :func:`selection`: for each slot of monomial α the β with α = β·x_a, int32 [degree, r].

    −1 in slots without a variable and in those that repeat the variable of an earlier slot, so that each pair (β, a)
    stands once.
    """
    place = {alpha: column for column, alpha in enumerate(monomials(basis.below(basis.degree - 1)))}
    made = np.full((basis.degree, rank(basis)), -1, dtype=np.int32)
    for column, alpha in enumerate(monomials(basis)):
        for slot, variable in enumerate(alpha):
            if variable not in alpha[:slot]:
                made[slot, column] = place[alpha[:slot] + alpha[slot + 1 :]]
    return made


Starts = tuple[tuple[tuple[int, int], ...], ...]


@functools.cache
def layout(basis: Basis) -> Starts:
    """For each degree m ≥ 1 the variables a that monomials start with, and where those in variables ≥ a begin below.

    Pairs (a, offset): x_a times the monomials of degree m − 1 from ``offset`` on are the next ones of degree m.
    """
    made, d = [], basis.d
    for m, width in enumerate(basis.widths, 1):
        below = math.comb(basis.widths[m - 2] + m - 2, m - 1) if m > 1 else 1
        made.append(tuple((a, below - math.comb(d - a + m - 2, m - 1)) for a in range(d - width, d)))
    return tuple(made)


def generate(x: torch.Tensor, basis: Basis) -> torch.Tensor:
    """All monomials of the rows: [..., tokens, d] → [..., tokens, r]; n·r multiplications."""
    blocks = [torch.ones_like(x[..., :1])]
    for offsets in layout(basis):
        below = blocks[-1]
        products = [x[..., a : a + 1] * below[..., offset:] for a, offset in offsets]
        blocks.append(torch.cat([below[..., :0], *products], dim=-1))
    return torch.cat(blocks, dim=-1)


def weights(coefficients: Sequence[float], basis: Basis) -> np.ndarray:
    """w_α = c_|α| · |α|!/α!, float64 [r], for the polynomial Σ_m c_m x^m."""
    by_degree: np.ndarray = np.asarray(coefficients, dtype=np.float64)
    weighted: np.ndarray = by_degree[degrees(basis)] * multinomials(basis)
    return weighted


def taylor(degree: int) -> tuple[float, ...]:
    """Coefficients of exp's Taylor polynomial; its relative error on |x| ≤ B is below B^(g+1)/(g+1)! · e^{2B}."""
    return tuple(1.0 / math.factorial(m) for m in range(degree + 1))


def rank_kind(top: int, degree: int) -> Kind:
    """The axis of the features of a degree, in a program whose highest degree is ``top``."""
    return Kind(RANK_LETTERS[top - degree], rank_symbol(top - degree))


def rank_symbol(lower: int) -> sympy.Symbol:
    """r for the degree of the polynomial, r' for the degree of its derivative (``lower`` degrees down)."""
    return (R, R1)[lower] if lower < 2 else sympy.Symbol(f"r{lower}", positive=True)
