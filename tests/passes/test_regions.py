"""Attention inside regions, and ways to run a graph: autocast, no_grad, checkpoints, in-place calls, caches."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import EXACT, INF, compile_and_report, gradients, rand, refused
from torch.utils.checkpoint import checkpoint

from polyattn.errors import ExpectSitesError
from polyattn.passes import pipeline
from polyattn.report.model import Report
from polyattn.runtime import exact

B, H, N, M, D, E = 2, 3, 6, 8, 4, 5
MINE = Path(__file__).name
LOW = torch.bfloat16


def qkv(*batch: int, n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [
        rand(*batch, n, D, dtype=dtype),
        rand(*batch, m, D, seed=1, dtype=dtype),
        rand(*batch, m, E, seed=2, dtype=dtype),
    ]


def same(got: torch.Tensor, want: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got.requires_grad == want.requires_grad
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=1e-8, atol=1e-9)


def check(function: Callable[..., Any], inputs: list[torch.Tensor], *masks: str, dynamic: bool = False) -> Report:
    """One graph whose sites have these masks, nothing refused, equal value and gradients."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    same(compiled(*inputs), function(*inputs), inputs)
    (report,) = found
    assert report.failure is None, str(report)
    assert not report.refusals, str(report)
    assert tuple(site.mask for site in report.sites) == masks
    assert all(f"{MINE}:" in site.where for site in report.sites)
    return report


def plain(q, k, v):
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


def masked(q, k, v, keep):
    return ((q @ k.mT) * 0.5).masked_fill(~keep, -INF).softmax(-1) @ v


def causal(q, k, v):
    return masked(q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())


def biased(q, k, v, bias):
    return ((q @ k.mT) * 0.5 + bias).softmax(-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def after(change: Callable[..., Any]) -> Callable[..., Any]:
    """Attention whose scores are changed in place."""

    def function(q, k, v, *more):
        scores = q @ k.mT
        change(scores, *more)
        return scores.softmax(-1) @ v

    return function


def fill(scores):
    scores *= 0.5
    scores.masked_fill_(torch.ones(scores.shape[-2:]).tril() == 0, -INF)


def under(mode: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def region(*inputs: torch.Tensor) -> Any:
        with mode():
            return function(*inputs)

    return region


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", LOW, enabled=enabled)


KEEP = torch.tensor([[True] * 5 + [False] * 3, [True] * 8])[:, None, None]

# ---------------------------------------------------------------------------------------------------------------------
# autocast, and the same by hand


def baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0.0, alpha=0.5).softmax(-1), v)


SPELLINGS: dict[str, tuple[Callable[..., Any], str]] = {
    "by hand": (plain, "none"),
    "causal": (causal, "causal"),
    "masked": (lambda q, k, v: masked(q, k, v, torch.arange(k.shape[-2]) < 5), "mask"),
    "einsum": (
        lambda q, k, v: torch.einsum("bhij,bhje->bhie", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v), "none",
    ),
    "baddbmm": (baddbmm, "none"),
    "in place": (after(fill), "causal"),
    "torch's own": (fused, "causal"),
}  # fmt: skip


def narrow_mask(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


BY_HAND: dict[str, tuple[Callable[..., Any], str]] = {
    # The reference has a softmax in float32 as well, whose rounding is small beside that of what is tested.
    "softmax in float32": (lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32).to(v.dtype) @ v, "none"),
    "scores in float32": (lambda q, k, v: ((q @ k.mT).float() * 0.5).softmax(-1).type_as(v) @ v, "none"),
    "masked while narrow": (narrow_mask, "causal"),
}


def no_less_precise(function: Callable[..., Any], inputs: list[torch.Tensor], reference: Callable[..., Any]) -> Report:
    """Output and gradients: the error against float64 is at most twice eager's (or a rounding of float32)."""
    compiled, found = compile_and_report(function)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    sides = [(compiled(*inputs), inputs), (function(*inputs), inputs), (reference(*wide), wide)]
    assert sides[0][0].dtype == sides[1][0].dtype
    results = [(y, *gradients(y, of)) for y, of in sides]
    for got, eager, right in zip(*results, strict=True):
        error, allowed = (got - right).norm(), 2 * (eager - right).norm() + 1e-6 * right.norm()
        assert error.item() <= allowed.item()
    (report,) = found
    assert report.failure is None, str(report)
    return report


@pytest.mark.parametrize("place", ["around", "inside"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_autocast(name: str, place: str) -> None:
    function, mask = SPELLINGS[name]
    inputs = qkv(B, H, n=16, m=24, dtype=torch.float32)
    reference = under(lambda: autocast(False), function)
    with autocast(place == "around"):
        report = no_less_precise(function if place == "around" else under(autocast, function), inputs, reference)
    (site,) = report.sites
    assert (site.mask, report.refusals) == (mask, ())


@pytest.mark.parametrize("dtype", [torch.float16, LOW], ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_narrow_scores_and_a_softmax_in_float32(name: str, dtype: torch.dtype) -> None:
    function, mask = BY_HAND[name]
    report = no_less_precise(function, qkv(B, H, n=16, m=24, dtype=dtype), function)
    (site,) = report.sites
    assert (site.mask, report.refusals) == (mask, ())


def test_float64_is_left_alone_by_autocast() -> None:
    check(under(autocast, plain), qkv(B, H), "none")


def test_a_region_that_ends_on_the_way_is_a_border() -> None:
    def function(q, k, v):
        with autocast():
            scores = q @ k.mT
        return scores.float().softmax(-1) @ v

    assert "border of a no_grad or autocast region" in refused(function, qkv(B, H, dtype=torch.float32))


def test_wide_weights_meet_wide_values() -> None:
    def function(q, k, v):
        return (q @ k.mT).softmax(-1, dtype=torch.float32) @ v.float()

    assert "different dtypes" in refused(function, qkv(B, H, dtype=LOW))


# ---------------------------------------------------------------------------------------------------------------------
# activation checkpointing


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)


BODIES: dict[str, tuple[Callable[..., Any], list[torch.Tensor], tuple[str, ...], int]] = {
    # body, further inputs, masks of the sites, how many of them are the operator
    "plain": (plain, [], ("none",), 1),
    "causal": (causal, [], ("causal",), 1),
    "masked": (masked, [KEEP], ("mask",), 0),
    "bias": (biased, [rand(H, N, M)], ("bias",), 0),
    "two": (lambda q, k, v: plain(q, k, causal(k, k, v)), [], ("causal", "none"), 2),
    "masked and plain": (lambda q, k, v, keep: plain(q, k, masked(k, k, v, keep)), [KEEP], ("mask", "none"), 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_checkpointed_bodies_are_rewritten_and_run_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, more, masks, count = BODIES[name]
    graphs: list[Any] = []
    run = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *args, **how: (graphs.append(run(*args, **how)), graphs[-1])[1])
    check(checkpointed(body), [*qkv(B, H), *more], *masks)
    rewritten = graphs[0].graph
    assert (rewritten is None) == all("stays as it was" in site.exact for _, site in graphs[0].sites)
    if rewritten is not None:
        (call,) = rewritten.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
        )
        assert call.kwargs["use_reentrant"] is False
        inner = getattr(rewritten, str(call.args[0].target))
        assert [n.target for n in inner.graph.nodes].count(torch.ops.polyattn.attention.default) == count


@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "plain"])
def test_a_checkpoint_recomputes_in_the_backward(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(exact, name)
        return lambda *args: (calls.append(name), original(*args))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(exact, name, counted(name))
    inputs = qkv(B, H)
    out = compile_and_report(checkpointed(causal) if again else causal)[0](*inputs)
    assert calls == ["forward"]
    gradients(out, inputs)
    assert calls == ["forward", *["forward"] * again, "backward"]


def test_a_checkpointed_near_miss_is_refused() -> None:
    assert "axis -2" in refused(checkpointed(lambda q, k, v: (q @ k.mT).softmax(-2) @ v), qkv(B, H))


# ---------------------------------------------------------------------------------------------------------------------
# in-place calls


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


# ---------------------------------------------------------------------------------------------------------------------
# grad modes


def mask_without(q, k, v):
    with torch.no_grad():
        hidden = torch.ones(N, M, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(hidden, -INF).softmax(-1) @ v


GRAD: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "all of it without": (under(torch.no_grad, plain), ("none",)),
    "the mask without": (mask_without, ("causal",)),
    "one of two without": (
        lambda q, k, v: under(torch.no_grad, plain)(q, k, v) + causal(q, k, v), ("none", "causal"),
    ),
    "inference mode inside": (
        under(torch.inference_mode, lambda *inputs: plain(*(x.detach() for x in inputs))), ("none",),
    ),
    "enabled inside": (under(torch.enable_grad, plain), ("none",)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAD)
def test_grad_modes(name: str) -> None:
    function, masks = GRAD[name]
    check(function, qkv(B, H), *masks)


def test_gradients_enabled_inside_no_grad() -> None:
    with torch.no_grad():
        check(under(torch.enable_grad, plain), qkv(B, H), "none")


def test_inference_mode_around() -> None:
    with torch.inference_mode():
        check(lambda q, k, v, keep, bias: masked(q, k, v, keep) + biased(q, k, v, bias),
              [x.clone() for x in (*qkv(B, H), KEEP, rand(H, N, M))], "mask", "bias")  # fmt: skip


@pytest.mark.parametrize("part", ["weights", "product"])
def test_a_part_without_gradients_is_a_border(part: str) -> None:
    def function(q, k, v):
        with torch.no_grad() if part == "weights" else contextlib.nullcontext():
            weights = (q @ k.mT).softmax(-1)
        with torch.no_grad() if part == "product" else contextlib.nullcontext():
            return weights @ v

    assert "border of a no_grad or autocast region" in refused(function, qkv(B, H), inference=False)


# ---------------------------------------------------------------------------------------------------------------------
# graphs, reports and the log


def broken(q, k, v):
    out = plain(q, k, v)
    torch._dynamo.graph_break()
    return causal(out[..., :D], k, v)


def test_one_report_for_each_graph() -> None:
    compiled, found = compile_and_report(broken)
    inputs = qkv(B, H)
    same(compiled(*inputs), broken(*inputs), inputs)
    assert [[site.mask for site in report.sites] for report in found] == [["none"], ["causal"]]
    assert len({report.graph_id for report in found}) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_expect_sites_counts_in_each_graph(count: int) -> None:
    compiled, found = compile_and_report(broken, options=dataclasses.replace(EXACT, expect_sites=count))
    if count == 1:
        compiled(*qkv(B, H))
        assert len(found) == 2
        return
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="expect_sites=2, but this graph holds 1") as info:
        compiled(*qkv(B, H))
    assert isinstance(info.value.inner_exception, ExpectSitesError)
    assert not found


def test_fullgraph() -> None:
    compiled, found = compile_and_report(causal, fullgraph=True)
    inputs = qkv(B, H)
    same(compiled(*inputs), causal(*inputs), inputs)
    assert len(found[0].sites) == 1
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_and_report(broken, fullgraph=True)[0](*inputs)


def test_info_names_every_site_and_every_refusal(caplog: pytest.LogCaptureFixture) -> None:
    def function(q, k, v):
        return plain(q, k, v) + causal(q, k, v) + (q @ k.mT).softmax(-2) @ v

    with caplog.at_level(logging.INFO, logger="polyattn"):
        compile_and_report(function)[0](*qkv(B, H))
    lines = [record.getMessage() for record in caplog.records if record.name == "polyattn"]
    assert len(lines) == 3
    assert all(f"{MINE}:" in line for line in lines)
    assert [next(word for word in ("none mask", "causal mask,", "refused") if word in line) for line in lines] == [
        "none mask", "causal mask,", "refused",
    ]  # fmt: skip


def test_one_block_for_several_layers_has_a_state_for_each() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

    layers = [Layer() for _ in range(3)]
    compiled, found = compile_and_report(lambda layer, x: layer(x))
    x = got = want = rand(B, N, 8)
    for layer in layers:
        got, want = compiled(layer, got), layer(want)
    same(got, want, [x, *(p for layer in layers for p in layer.parameters())])
    assert sum(len(site.states) for report in found for site in report.sites) == len(layers)


# ---------------------------------------------------------------------------------------------------------------------
# caches, groups and sizes


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


# ---------------------------------------------------------------------------------------------------------------------
# values in an autocast region have its dtypes; masks are read at the offsets that they have; a bias keeps its digits


def test_a_sum_in_place_inside_autocast_keeps_its_dtype() -> None:
    def function(q, k, v, bias):
        with autocast():
            other = q @ k.mT
            other += bias
            return plain(q, k, v), other

    inputs = [*qkv(B, H, dtype=torch.float32), rand(H, N, M, dtype=torch.float32)]
    got, want = compile_and_report(function)[0](*inputs), function(*inputs)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


@pytest.mark.parametrize("attend", [plain, fused])
def test_autocast_switched_off_inside_autocast(attend: Callable[..., Any]) -> None:
    with autocast():
        function = under(lambda: autocast(False), attend)
        report = no_less_precise(function, qkv(B, H, dtype=torch.float32), function)
    assert (len(report.sites), report.refusals) == (1, ())


def test_a_narrow_mask_for_torchs_own_attention_inside_autocast() -> None:
    def attend(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    inputs = [*qkv(B, H, dtype=torch.float32), rand(H, N, M, dtype=LOW, grad=False)]
    (site,) = no_less_precise(under(autocast, attend), inputs, attend).sites
    assert site.mask == "bias"


@pytest.mark.parametrize("attend", [bottom_right, bottom_right_fused])
def test_a_mask_that_hides_nothing_from_the_last_query_is_none(attend: Callable[..., Any]) -> None:
    (site,) = check(cached(attend), cache(1), "none").sites
    assert site.exact == ""


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("place", ["under autocast", "by hand"])
def test_a_large_bias_is_not_rounded(place: str, training: bool) -> None:
    """A float32 bias on the scores of bfloat16 queries."""

    def function(q, k, v, bias):
        return ((q @ k.mT) * 0.3 + bias).softmax(-1).to(v.dtype) @ v

    dtype = torch.float32 if place == "under autocast" else LOW
    inputs = [*qkv(B, H, n=16, m=24, dtype=dtype), (100 + rand(H, 16, 24, grad=False)).float()]
    with torch.set_grad_enabled(training), autocast(place == "under autocast"):
        (site,) = no_less_precise(function, inputs, function).sites
    assert site.mask == "bias"
