"""Scores, masks, queries and outputs that are changed in place; writes through views of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import INF, rand, refused
from regions import (
    B,
    H,
    M,
    N,
    after,
    check,
    fill,
    plain,
    qkv,
)


def mask_made_in_place(q, k, v):
    mask = torch.full((q.shape[-2], k.shape[-2]), -INF, dtype=q.dtype)
    mask.triu_(1)
    return (q @ k.mT + mask).softmax(-1) @ v


def changed_before_and_after(q, k, v):
    q = q * 2
    q.sub_(1.0)
    out = plain(q, k, v)
    return out.add_(1.0)


IN_PLACE: dict[str, tuple[Callable[..., Any], str, list[torch.Tensor]]] = {
    # function, mask, what else it takes
    "scale": (after(lambda scores: (scores.mul_(0.25), scores.div_(2.0))), "none", []),
    "masked_fill": (after(fill), "causal", []),
    "bias": (after(lambda scores, bias: (scores.add_(bias), scores.sub_(bias[..., :1]))), "bias", [rand(H, N, M)]),
    "mask": (mask_made_in_place, "causal", []),
    "queries and output": (changed_before_and_after, "none", []),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str, dynamic: bool) -> None:
    function, mask, more = IN_PLACE[name]
    check(function, [*qkv(B, H), *more], mask, dynamic=dynamic)


def view_scaled(q, k, v):
    scores = (q @ k.mT).view(B * H, N, M)
    scores.mul_(0.5)
    return scores.view(B, H, N, M).softmax(-1) @ v


def values_changed(q, k, v):
    v = v * 1
    weights = (q @ k.mT).softmax(-1)
    v[..., 0] = 0.0
    return weights @ v


WRITES = {
    "a view of the scores": (view_scaled, "mul_"),
    "the scores through a view": (after(lambda scores: fill(scores.view(B * H, N, M))), "used elsewhere"),
    "columns of the scores": (after(lambda scores: scores[..., 5:].fill_(-INF)), "used elsewhere"),
    "values between weights and product": (values_changed, "changed in place on the way"),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_through_views(name: str) -> None:
    function, words = WRITES[name]
    assert words in refused(function, qkv(B, H))
