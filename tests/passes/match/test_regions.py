"""Attention inside regions of autocast and of grad modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import INF, compile_and_report, rand, refused
from regions import (
    KEEP,
    LOW,
    B,
    H,
    M,
    N,
    after,
    autocast,
    biased,
    causal,
    check,
    fill,
    fused,
    masked,
    no_less_precise,
    plain,
    qkv,
    under,
)

# ---------------------------------------------------------------------------------------------------------------------
# autocast, and the same by hand


def baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0.0, alpha=0.5).softmax(-1), v)


SPELLINGS: dict[str, tuple[Callable[..., Any], str]] = {
    "by hand": (plain, "none"),
    "causal": (causal, "causal"),
    "masked": (lambda q, k, v: masked(q, k, v, torch.arange(k.shape[-2]) < 5), "key padding"),
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
              [x.clone() for x in (*qkv(B, H), KEEP, rand(H, N, M))], "key padding", "bias")  # fmt: skip


@pytest.mark.parametrize("part", ["weights", "product"])
def test_a_part_without_gradients_is_a_border(part: str) -> None:
    def function(q, k, v):
        with torch.no_grad() if part == "weights" else contextlib.nullcontext():
            weights = (q @ k.mT).softmax(-1)
        with torch.no_grad() if part == "product" else contextlib.nullcontext():
            return weights @ v

    assert "border of a no_grad or autocast region" in refused(function, qkv(B, H), inference=False)
