"""Monomial features: each monomial once, inner products are powers, selections are products."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from polyattn.rewriter.algebra import monomials

sizes = hypothesis.given(d=st.integers(1, 6), degree=st.integers(1, 4))
settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=24)


@settings
@sizes
def test_weighted_inner_product_is_the_polynomial(d: int, degree: int) -> None:
    generator = torch.Generator().manual_seed(d)
    q, k = (torch.randn(5, d, dtype=torch.float64, generator=generator) for _ in range(2))
    basis = monomials.full(d, degree)
    coefficients = [0.3, -1.0, 2.0, 0.5, 0.25][: degree + 1]
    w = torch.as_tensor(monomials.weights(coefficients, basis))
    found = (monomials.generate(q, basis) * w) @ monomials.generate(k, basis).mT
    x = q @ k.mT
    wanted = sum(c * x**m for m, c in enumerate(coefficients))
    torch.testing.assert_close(found, wanted)


@settings
@sizes
def test_a_monomial_times_a_variable_is_the_selected_monomial(d: int, degree: int) -> None:
    x = torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = monomials.full(d, degree)
    sigma = torch.as_tensor(monomials.selection(basis))
    upper, lower = monomials.generate(x, basis), monomials.generate(x, basis.below(degree - 1))
    torch.testing.assert_close(upper[:, sigma], lower[:, :, None] * x[:, None, :])
    torch.testing.assert_close(upper[:, : lower.shape[1]], lower)


@settings
@sizes
def test_rank_is_a_binomial(d: int, degree: int) -> None:
    basis = monomials.full(d, degree)
    assert len(monomials.monomials(basis)) == monomials.rank(basis) == math.comb(d + degree, degree)
    formula = monomials.rank_formula(degree)
    assert int(formula.subs(dict.fromkeys(formula.free_symbols, d))) == monomials.rank(basis)
    assert len(np.unique(monomials.selection(basis))) == monomials.rank(basis) - 1


def test_ranks_of_the_paper_sizes() -> None:
    assert [monomials.rank(monomials.full(*x)) for x in ((16, 2), (32, 2), (64, 3))] == [153, 561, 47905]


@st.composite
def nested(draw: st.DrawFn) -> monomials.Basis:
    d = draw(st.integers(1, 6))
    widths = [d]
    for _ in range(draw(st.integers(1, 3))):
        widths.append(draw(st.integers(0, widths[-1])))
    return monomials.Basis(d, tuple(widths))


@settings
@hypothesis.given(basis=nested())
def test_nested_forms_are_sums_of_powers_over_the_last_coordinates(basis: monomials.Basis) -> None:
    generator = torch.Generator().manual_seed(basis.d)
    q, k = (torch.randn(4, basis.d, dtype=torch.float64, generator=generator) for _ in range(2))
    coefficients = [0.3, -1.0, 2.0, 0.5, 0.25][: basis.degree + 1]
    phi, psi = monomials.generate(q, basis), monomials.generate(k, basis)
    assert phi.shape[1] == monomials.rank(basis) == len(monomials.monomials(basis))
    found = (phi * torch.as_tensor(monomials.weights(coefficients, basis))) @ psi.mT
    wanted = torch.full_like(found, coefficients[0])
    for m, width in enumerate(basis.widths, 1):
        wanted = wanted + coefficients[m] * (q[:, basis.d - width :] @ k[:, basis.d - width :].mT) ** m
    torch.testing.assert_close(found, wanted)


@settings
@hypothesis.given(basis=nested())
def test_selection_and_edges_of_nested_forms_are_inverse(basis: monomials.Basis) -> None:
    x = torch.randn(3, basis.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upper, lower = monomials.generate(x, basis), monomials.generate(x, basis.below(basis.degree - 1))
    sigma, found = monomials.selection(basis), {}
    for beta, a in itertools.product(range(len(sigma)), range(basis.d)):
        if sigma[beta, a] >= 0:
            torch.testing.assert_close(upper[:, sigma[beta, a]], lower[:, beta] * x[:, a])
            found.setdefault(int(sigma[beta, a]), set()).add(beta)
    by_edges = {
        column: {int(beta) for beta in monomials.edges(basis)[:, column] if beta >= 0}
        for column in range(upper.shape[1])
    }
    assert found == {column: betas for column, betas in by_edges.items() if betas}


@pytest.mark.parametrize(("d", "widths"), [(3, (2,)), (3, (3, 4)), (3, (3, -1))])
def test_widths_that_are_no_nested_form(d: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must start with it and not grow"):
        monomials.Basis(d, widths)
