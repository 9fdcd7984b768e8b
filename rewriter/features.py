"""Families of feature maps behind one small interface: generation, Jacobian, cost, domain (math.md §2).

Polynomial features keep each monomial once (symmetric compression): Σ_m c_m (q·k)^m = Σ_α w_α q^α k^α with
w_α = c_|α| · |α|!/α!.  Monomials are ordered by degree and, inside a degree, so that those that start with variable
``a`` are x_a times a *suffix* of the degree below: features of a lower degree are therefore a prefix of the columns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import sympy
import torch

from polyattn.rewriter.expr import R1, D, R


@functools.cache
def monomials(d: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """The monomials of degree at most ``degree`` in ``d`` variables, each as its sorted tuple of variables."""
    return tuple(
        itertools.chain.from_iterable(itertools.combinations_with_replacement(range(d), m) for m in range(degree + 1))
    )


def rank(d: int, degree: int) -> int:
    """Number of features, C(d + degree, degree)."""
    return math.comb(d + degree, degree)


def rank_formula(degree: int) -> sympy.Expr:
    """The number of features as a polynomial in d."""
    return sympy.expand(sympy.prod([D + m for m in range(1, degree + 1)]) / sympy.factorial(degree))


@functools.cache
def multinomials(d: int, degree: int) -> np.ndarray:
    """|α|!/α! of every monomial, float64 [r]."""
    values = []
    for alpha in monomials(d, degree):
        value = math.factorial(len(alpha))
        for variable in set(alpha):
            value //= math.factorial(alpha.count(variable))
        values.append(float(value))
    return np.array(values)


@functools.cache
def degrees(d: int, degree: int) -> np.ndarray:
    """|α| of every monomial, int64 [r]."""
    return np.array([len(alpha) for alpha in monomials(d, degree)], dtype=np.int64)


@functools.cache
def selection(d: int, degree: int) -> np.ndarray:
    """σ(β, a): the column of monomial β·x_a among those of ``degree``, for every β of degree − 1; int64 [r', d]."""
    place = {alpha: column for column, alpha in enumerate(monomials(d, degree))}
    lower = monomials(d, degree - 1)
    return np.array([[place[tuple(sorted((*beta, a)))] for a in range(d)] for beta in lower], dtype=np.int64)


@functools.cache
def columns(d: int, degree: int) -> np.ndarray:
    """The variables of every monomial, one slot per degree, ``d`` in the slots that are left: int32 [degree, r].

    With a column of ones after x, each monomial is the product of ``degree`` columns.
    """
    made = [(*alpha, *[d] * (degree - len(alpha))) for alpha in monomials(d, degree)]
    return np.array(made, dtype=np.int32).reshape(len(made), degree).T.copy()


@functools.cache
def edges(d: int, degree: int) -> np.ndarray:
    """The inverse of :func:`selection`: for each slot of monomial α the β with α = β·x_a, int32 [degree, r].

    −1 in slots without a variable and in those that repeat the variable of an earlier slot, so that each pair (β, a)
    stands once.
    """
    place = {alpha: column for column, alpha in enumerate(monomials(d, degree - 1))}
    made = np.full((degree, rank(d, degree)), -1, dtype=np.int32)
    for column, alpha in enumerate(monomials(d, degree)):
        for slot, variable in enumerate(alpha):
            if variable not in alpha[:slot]:
                made[slot, column] = place[alpha[:slot] + alpha[slot + 1 :]]
    return made


@functools.cache
def layout(d: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """For each degree m ≥ 1: where, in the monomials of degree m − 1, those in variables ≥ a begin, [m−1][a]."""
    return tuple(
        tuple(math.comb(d + m - 2, m - 1) - math.comb(d - a + m - 2, m - 1) for a in range(d))
        for m in range(1, degree + 1)
    )


def generate(x: torch.Tensor, degree: int) -> torch.Tensor:
    """All monomials of the rows: [..., tokens, d] → [..., tokens, r]; n·r multiplications."""
    d = x.shape[-1]
    blocks = [torch.ones_like(x[..., :1])]
    for offsets in layout(d, degree):
        below = blocks[-1]
        blocks.append(torch.cat([x[..., a : a + 1] * below[..., offsets[a] :] for a in range(d)], dim=-1))
    return torch.cat(blocks, dim=-1)


def weights(coefficients: Sequence[float], d: int) -> np.ndarray:
    """w_α = c_|α| · |α|!/α!, float64 [r], for the polynomial Σ_m c_m x^m."""
    degree = len(coefficients) - 1
    by_degree: np.ndarray = np.asarray(coefficients, dtype=np.float64)
    weighted: np.ndarray = by_degree[degrees(d, degree)] * multinomials(d, degree)
    return weighted


def taylor(degree: int) -> tuple[float, ...]:
    """Coefficients of exp's Taylor polynomial; its relative error on |x| ≤ B is below B^(g+1)/(g+1)! · e^{2B}."""
    return tuple(1.0 / math.factorial(m) for m in range(degree + 1))


def rank_symbol(lower: int) -> sympy.Symbol:
    """r for the degree of the polynomial, r' for the degree of its derivative (``lower`` degrees down)."""
    return (R, R1)[lower] if lower < 2 else sympy.Symbol(f"r{lower}", positive=True)
