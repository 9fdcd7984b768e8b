"""Products of queries, keys and values in any spelling, repeated keys, hand-written softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import IN_EVERY_DTYPE, STATIC, check, check_precision, rand

N, D, E = 10, 8, 6

_PLAIN = ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E))


def _by_hand(q, k, v, shift, late):
    scores = q @ k.transpose(-2, -1) * 0.3
    if shift:
        scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.exp()
    if late:
        return (weights @ v) / weights.sum(-1, keepdim=True)
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def _sum_unsqueezed(q, k, v):
    scores = q @ k.transpose(-2, -1)
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights / weights.sum(-1).unsqueeze(-1)) @ v


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "einsum heads first": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).mul(0.3).softmax(-1), v),
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E)),
    ),
    "einsum tokens first": (
        lambda q, k, v: torch.einsum(
            "bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D)).softmax(dim=-1), v
        ),
        ((2, N, 3, D), (2, 7, 3, D), (2, 7, 3, E)),
    ),
    "einsum folded heads": (
        lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q * 0.2, k).softmax(-1), v),
        ((6, N, D), (6, 7, D), (6, 7, E)),
    ),
    "einsum one key head": (
        lambda q, k, v: torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v),
        ((2, 3, N, D), (2, 7, D), (2, 7, E)),
    ),
    "einsum one key head, tokens first": (
        lambda q, k, v: torch.einsum("bhij,bjd->bihd", torch.einsum("bihd,bjd->bhij", q, k).softmax(-1), v),
        ((2, N, 3, D), (2, 7, D), (2, 7, E)),
    ),
    "einsum with dots": (
        lambda q, k, v: torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v),
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E)),
    ),
    "einsum keys first": (
        lambda q, k, v: torch.einsum("bhji,bhjd->bhid", torch.einsum("bhid,bhjd->bhji", q, k).softmax(-2), v),
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E)),
    ),
    "einsum then matmul": (
        lambda q, k, v: torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1) @ v.transpose(1, 2),
        ((2, N, 3, D), (2, 7, 3, D), (2, 7, 3, E)),
    ),
    "baddbmm": (
        lambda q, k, v: torch.bmm(
            torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0.0, alpha=0.3).softmax(-1), v
        ),
        ((6, N, D), (6, 7, D), (6, 7, E)),
    ),
    "bmm": (
        lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v),
        ((6, N, D), (6, 7, D), (6, 7, E)),
    ),
    "scaled by one number that is learned": (
        lambda q, k, v, t: ((q @ k.transpose(-2, -1)) * t.exp()).softmax(-1) @ v,
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E), ()),
    ),
    "scaled by one number per head": (
        lambda q, k, v, t: (t * (q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v,
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E), (3, 1, 1)),
    ),
    "divided by one number per query": (
        lambda q, k, v, t: ((q @ k.transpose(-2, -1)) / t.exp()).softmax(-1) @ v,
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E), (1, N, 1)),
    ),
    "scaled in the transpose": (
        lambda q, k, v, t: ((k @ q.transpose(-2, -1)) * t).softmax(-2).transpose(-2, -1) @ v,
        ((2, 3, N, D), (2, 3, 7, D), (2, 3, 7, E), (1, N)),
    ),
    "exponentials over their sum": (lambda q, k, v: _by_hand(q, k, v, False, False), _PLAIN),
    "exponentials of differences to the maximum": (lambda q, k, v: _by_hand(q, k, v, True, False), _PLAIN),
    "normalised after the values": (lambda q, k, v: _by_hand(q, k, v, False, True), _PLAIN),
    "normalised after the values, maximum": (lambda q, k, v: _by_hand(q, k, v, True, True), _PLAIN),
    "sum unsqueezed": (lambda q, k, v: _sum_unsqueezed(q, k, v), _PLAIN),
    "keys transposed beforehand": (
        lambda q, k, v: torch.softmax(q @ k.transpose(1, 2).reshape(2, D, 7) * 0.5, -1) @ v,
        ((2, N, D), (2, 7, D), (2, 7, E)),
    ),
}


def inputs_of(shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    return [rand(*shape, seed=position) for position, shape in enumerate(shapes)]


@STATIC
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_any_order(name: str, dynamic: bool) -> None:
    function, shapes = PRODUCTS[name]
    assert check(function, inputs_of(shapes), dynamic=dynamic).sites[0].mask == "none"


@IN_EVERY_DTYPE
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_every_dtype(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    function, shapes = PRODUCTS[name]
    assert check_precision(function, inputs_of(shapes), dtype, dynamic).mask == "none"


def _expanded(x, repeats):
    b, kv, n, d = x.shape
    return x[:, :, None].expand(b, kv, repeats, n, d).reshape(b, kv * repeats, n, d)


REPEATS: dict[str, Callable[..., Any]] = {
    "expand": lambda q, k, v: (q @ _expanded(k, 3).transpose(2, 3)).softmax(-1) @ _expanded(v, 3),
    "repeat_interleave": lambda q, k, v: (
        (q @ k.repeat_interleave(3, dim=1).mT).softmax(-1) @ v.repeat_interleave(3, dim=1)
    ),
    "torch's own": lambda q, k, v: F.scaled_dot_product_attention(q, _expanded(k, 3), _expanded(v, 3)),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, _expanded(k, 3), _expanded(v, 3), is_causal=True),
}
NO_REPEATS: dict[str, Callable[..., Any]] = {
    "tiled": lambda q, k, v: (q @ k.repeat(1, 3, 1, 1).mT).softmax(-1) @ v.repeat(1, 3, 1, 1),
    "values otherwise": lambda q, k, v: (q @ _expanded(k, 3).mT).softmax(-1) @ v.repeat(1, 3, 1, 1),
    "expanded before the heads": lambda q, k, v: (
        (q @ k[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2).mT).softmax(-1)
        @ v[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2)
    ),
}


REPEATED = ((2, 6, N, D), (2, 2, N, D), (2, 2, N, E))


@STATIC
@pytest.mark.parametrize("name", [*REPEATS, *NO_REPEATS])
def test_repeated_keys_are_grouped_queries(name: str, dynamic: bool) -> None:
    (site,) = check({**REPEATS, **NO_REPEATS}[name], inputs_of(REPEATED), dynamic=dynamic).sites
    if not dynamic:
        assert site.shape["kv_heads"] == (2 if name in REPEATS else 6)


@IN_EVERY_DTYPE
@pytest.mark.parametrize("name", [*REPEATS, *NO_REPEATS])
def test_repeated_keys_in_every_dtype(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    check_precision({**REPEATS, **NO_REPEATS}[name], inputs_of(REPEATED), dtype, dynamic)
