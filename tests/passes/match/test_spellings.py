"""Four per spelling: it matched, the value is equal, a near miss is refused with its reason, gradients are equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import IN_EVERY_DTYPE, INF, check, check_precision

N, D, E = 10, 8, 6


def qkv(*batch: int, dtype: torch.dtype = torch.float64, keys: int = N) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch, N, D), (*batch, keys, D), (*batch, keys, E)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def causal_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(D)


# ---------------------------------------------------------------------------------------------------------------------
# spellings: name -> (function of q, k, v; causal; scale)

SPELLINGS: dict[str, tuple[Callable[..., torch.Tensor], bool, float]] = {}


def spelling(causal: bool = False, scale: float = 1 / math.sqrt(D)) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        SPELLINGS[function.__name__] = (function, causal, scale)
        return function

    return register


@spelling()
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelling(causal=True, scale=0.3)
def sdpa_causal_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@spelling(causal=True)
def sdpa_boolean_tril(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelling(causal=True)
def sdpa_additive_mask(q, k, v):
    mask = torch.full((q.shape[-2], k.shape[-2]), -INF, dtype=q.dtype).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling()
def sdpa_mask_of_ones(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(N, N, dtype=torch.bool))


@spelling(scale=1.0)
def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


@spelling()
def divided(q, k, v):
    return F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1)), dim=-1).matmul(v)


@spelling(scale=0.25)
def multiplied(q, k, v):
    return ((0.5 * (q @ k.mT)) * 0.5).softmax(-1) @ v


@spelling(scale=1.0)
def scale_on_q(q, k, v):
    return ((q * D**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@spelling(scale=1.0)
def scale_on_both(q, k, v):
    s = D**-0.25
    return ((q * s) @ (k * s).transpose(-2, -1)).softmax(dim=-1) @ v


@spelling(scale=1.0)
def transposed_keys_first(q, k, v):
    return (k @ q.transpose(-2, -1)).transpose(-2, -1).softmax(-1) @ v


@spelling(scale=1.0)
def softmax_over_rows_of_the_transpose(q, k, v):
    return (k @ q.transpose(-2, -1)).softmax(-2).transpose(-2, -1) @ v


@spelling(scale=1.0)
def output_transposed(q, k, v):
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return (v.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)


@spelling(causal=True)
def tril_equals_zero(q, k, v):
    scores = causal_scores(q, k)
    mask = torch.tril(torch.ones(q.size(-2), k.size(-2)))
    return scores.masked_fill(mask == 0, -INF).softmax(-1) @ v


@spelling(causal=True)
def tril_view(q, k, v):
    mask = torch.tril(torch.ones(N, N)).view(1, 1, N, N)
    return causal_scores(q, k).masked_fill(mask[:, :, :N, :N] == 0, -INF).softmax(-1) @ v


@spelling(causal=True)
def not_tril(q, k, v):
    return causal_scores(q, k).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -INF).softmax(-1) @ v


@spelling(causal=True)
def triu_bool(q, k, v):
    return causal_scores(q, k).masked_fill(torch.triu(torch.ones(N, N), diagonal=1).bool(), -INF).softmax(-1) @ v


@spelling(causal=True)
def in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores /= math.sqrt(D)
    scores.masked_fill_(torch.ones(N, N, dtype=torch.bool).triu(1), -INF)
    return scores.softmax(-1) @ v


@spelling(causal=True)
def additive_triu(q, k, v):
    return (causal_scores(q, k) + torch.triu(torch.full((N, N), -INF, dtype=q.dtype), diagonal=1)).softmax(-1) @ v


@spelling(causal=True)
def additive_built_by_masked_fill(q, k, v):
    mask = torch.zeros(N, N, dtype=q.dtype).masked_fill(torch.ones(N, N).tril() == 0, -INF)
    return (mask + causal_scores(q, k)).softmax(-1) @ v


@spelling(causal=True)
def square_subsequent_mask(q, k, v):
    return (causal_scores(q, k) + torch.nn.Transformer.generate_square_subsequent_mask(N, dtype=q.dtype)).softmax(
        -1
    ) @ v


@spelling(causal=True)
def where_aranges(q, k, v):
    i, j = torch.arange(q.size(-2)), torch.arange(k.size(-2))
    return torch.where(i[:, None] >= j[None, :], causal_scores(q, k), -INF).softmax(-1) @ v


@spelling(causal=True)
def aranges_unsqueezed(q, k, v):
    i = torch.arange(N)
    return causal_scores(q, k).masked_fill(i.unsqueeze(0) > i.unsqueeze(1), -INF).softmax(-1) @ v


@spelling(causal=True)
def mask_before_scale(q, k, v):
    scores = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(N, N).tril() == 0, -INF)
    return (scores * D**-0.5).softmax(-1) @ v


@spelling(causal=True, scale=1.0)
def tril_with_a_large_number(q, k, v):
    return (q @ k.transpose(-2, -1)).masked_fill(torch.ones(N, N).tril() == 0, -1e9).softmax(-1) @ v


@spelling(causal=True)
def additive_smallest_number(q, k, v):
    mask = torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return (causal_scores(q, k) + mask).softmax(-1) @ v


@spelling()
def idle_dropout(q, k, v):
    return F.dropout(causal_scores(q, k).softmax(-1), 0.0, training=True) @ v


@spelling()
def contiguous_everywhere(q, k, v):
    scores = causal_scores(q.contiguous(), k.clone()).contiguous()
    return scores.softmax(-1).clone() @ v.contiguous()


@IN_EVERY_DTYPE
@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_spelling_in_every_dtype(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    function, causal, _ = SPELLINGS[name]
    assert check_precision(function, qkv(2, 3), dtype, dynamic).causal is causal


@pytest.mark.parametrize("batch", [(2, 3), (4,), (), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("name", ["plain", "sdpa_causal_scale", "in_place", "output_transposed"])
def test_batches(name: str, batch: tuple[int, ...]) -> None:
    function, causal, _ = SPELLINGS[name]
    if name == "sdpa_causal_scale" and not batch:
        batch = (1,)
    site = check(function, qkv(*batch)).sites[0]
    assert site.causal is causal
    assert site.mask == ("causal" if causal else "none")
    assert site.shape["n_q"] == N
    assert site.shape["d"] == D
    assert site.shape["e"] == E


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_spelling(name: str) -> None:
    function, causal, scale = SPELLINGS[name]
    site = check(function, qkv(2, 3)).sites[0]
    assert site.causal is causal
    assert site.scale == pytest.approx(scale, rel=1e-12)
    assert site.shape == {"batch": 2, "heads": 3, "kv_heads": 3, "n_q": N, "n_k": N, "d": D, "e": E}
    assert f"{Path(__file__).name}:" in site.where
    assert f"in {name}" in site.where


@pytest.mark.parametrize("causal", [False, True])
def test_more_keys_than_queries(causal: bool) -> None:
    def function(q, k, v):
        scores = q @ k.transpose(-2, -1)
        if causal:
            scores = scores.masked_fill(torch.ones(N, N + 5).tril() == 0, -INF)
        return scores.softmax(-1) @ v

    assert check(function, qkv(2, 3, keys=N + 5)).sites[0].causal is causal


def test_folded_heads_and_views_on_the_way() -> None:
    def function(q, k, v):
        b, h = q.shape[:2]
        q, k, v = (x.reshape(b * h, *x.shape[2:]) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, h, N, N)
        scores = scores + torch.full((N, N), -INF, dtype=q.dtype).triu(1)
        weights = scores.softmax(-1).view(b * h, N, N)
        return torch.bmm(weights, v).view(b, h, N, E).transpose(1, 2).reshape(b, N, h * E)

    site = check(function, qkv(2, 3)).sites[0]
    assert site.causal
    assert site.shape["batch"] == 6


def test_unfolded_weights_meet_four_dimensional_values() -> None:
    def function(q, k, v):
        scores = torch.bmm(q.reshape(6, N, D), k.reshape(6, N, D).transpose(1, 2))
        return scores.view(2, 3, N, N).softmax(-1) @ v

    assert check(function, qkv(2, 3)).sites[0].shape["heads"] == 3


def test_one_key_head_serves_all() -> None:
    def function(q, k, v):
        return (q @ k[:, :1].transpose(-2, -1)).softmax(-1) @ v[:, :1].expand(-1, q.shape[1], -1, -1)

    assert check(function, qkv(2, 3)).sites[0].shape["heads"] == 3


def test_grouped_queries() -> None:
    q = qkv(2, 6)[0]
    _, k, v = qkv(2, 3)

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)

    shape = check(function, [q, k, v]).sites[0].shape
    assert (shape["heads"], shape["kv_heads"]) == (6, 3)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["2-D", "batched"])
def test_the_papers_form(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, N, D, generator=generator, dtype=torch.float64).requires_grad_()
    w, wv = (torch.randn(D, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))

    def function(x, w, wv):
        return torch.softmax(x @ w @ x.transpose(-2, -1), dim=-1) @ x @ wv

    def paper(x, w, wv):
        return torch.softmax(x @ w @ x.transpose(-2, -1), dim=-1) @ (x @ wv)

    assert "X W Xᵀ" not in check(function, [x, w, wv]).sites[0].spelling  # (f X) W_V: the values are X
    assert check(paper, [x, w, wv]).sites[0].spelling == "softmax(X W Xᵀ) X W_V"


def test_softmax_in_float32_around_half() -> None:
    def function(q, k, v):
        return F.softmax(q @ k.transpose(-2, -1), dim=-1, dtype=torch.float32).to(q.dtype) @ v

    check_precision(function, qkv(2, 3), torch.bfloat16, False)


def test_two_attentions_in_a_row() -> None:
    def function(q, k, v):
        inner = plain(q, k, k)
        return plain(inner, inner, sdpa(inner, k, v))

    assert len(check(function, qkv(2, 3), sites=3).sites) == 3


def test_self_attention_of_one_tensor() -> None:
    (x, _, _) = qkv(2, 3)
    check(lambda x: (x @ x.transpose(-2, -1)).softmax(-1) @ x, [x])
