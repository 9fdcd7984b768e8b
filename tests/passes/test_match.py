"""Four per spelling: it matched, the value is equal, a near miss is refused with its reason, gradients are equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import polyattn.ops  # noqa: F401  (registers the operator)
from polyattn.backend import compile_graph
from polyattn.options import Options
from polyattn.report import Report

N, D, E = 10, 8, 6
INF = float("inf")


def compile_and_report(
    function: Callable[..., Any], *, dynamic: bool | None = False
) -> tuple[Callable[..., Any], list[Report]]:
    found: list[Report] = []
    options = Options(policy="exact", inner="eager")

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, options, found.append)

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic), found


def qkv(*batch: int, dtype: torch.dtype = torch.float64, keys: int = N) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch, N, D), (*batch, keys, D), (*batch, keys, E)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def check(
    function: Callable[..., Any], inputs: list[torch.Tensor], *, sites: int = 1, dynamic: bool | None = False
) -> Report:
    """Matched, equal value, equal gradients."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    got, want = compiled(*inputs), function(*inputs)
    (report,) = found
    assert report.failure is None, str(report)
    assert not report.refusals, str(report)
    assert len(report.sites) == sites
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    needing = [value for value in inputs if value.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(got, needing, weight), torch.autograd.grad(want, needing, weight), rtol=1e-8, atol=1e-9
    )
    return report


def refused(function: Callable[..., Any], inputs: list[torch.Tensor]) -> str:
    """Refused, and the value is the user's own; returns the reason."""
    compiled, found = compile_and_report(function)
    got, want = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    (report,) = found
    assert report.failure is None, str(report)
    assert not report.sites, str(report)
    (refusal,) = report.refusals
    assert "test_match.py:" in refusal.where
    assert ", in " in refusal.where
    assert refusal.node
    return refusal.reason


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
    assert "test_match.py:" in site.where
    assert f"in {name}" in site.where


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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_any_order(name: str, dynamic: bool) -> None:
    function, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    report = check(function, inputs, dynamic=dynamic)
    assert report.sites[0].mask == "none"


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

    compiled, found = compile_and_report(function)
    q, k, v = (x.detach().to(torch.bfloat16) for x in qkv(2, 3))
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v), rtol=3e-2, atol=3e-2)
    assert len(found[0].sites) == 1


def test_two_attentions_in_a_row() -> None:
    def function(q, k, v):
        inner = plain(q, k, k)
        return plain(inner, inner, sdpa(inner, k, v))

    assert len(check(function, qkv(2, 3), sites=3).sites) == 3


def test_self_attention_of_one_tensor() -> None:
    (x, _, _) = qkv(2, 3)
    check(lambda x: (x @ x.transpose(-2, -1)).softmax(-1) @ x, [x])


# ---------------------------------------------------------------------------------------------------------------------
# near misses: name -> (function, words of the reason)

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
    assert words in refused(function, qkv(2, 3))


def test_what_is_thrown_away_does_not_count_as_a_use() -> None:
    def function(q, k, v):
        scores = q @ k.transpose(-2, -1)
        weights = scores.softmax(-1)
        scores.clone(), weights.mean(1)
        return weights @ v

    check(function, qkv(2, 3))


def test_a_softmax_that_feeds_no_product_is_not_reported() -> None:
    compiled, found = compile_and_report(lambda x: (x.softmax(-1) * x).sum())
    compiled(torch.randn(3, 4))
    assert not found[0].sites
    assert not found[0].refusals


# ---------------------------------------------------------------------------------------------------------------------
# owners, symbolic sizes


class Block(torch.nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (torch.nn.Linear(dim, dim, dtype=dtype) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, c // self.heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        scores = scores.masked_fill(torch.tril(torch.ones(n, n)) == 0, -INF)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, n, c))


def test_owners_are_the_weights_of_the_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyattn.passes import pipeline

    seen: list[Any] = []
    original = pipeline.splice
    monkeypatch.setattr(pipeline, "splice", lambda site, *args: (seen.append(site), original(site, *args))[1])
    block = Block()
    compiled, _ = compile_and_report(block)
    compiled(torch.randn(2, N, 16, dtype=torch.float64))
    (site,) = seen
    assert [str(owner.target) for owner in site.owners] == [
        "L_self_modules_query_parameters_weight_",
        "L_self_modules_key_parameters_weight_",
    ]


def test_symbolic_sizes_stay_symbolic() -> None:
    compiled, found = compile_and_report(Block(), dynamic=True)
    block = compiled._orig_mod
    for n in (7, 12, 31):
        x = torch.randn(2, n, 16, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-9, atol=1e-9)
    (report,) = found
    (site,) = report.sites
    assert site.compiled_shape["d"] == 8
    assert isinstance(site.compiled_shape["n_q"], str)


def test_scale_of_a_dynamic_size_is_refused() -> None:
    def function(q, k, v):
        return (q @ k.transpose(-2, -1) * (1 / q.shape[-2])).softmax(-1) @ v

    compiled, found = compile_and_report(function, dynamic=True)
    inputs = qkv(2, 3)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert "dynamic size" in found[0].refusals[0].reason


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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [*REPEATS, *NO_REPEATS])
def test_repeated_keys_are_grouped_queries(name: str, dynamic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, N, D), (2, 2, N, D), (2, 2, N, E))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    function = {**REPEATS, **NO_REPEATS}[name]
    (site,) = check(function, inputs, dynamic=dynamic).sites
    if not dynamic:
        assert site.shape["kv_heads"] == (2 if name in REPEATS else 6)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fused_encoder_layer_is_opened(norm_first: bool, activation: str) -> None:
    """A second attention in the graph, which is replaced, makes the opened layer run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(
            16, 2, 32, 0.0, batch_first=True, norm_first=norm_first, activation=activation
        ).eval()
        x = torch.randn(2, N, 16)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[0, 7:] = True
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    for given, mask in (({}, "none"), ({"src_key_padding_mask": padding}, "mask"), ({"src_mask": later}, "mask"),
                        ({"src_key_padding_mask": padding, "src_mask": later}, "mask")):  # fmt: skip

        def function(x, given=given):
            x = layer(x, **given)
            return (x @ x.transpose(-2, -1)).softmax(-1) @ x

        compiled, found = compile_and_report(function)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-5)
        (report,) = found
        assert not report.refusals, str(report)
        assert [site.mask for site in report.sites] == [mask, "none"]
