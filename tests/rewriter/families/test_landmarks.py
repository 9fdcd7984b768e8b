"""Fits of skeleton features by themselves: errors, near fields, determinism, large logits, the fitted domain."""

from __future__ import annotations

import math

import pytest
import torch
from rules import mask_of

from polyattn.rewriter.families.skeleton.landmarks import Landmarks, fit
from polyattn.rewriter.masks.mask import CAUSAL

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SCALE = 0.35


def tokens(heads: int = 2, elements: int = 1, n: int = 320, d: int = 8, size: float = 0.4, seed: int = 0) -> Tokens:
    """Queries and keys in a few directions, [heads, elements, n, d], and weights of the keys."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    basis = rand(heads, 1, 3, d)
    q, k = (size * rand(heads, elements, n, 3) @ basis for _ in range(2))
    return q, k, (0.3 * rand(heads, elements, n)).exp()


def local(n: int, width: float) -> Tokens:
    """Tokens that attend to their neighbours, some ``width`` tokens to each side, besides a few directions: logits of
    random cosines of the distance, all at their peak where it is 0."""
    q, k, weights = tokens(n=n)
    speed = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / width
    angle = torch.arange(n, dtype=torch.float64)[:, None] * speed
    turn = 1.2 * torch.cat([angle.cos(), angle.sin()], 1).expand(2, 1, n, 24)
    return torch.cat([q, turn], 3), torch.cat([k, turn], 3), weights


def made(x: Tokens, m: int, causal: bool = False, near: int | None = None) -> Landmarks:
    return fit(*x, SCALE, m, torch.Generator().manual_seed(0), mask_of(causal, near is not None), near=near)


def row_errors(x: Tokens, found: Landmarks, causal: bool = False, near: int | None = None) -> torch.Tensor:
    """Σ_j |P̃_ij − P_ij| with a near field that is exact, all densely and in the tokens' dtype, [heads, elements, n]."""
    q, k, weights = x
    keys, queries, core = (part[:, None].to(q.dtype) for part in (found.keys, found.queries, found.core))
    a = (SCALE * q @ keys.mT).exp() @ core @ ((SCALE * k @ queries.mT).exp() * weights[..., None]).mT
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    logits = SCALE * q @ k.mT + weights.log()[..., None, :]
    hidden = (j > i) if causal else torch.zeros_like(j > i)
    if near is not None:
        gap = i // near - j // near
        a = torch.where((gap == 0) if causal else (gap.abs() <= 1), logits.exp(), a)
    a = a.masked_fill(hidden, 0)
    exact = logits.masked_fill(hidden, -math.inf).softmax(-1)
    return (a / a.sum(-1, keepdim=True) - exact).abs().sum(-1)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("elements", [1, 3])
@pytest.mark.parametrize("near", [None, 16])
def test_the_error_is_that_of_all_rows(causal: bool, elements: int, near: int | None) -> None:
    x = tokens(elements=elements)
    found = made(x, 64, causal, near)
    rows = row_errors(x, found, causal, near).mean((1, 2))
    torch.testing.assert_close(found.error, rows, rtol=0.5, atol=1e-6)
    assert bool((rows < (0.3 if causal and near is None else 0.1)).all()), rows  # first rows see little


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_fit_of_the_far_field_is_better_where_the_near_one_is_exact(causal: bool) -> None:
    n, near, m = 768, 32, 96
    x = local(n, 8)
    blind, aware = (row_errors(x, made(x, m, causal, chunk), causal, near).mean((1, 2)) for chunk in (None, near))
    assert bool((aware < 0.75 * blind).all()), (blind, aware)


def test_more_landmarks_err_less() -> None:
    x = tokens(n=600)
    errors = [made(x, m).error.max() for m in (8, 32, 128)]
    assert errors[2] < 0.2 * errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("near", [None, 16])
def test_a_seeded_generator_decides_and_the_global_one_is_left_alone(near: int | None) -> None:
    x, before = tokens(elements=2), torch.get_rng_state()
    first, second = made(x, 24, True, near), made(x, 24, True, near)
    other = fit(*x, SCALE, 24, torch.Generator().manual_seed(1), CAUSAL, near=near)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.core, other.core)


@pytest.mark.parametrize("near", [None, 4])
@pytest.mark.parametrize("n", [1, 10])
def test_fewer_tokens_than_landmarks(n: int, near: int | None) -> None:
    x = tokens(n=n, elements=2)
    found = made(x, 24, near=near)
    assert found.keys.shape == found.queries.shape == (2, 24, 8)
    assert found.core.shape == (2, 24, 24)
    assert float(row_errors(x, found, near=near).max()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("near", [None, 16])
@pytest.mark.parametrize("elements", [1, 3])
def test_keys_of_weight_zero(elements: int, near: int | None, causal: bool, dtype: torch.dtype) -> None:
    q, k, weights = (x.to(dtype) for x in tokens(elements=elements))
    weights[..., :3] = 0  # causal: the first rows attend to nothing
    weights[..., 7::3] = 0
    x = q, k.where(weights[..., None] > 0, 3 * k), weights  # others than those that are left
    found = made(x, 64, causal, near)
    assert all(torch.isfinite(part.to(dtype)).all() for part in found)
    rows = row_errors(x, found, causal, near)[..., 3:].mean((1, 2)).double()
    torch.testing.assert_close(found.error, rows, rtol=0.5, atol=1e-6)
    assert bool((rows < (0.3 if causal and near is None else 0.1)).all()), rows


def test_fewer_keys_of_positive_weight_than_landmarks() -> None:
    q, k, weights = tokens()
    weights[..., 10:] = 0
    found = made((q, k, weights), 24)
    assert all(torch.isfinite(part).all() for part in found)
    assert float(row_errors((q, k, weights), found).max()) < 0.2


@pytest.mark.parametrize(("n_q", "n_k"), [(50, 300), (300, 50)])
def test_as_many_queries_as_keys_are_not_needed(n_q: int, n_k: int) -> None:
    q, k, weights = tokens(n=300)
    x = q[:, :, :n_q], k[:, :, :n_k], weights[:, :, :n_k]
    assert float(row_errors(x, made(x, 64)).mean()) < 0.05


@pytest.mark.parametrize("largest", [20.0, 80.0])
def test_large_logits_in_float32(largest: float) -> None:
    q, k, weights = (x.float() for x in tokens(n=400))
    q = q * (largest / (SCALE * q @ k.mT).abs().amax())
    found = made((q, k, weights), 64)
    assert all(torch.isfinite(part).all() for part in found)
    assert all(torch.isfinite(part.float()).all() for part in found)
    rows = row_errors((q, k, weights), found)
    assert torch.isfinite(rows).all()
    assert bool(((rows.mean((1, 2)) / found.error).log().abs() < 1).all()), (rows.mean((1, 2)), found.error)


@pytest.mark.parametrize("near", [None, 16])
@pytest.mark.parametrize("largest", [300.0, 1e4])
def test_logits_beyond_float32_give_no_nan(largest: float, near: int | None) -> None:
    q, k, weights = (x.float() for x in tokens(n=400))
    q = q * (largest / (SCALE * q @ k.mT).abs().amax())
    found = made((q, k, weights), 64, near=near)
    assert all(torch.isfinite(part.float()).all() for part in (found.keys, found.queries, found.core, found.radius))
    assert not found.error.isnan().any()


def test_the_radius_holds_the_queries_of_the_fit_and_not_others() -> None:
    x = tokens(n=400, elements=2)
    found = made(x, 64)
    norms = x[0].norm(dim=3)
    assert bool((norms <= found.radius[:, None, None] * (1 + 1e-9)).all())
    far = x[0] * (1.8 * found.radius[:, None, None] / norms)[..., None]
    inside, outside = row_errors(x, found), row_errors((far, *x[1:]), found)
    assert bool((outside.mean((1, 2)) > 3 * inside.mean((1, 2))).all()), (inside.mean((1, 2)), outside.mean((1, 2)))
