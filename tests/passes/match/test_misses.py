"""Near misses: name → (function, words of the reason). Each is refused, and its values stay the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import INF, check, compile_and_report, rand, refused

N, D, E = 10, 8, 6


def qkv() -> list[torch.Tensor]:
    return [rand(2, 3, N, D), rand(2, 3, N, D), rand(2, 3, N, E)]


MISSES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {}


def miss(reason: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        MISSES[function.__name__] = (function, reason)
        return function

    return register


@miss("runs over axis -2")
def softmax_over_queries(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v


@miss("neither queries nor keys")
def softmax_over_heads(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(dim=1) @ v


@miss("set to -1.0: that replaces them")
def masked_with_minus_one(q, k, v):
    return (q @ k.transpose(-2, -1)).masked_fill(torch.ones(N, N).tril() == 0, -1.0).softmax(-1) @ v


@miss("set to -10000.0 and multiplied by 0.001")
def masked_with_a_number_that_a_scale_makes_small(q, k, v):
    scores = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(N, N).tril() == 0, -1e4)
    return (scores * 1e-3).softmax(-1) @ v


@miss("torch.int64 is added")
def integer_mask(q, k, v):
    return (q @ k.transpose(-2, -1) + torch.ones(N, N, dtype=torch.long).tril()).softmax(-1) @ v


@miss("varies along the keys")
def scale_of_every_key(q, k, v):
    return (q @ k.transpose(-2, -1) * k.mean(-1)[..., None, :]).softmax(-1) @ v


@miss("multiplied by a tensor")
def bias_before_a_tensor(q, k, v):
    return ((q @ k.transpose(-2, -1) + k.mean(-1)[..., None, :]) * q.abs().mean()).softmax(-1) @ v


@miss("a number is added")
def shifted(q, k, v):
    return (q @ k.transpose(-2, -1) + 1.0).softmax(-1) @ v


@miss("weights are used elsewhere")
def weights_also_returned(q, k, v):
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v + weights.sum()


@miss("scores are used elsewhere")
def scores_also_returned(q, k, v):
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v + scores.mean()


@miss("pass through mul before")
def weights_scaled(q, k, v):
    return ((q @ k.transpose(-2, -1)).softmax(-1) * 0.5) @ v


@miss("pass through detach")
def detached_scores(q, k, v):
    return (q @ k.transpose(-2, -1)).detach().softmax(-1) @ v


@miss("no_grad or autocast region")
def scores_without_grad(q, k, v):
    with torch.no_grad():
        scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v


@miss("changed in place on the way")
def values_changed(q, k, v):
    v = v * 1
    k = k * 1
    scores = q.detach() @ k.detach().transpose(-2, -1)
    weights = scores.softmax(-1)
    k.add_(1.0)
    return weights @ v + k.sum()


@miss("multiplied by -1.0")
def mask_with_negative_scale(q, k, v):
    scores = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(N, N).tril() == 0, -INF)
    return torch.nan_to_num((scores * -1.0).softmax(-1) @ v)


@miss("mixes the query and key axes")
def mixed_view(q, k, v):
    return (q @ k.transpose(-2, -1)).reshape(2, 3, N * N).softmax(-1).reshape(2, 3, N, N) @ v


@miss("einsum, which is not matched yet")
def einsum_with_a_sum_of_its_own(q, k, v):
    return torch.einsum("bhqk,bhke->bhq", (q @ k.transpose(-2, -1)).softmax(-1), v)


@miss("pass through sum")
def scores_are_no_product(q, k, v):
    return (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1).softmax(-1) @ v


@miss("not a product of queries and keys")
def scores_are_an_input(q, k, v):
    return q.softmax(-1) @ v[..., :D, :]


@miss("cast from torch.float64 to torch.float32")
def down_cast(q, k, v):
    return (q @ k.transpose(-2, -1)).float().softmax(-1).double() @ v


@pytest.mark.parametrize("name", sorted(MISSES))
def test_near_miss(name: str) -> None:
    function, words = MISSES[name]
    # under no_grad there is no border of a region in it, and it is attention
    assert words in refused(function, qkv(), inference="no_grad" not in words)


def test_what_is_thrown_away_does_not_count_as_a_use() -> None:
    def function(q, k, v):
        scores = q @ k.transpose(-2, -1)
        weights = scores.softmax(-1)
        scores.clone(), weights.mean(1)
        return weights @ v

    check(function, qkv())


def test_a_softmax_that_feeds_no_product_is_not_reported() -> None:
    compiled, found = compile_and_report(lambda x: (x.softmax(-1) * x).sum())
    compiled(torch.randn(3, 4))
    assert not found[0].sites
    assert not found[0].refusals
