"""Cached keys, groups of queries, two axes and different widths; masks are read at the offsets that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import INF, rand
from regions import (
    B,
    D,
    E,
    H,
    M,
    N,
    causal,
    check,
    fused,
    plain,
    qkv,
)


def cached(attend):
    return lambda q, k, v, old_k, old_v: attend(q, torch.cat([old_k, k], -2), torch.cat([old_v, v], -2))


def bottom_right(q, k, v):
    kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
    return (q @ k.mT).masked_fill(~kept, -INF).softmax(-1) @ v


def bottom_right_fused(q, k, v):
    kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(diagonal=k.shape[-2] - q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, scale=0.5)


def cache(n: int) -> list[torch.Tensor]:
    return [*qkv(B, H, n=n, m=n), rand(B, H, 7, D, seed=5), rand(B, H, 7, E, seed=6)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("n", [1, 4])
def test_new_queries_and_cached_keys(n: int, dynamic: bool) -> None:
    (site,) = check(cached(plain), cache(n), "none", dynamic=dynamic).sites
    assert dynamic or (site.shape["n_q"], site.shape["n_k"]) == (n, 7 + n)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", [bottom_right, bottom_right_fused])
def test_a_mask_that_ends_at_the_last_key_is_not_the_causal_one(attend: Callable[..., Any], dynamic: bool) -> None:
    (site,) = check(cached(attend), cache(4), "mask", dynamic=dynamic).sites
    assert not site.causal
    assert site.exact


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_groups_of_queries(kv_heads: int) -> None:
    inputs = [rand(B, 4, N, D), rand(B, kv_heads, M, D), rand(B, kv_heads, M, E)]
    (site,) = check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), inputs, "none").sites
    assert (site.compiled_shape["heads"], site.compiled_shape["kv_heads"]) == (4, kv_heads)


@pytest.mark.parametrize("attend", [plain, causal, fused])
def test_two_axes_and_different_widths(attend: Callable[..., Any]) -> None:
    (site,) = check(attend, qkv(), "none" if attend is plain else "causal").sites
    assert site.compiled_shape == {
        "batch": 1, "heads": 1, "kv_heads": 1, "n_q": N, "n_k": M, "d": D, "e": E,
    }  # fmt: skip


@pytest.mark.parametrize("attend", [bottom_right, bottom_right_fused])
def test_a_mask_that_hides_nothing_from_the_last_query_is_none(attend: Callable[..., Any]) -> None:
    (site,) = check(cached(attend), cache(1), "none").sites
    assert site.exact == ""
