"""Monomial features: each monomial once, inner products are powers, selections are products."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch

from polyattn.rewriter import features

sizes = hypothesis.given(d=st.integers(1, 6), degree=st.integers(1, 4))
settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=24)


@settings
@sizes
def test_weighted_inner_product_is_the_polynomial(d: int, degree: int) -> None:
    generator = torch.Generator().manual_seed(d)
    q, k = (torch.randn(5, d, dtype=torch.float64, generator=generator) for _ in range(2))
    coefficients = [0.3, -1.0, 2.0, 0.5, 0.25][: degree + 1]
    w = torch.as_tensor(features.weights(coefficients, d))
    found = (features.generate(q, degree) * w) @ features.generate(k, degree).mT
    x = q @ k.mT
    wanted = sum(c * x**m for m, c in enumerate(coefficients))
    torch.testing.assert_close(found, wanted)


@settings
@sizes
def test_a_monomial_times_a_variable_is_the_selected_monomial(d: int, degree: int) -> None:
    x = torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = torch.as_tensor(features.selection(d, degree))
    upper, lower = features.generate(x, degree), features.generate(x, degree - 1)
    torch.testing.assert_close(upper[:, sigma], lower[:, :, None] * x[:, None, :])
    torch.testing.assert_close(upper[:, : lower.shape[1]], lower)


@settings
@sizes
def test_rank_is_a_binomial(d: int, degree: int) -> None:
    assert len(features.monomials(d, degree)) == features.rank(d, degree) == math.comb(d + degree, degree)
    formula = features.rank_formula(degree)
    assert int(formula.subs(dict.fromkeys(formula.free_symbols, d))) == features.rank(d, degree)
    assert len(np.unique(features.selection(d, degree))) == features.rank(d, degree) - 1


def test_ranks_of_the_paper_sizes() -> None:
    assert [features.rank(16, 2), features.rank(32, 2), features.rank(64, 3)] == [153, 561, 47905]
