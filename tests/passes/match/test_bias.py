"""Masks and biases that no low-rank form has: exact sites with equal values, gradients and fully masked rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import IN_EVERY_DTYPE, INF, STATIC, check_precision, compile_and_report, gradients, rand, run

from polyattn.report.model import Report

B, H, N, M, D, E = 2, 3, 10, 7, 8, 6
MIN = torch.finfo(torch.float64).min


def qkv() -> list[torch.Tensor]:
    return [rand(B, H, N, D), rand(B, H, M, D), rand(B, H, M, E)]


def check(function: Callable[..., Any], inputs: list[torch.Tensor], mask: str, dynamic: bool = False) -> Report:
    """An exact site with this mask in training and inference, equal values and gradients (NaN rows included)."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    got, want = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    made = gradients(got, inputs)
    if not want.isnan().any():
        torch.testing.assert_close(made, gradients(want, inputs), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), want, rtol=1e-9, atol=1e-9, equal_nan=True)
    for report in found:
        assert report.failure is None, str(report)
        assert not report.refusals, str(report)
        (site,) = report.sites
        assert (site.verdict, site.guarantee, site.mask) == ("exact", "exact", mask)
    return found[0]


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(D)


KEEP = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
"""Keys that are no padding, [B, M]."""

MASKS: dict[str, tuple[Callable[..., Any], Callable[[], list[torch.Tensor]], str]] = {
    "key padding, bool": (
        lambda q, k, v, keep: scores(q, k).masked_fill(~keep[:, None, None, :], -INF).softmax(-1) @ v,
        lambda: [*qkv(), KEEP],
        "key padding",
    ),
    "key padding, bool, smallest number": (
        lambda q, k, v, keep: (
            scores(q, k).masked_fill(~keep[:, None, None, :], torch.finfo(q.dtype).min).softmax(-1) @ v
        ),
        lambda: [*qkv(), KEEP],
        "key padding",
    ),
    "key padding, int": (
        lambda q, k, v, keep: scores(q, k).masked_fill(keep[:, None, None, :] == 0, -1e9).softmax(-1) @ v,
        lambda: [*qkv(), KEEP.long()],
        "key padding",
    ),
    "key padding, where": (
        lambda q, k, v, keep: torch.where(keep[:, None, None, :], scores(q, k), -INF).softmax(-1) @ v,
        lambda: [*qkv(), KEEP],
        "key padding",
    ),
    "key padding, additive": (
        lambda q, k, v, keep: (
            (scores(q, k) + (1.0 - keep[:, None, None, :]) * torch.finfo(keep.dtype).min).softmax(-1) @ v
        ),
        lambda: [*qkv(), KEEP.double()],
        "bias",
    ),
    "full mask": (
        lambda q, k, v, keep: scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v,
        lambda: [*qkv(), torch.ones(N, M, dtype=torch.bool).tril(2)],
        "mask",
    ),
    "window": (
        lambda q, k, v: scores(q, k).masked_fill(torch.ones(N, M).tril(2).triu(-4) == 0, -INF).softmax(-1) @ v,
        qkv,
        "mask",
    ),
    "one off the diagonal": (
        lambda q, k, v: scores(q, k).masked_fill(torch.ones(N, M).tril(1) == 0, -INF).softmax(-1) @ v,
        qkv,
        "mask",
    ),
    "one row for all": (
        lambda q, k, v: scores(q, k).masked_fill(torch.ones(1, M).tril(3) == 0, -INF).softmax(-1) @ v,
        qkv,
        "key padding",
    ),
    "causal and padding": (
        lambda q, k, v, keep: (
            scores(q, k)
            .masked_fill(torch.ones(N, M).tril() == 0, -INF)
            .masked_fill(~keep[:, None, None, :], -INF)
            .softmax(-1)
            @ v
        ),
        lambda: [*qkv(), KEEP],
        "causal + key padding",
    ),
    "bias per head, with gradient": (
        lambda q, k, v, bias: (scores(q, k) + bias).softmax(-1) @ v,
        lambda: [*qkv(), rand(1, H, N, M)],
        "bias",
    ),
    "bias subtracted": (
        lambda q, k, v, bias: (scores(q, k) - bias).softmax(-1) @ v,
        lambda: [*qkv(), rand(H, N, M)],
        "bias",
    ),
    "bias before the scale": (
        lambda q, k, v, bias: ((q @ k.transpose(-2, -1) + bias) * 0.3).softmax(-1) @ v,
        lambda: [*qkv(), rand(H, N, M)],
        "bias",
    ),
    "causal and finite, made small by a scale": (
        lambda q, k, v: ((q @ k.mT + torch.full((N, M), -1e4, dtype=q.dtype).triu(1)) * 1e-3).softmax(-1) @ v,
        qkv,
        "bias",
    ),
    "bias of the keys only": (
        lambda q, k, v, bias: (bias + scores(q, k)).softmax(-1) @ v,
        lambda: [*qkv(), rand(M)],
        "bias",
    ),
    "two biases and a mask": (
        lambda q, k, v, bias, keep: (
            (scores(q, k) + bias + bias.flip(0)).masked_fill(~keep[:, None, None, :], -INF).softmax(-1) @ v
        ),
        lambda: [*qkv(), rand(H, N, M), KEEP],
        "key padding + bias",
    ),
    "bias of transposed scores": (
        lambda q, k, v, bias: (k @ q.transpose(-2, -1) + bias).softmax(-2).transpose(-2, -1) @ v,
        lambda: [*qkv(), rand(H, M, N)],
        "bias",
    ),
    "alibi through baddbmm": (
        lambda q, k, v, bias: torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.3).softmax(-1), v),
        lambda: [rand(B * H, N, D), rand(B * H, M, D), rand(B * H, M, E), rand(B * H, 1, M)],
        "bias",
    ),
    "bias on a view of the scores": (
        lambda q, k, v, bias: (
            ((q @ k.transpose(-2, -1)).view(B, 2, H, N, M) + bias[None, :, None]).view(B * 2, H, N, M).softmax(-1) @ v
        ),
        lambda: [rand(B * 2, H, N, D), rand(B * 2, H, M, D), rand(B * 2, H, M, E), rand(2, N, M)],
        "bias",
    ),
    "five axes": (
        lambda q, k, v, bias: (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v,
        lambda: [rand(2, B, H, N, D), rand(2, B, H, M, D), rand(2, B, H, M, E), rand(B, 1, N, M)],
        "bias",
    ),
    "one head": (
        lambda q, k, v, bias: (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v,
        lambda: [rand(N, D), rand(M, D), rand(M, E), rand(N, M)],
        "bias",
    ),
    "written after it was made": (
        lambda q, k, v, bias: _written(q, k, v, bias),
        lambda: [*qkv(), rand(N, M, grad=False)],
        "bias",
    ),
    "torch's own attention with a mask": (
        lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :]),
        lambda: [*qkv(), KEEP],
        "key padding",
    ),
    "torch's own attention with a bias": (
        lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        lambda: [*qkv(), rand(H, N, M)],
        "bias",
    ),
}


def _written(q: Any, k: Any, v: Any, bias: Any) -> Any:
    bias = bias.clone()
    bias[:, 0] = 2.0
    return (scores(q, k) + bias).softmax(-1) @ v


@STATIC
@pytest.mark.parametrize("name", MASKS)
def test_mask_or_bias(name: str, dynamic: bool) -> None:
    function, inputs, mask = MASKS[name]
    check(function, inputs(), mask, dynamic)


@IN_EVERY_DTYPE
@pytest.mark.parametrize("name", MASKS)
def test_mask_or_bias_in_every_dtype(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    function, inputs, mask = MASKS[name]
    assert check_precision(function, inputs(), dtype, dynamic).mask == mask


@pytest.mark.parametrize("fill", [-INF, MIN, -1e9, -1e4])
def test_rows_in_which_nothing_is_kept(fill: float) -> None:
    keep = torch.ones(B, 1, N, M, dtype=torch.bool)
    keep[0, 0, 3] = False
    keep[1] = False

    def function(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return scores(q, k).masked_fill(~keep, fill).softmax(-1) @ v

    check(function, [*qkv(), keep], "mask")


def test_rows_that_an_added_mask_hides() -> None:
    mask = torch.zeros(N, M, dtype=torch.float64)
    mask[2] = -INF
    check(lambda q, k, v, mask: (scores(q, k) + mask).softmax(-1) @ v, [*qkv(), mask], "bias")


def test_a_buffer_may_change_after_compilation() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keep", torch.ones(N, M).tril())

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return scores(q, k).masked_fill(self.keep == 0, -INF).softmax(-1) @ v

    model, inputs = Model(), qkv()
    compiled = torch.compile(model, backend="polyattn", options={"inner": "eager"})
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    model.keep.fill_(1.0)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_added_masks_that_hide_whole_rows_keep_their_gradients(grad: bool) -> None:
    """Torch's fused backward would take the weights of a hidden row for 1."""
    mask = torch.zeros(B, 1, N, M)
    mask[0, 0, 3] = torch.finfo(torch.float32).min
    inputs = [x.detach().float().requires_grad_(grad) for x in qkv()]

    def function(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return (scores(q, k) + mask).softmax(-1) @ v

    got, report = run(function, [*inputs, mask])
    want = function(*inputs, mask)
    (site,) = report.sites
    assert "stays as it was" not in site.reason
    torch.testing.assert_close(got, want)
    if grad:
        made, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (got, want))
        torch.testing.assert_close(made, wanted)


def _moments(function: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.stack([function(*inputs).detach() for _ in range(400)])
    return drawn.mean(0), drawn.var(0)


def test_dropout_of_the_weights_has_torchs_distribution() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        return F.dropout(scores(q, k).softmax(-1), 0.4, training=True) @ v

    inputs = [rand(1, 1, 3, D), rand(1, 1, M, D), rand(1, 1, M, 2)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, report = run(function, inputs)
        (site,) = report.sites
        assert (site.verdict, site.mask) == ("exact", "none")
        assert "dropout with p=0.4" in site.reason
        compiled = torch.compile(function, backend="polyattn", options={"inner": "eager"})
        (mean, var), (wanted_mean, wanted_var) = _moments(compiled, inputs), _moments(function, inputs)
    error = (wanted_var / 400).sqrt()
    assert float(((mean - wanted_mean) / error).abs().max()) < 6
    assert float((var / wanted_var).log().abs().max()) < 0.5


def test_torchs_own_dropout_stays_as_it_is() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)

    inputs = qkv()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got, report = run(function, inputs)
        torch.manual_seed(0)
        torch.testing.assert_close(got, function(*inputs))
    assert report.sites[0].verdict == "exact"


KEPT: dict[str, tuple[Callable[..., Any], str]] = {
    "different fills": (
        lambda q, k, v, x: scores(q, k).masked_fill(x, -1e9).masked_fill(x.flip(0), -INF).softmax(-1) @ v,
        "different values",
    ),
    "bias after the mask": (
        lambda q, k, v, x: (scores(q, k).masked_fill(x, -1e9) + x.double()).softmax(-1) @ v,
        "already replaced",
    ),
    "capped logits": (lambda q, k, v, x: (torch.tanh(scores(q, k) / 5) * 5).softmax(-1) @ v, "capped by tanh"),
    "capped logits and a mask": (
        lambda q, k, v, x: (torch.tanh(scores(q, k) / 5) * 5).masked_fill(x, -INF).softmax(-1) @ v,
        "capped by tanh",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_attention_that_stays_as_it_is_written(name: str) -> None:
    function, words = KEPT[name]
    inputs = [*qkv(), torch.ones(N, M, dtype=torch.bool).triu(1)]
    got, report = run(function, inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=0, atol=0)
    (site,) = report.sites
    assert site.verdict == "exact"
    assert words in site.reason
    assert "stays as it was" in site.reason
    assert not report.refusals
    str(report)


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "finite fill": (lambda q, k, v, x: scores(q, k).masked_fill(x, -100.0).softmax(-1) @ v, "set to -100.0"),
    "scores of another product": (
        lambda q, k, v, x: ((q @ k.transpose(-2, -1)) * (q @ k.transpose(-2, -1))).softmax(-1) @ v,
        "scaled by a tensor",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    function, words = MISSES[name]
    inputs = [*qkv(), torch.ones(N, M, dtype=torch.bool).triu(1)]
    got, report = run(function, inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=0, atol=0)
    assert not report.sites
    (refusal,) = report.refusals
    assert words in refusal.reason
    assert Path(__file__).name in refusal.where
