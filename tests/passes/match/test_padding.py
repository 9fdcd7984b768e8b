"""Key padding in compiled models, as they build it: low rank, forward and gradients, and rows that see no key as eager
has them. Logits are small and the degree is high, so that low rank is eager attention to 1e-6."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import INF, compile_and_report, gradients, rand
from torch import nn

import polyattn
from polyattn.options import Options
from polyattn.runtime.policy import OTHER

B, H, N, D, E = 3, 2, 12, 4, 3
LOW = Options(policy="low_rank", audit_rows=0, degree=4, inner="eager")
RIGHT = torch.arange(N) < torch.tensor([[7], [12], [10]])
LEFT = torch.arange(N) >= torch.tensor([[5], [0], [2]])
EMPTY = torch.arange(N) < torch.tensor([[7], [0], [10]])
MIN = torch.finfo(torch.float64).min
TRIL = torch.ones(N, N, dtype=torch.bool).tril()


def qkv(n: int = N, heads: int = H) -> list[torch.Tensor]:
    scales = (0.2, 0.2, 1.0)
    sizes = (B, H, n, D), (B, heads, N, D), (B, heads, N, E)
    return [
        (rand(*size, seed=at, grad=False) * s).requires_grad_()
        for at, (size, s) in enumerate(zip(sizes, scales, strict=True))
    ]


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT * 0.5


def filled(q: Any, k: Any, v: Any, m: Any) -> Any:
    return scores(q, k).masked_fill(~m[:, None, None, :], -INF).softmax(-1) @ v


def added(q: Any, k: Any, v: Any, m: Any) -> Any:
    return (scores(q, k) + m).softmax(-1) @ v


def sdpa(q: Any, k: Any, v: Any, m: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m)


def float_mask(keep: torch.Tensor, fill: float = MIN) -> torch.Tensor:
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, fill)


def transformers_5(q: Any, k: Any, v: Any, m: Any, causal: bool, eager: bool) -> Any:
    """The expanded mask [B, 1, n, n] of its ``create_bidirectional_mask`` and ``create_causal_mask``."""
    batch, i, j = (torch.arange(x) for x in (m.shape[0], q.shape[2], k.shape[2]))
    batch, i, j = batch[:, None, None, None], i[None, None, :, None], j[None, None, None, :]
    pairs = (j <= i) if causal else i >= 0
    kept = (i.new_ones((), dtype=torch.bool) & pairs & m.to(torch.bool)[batch, j]).expand(m.shape[0], -1, -1, -1)
    if not eager:
        return sdpa(q, k, v, kept)
    return added(q, k, v, torch.where(kept, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min))


def one_after_the_other(q: Any, k: Any, v: Any, m: Any) -> Any:
    causal = torch.ones(q.shape[2], k.shape[2]).tril() == 0
    return scores(q, k).masked_fill(causal, -INF).masked_fill(~m[:, None, None], -INF).softmax(-1) @ v


def replaced_then_added(q: Any, k: Any, v: Any, m: Any) -> Any:
    """As decoders with a buffer of ones did."""
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    masked = torch.where(causal, scores(q, k), torch.finfo(q.dtype).min)
    pad = torch.where(m, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    return (masked + pad[:, None, None]).softmax(-1) @ v


KNOWN: dict[str, tuple[Callable[..., Any], list[torch.Tensor], str]] = {
    "bool, -inf": (filled, [RIGHT], "key padding"),
    "bool, smallest number": (
        lambda q, k, v, m: scores(q, k).masked_fill(~m[:, None, None], torch.finfo(q.dtype).min).softmax(-1) @ v,
        [LEFT],
        "key padding",
    ),
    "bool, -1e9, an element without keys": (
        lambda q, k, v, m: scores(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1) @ v,
        [EMPTY],
        "key padding",
    ),
    "int": (
        lambda q, k, v, m: scores(q, k).masked_fill(m[:, None, None] == 0, -1e9).softmax(-1) @ v,
        [EMPTY.long()],
        "key padding",
    ),
    "dropped": (lambda q, k, v, m: filled(q, k, v, ~m), [~RIGHT], "key padding"),
    "where": (
        lambda q, k, v, m: torch.where(m[:, None, None], scores(q, k), -INF).softmax(-1) @ v,
        [LEFT],
        "key padding",
    ),
    "lengths": (
        lambda q, k, v, m: filled(q, k, v, torch.arange(k.shape[2])[None] < m[:, None]),
        [RIGHT.sum(1)],
        "key padding",
    ),
    "additive, of bools": (
        lambda q, k, v, m: added(q, k, v, (1.0 - m[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min),
        [EMPTY],
        "key padding",
    ),
    "transposed scores": (
        lambda q, k, v, m: (k @ q.mT * 0.5).masked_fill(~m[:, None, :, None], -INF).softmax(-2).mT @ v,
        [RIGHT],
        "key padding",
    ),
    "torch's own": (lambda q, k, v, m: sdpa(q, k, v, m[:, None, None]), [EMPTY], "key padding"),
    "torch's own, expanded": (
        lambda q, k, v, m: sdpa(q, k, v, m[:, None, None].expand(-1, -1, N, -1)),
        [RIGHT],
        "key padding",
    ),
    "transformers 5": (lambda *x: transformers_5(*x, False, False), [RIGHT.long()], "key padding"),
    "transformers 5, eager": (lambda *x: transformers_5(*x, False, True), [EMPTY.long()], "key padding"),
    "transformers 5, causal": (lambda *x: transformers_5(*x, True, False), [LEFT.long()], "causal + key padding"),
    "transformers 5, causal, eager": (lambda *x: transformers_5(*x, True, True), [LEFT.long()], "causal + key padding"),
    "causal and padding, one after the other": (one_after_the_other, [RIGHT], "causal + key padding"),
    "causal replaced, padding added": (replaced_then_added, [RIGHT], "causal + key padding"),
    "causal replaced, left padding added": (replaced_then_added, [LEFT], "causal + key padding"),
}  # fmt: skip
"""What structure tells: the words of the report."""

UNKNOWN: dict[str, tuple[Callable[..., Any], list[torch.Tensor], str, str]] = {
    "additive [B, 1, 1, n]": (added, [float_mask(EMPTY)[:, None, None]], "bias", "key padding"),
    "additive [B, 1, 1, n], -1e4": (added, [float_mask(EMPTY, -1e4)[:, None, None]], "bias", "key padding"),
    "additive, of ints": (
        lambda q, k, v, m: added(q, k, v, (1.0 - m[:, None, None]) * torch.finfo(q.dtype).min),
        [LEFT.double()],
        "bias",
        "key padding",
    ),
    "additive [B, 1, n, n]": (added, [float_mask(RIGHT)[:, None, None].expand(-1, -1, N, -1)], "bias", "key padding"),
    "additive, causal [n, n]": (added, [float_mask(TRIL, -INF)], "bias", "causal"),
    "additive, causal and padding": (
        added,
        [float_mask(TRIL & LEFT[:, None, None])],
        "bias",
        "causal + key padding",
    ),
    "bool, causal and padding": (sdpa, [TRIL & RIGHT[:, None, None]], "mask", "causal + key padding"),
    "bool, queries and keys": (sdpa, [RIGHT[:, None, :, None] & RIGHT[:, None, None]], "mask", "key padding"),
    "bool, queries and keys, causal": (
        lambda q, k, v, m: (
            scores(q, k).masked_fill(~(m[:, None, :, None] & m[:, None, None] & TRIL), -1e9).softmax(-1) @ v
        ),
        [LEFT],
        "mask",
        "causal + key padding",
    ),
    "hides nothing": (sdpa, [torch.ones(B, 1, N, N, dtype=torch.bool)], "mask", "none"),
    "padding, of no key": (sdpa, [torch.ones(B, 1, 1, N, dtype=torch.bool)], "key padding", "none"),
    "the same for all heads": (
        lambda q, k, v, m: (
            torch.baddbmm(m, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5).softmax(-1) @ v.flatten(0, 1)
        ).unflatten(0, (B, H)),
        [float_mask(RIGHT, -INF).repeat_interleave(H, 0)[:, None]],
        "bias",
        "key padding",
    ),
}
"""What each call looks at: the words of the report, and what was seen."""


def compare(function: Callable[..., Any], inputs: list[torch.Tensor], options: Options, dynamic: bool) -> Any:
    """The site of training; values and gradients are eager's, NaN included, and values in inference too."""
    polyattn.reset()
    compiled, found = compile_and_report(function, dynamic=dynamic, options=options)
    got, want = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5, equal_nan=True)
    assert not want.isnan().any()
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=0, atol=5e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), want, rtol=0, atol=1e-5)
    for report in found:
        assert report.failure is None, str(report)
        assert not report.refusals, str(report)
    return found[0].sites[0]


SYMBOLIC = {
    "bool, -inf",
    "torch's own",
    "transformers 5, causal, eager",
    "additive [B, 1, 1, n]",
    "bool, queries and keys",
}
"""What is run with symbolic sizes each time; the others are long."""


def static_and_dynamic(cases: dict[str, Any]) -> Any:
    """Parametrises a test with the names of cases, and with static and symbolic sizes."""
    both = [(name, dynamic) for name in cases for dynamic in (False, True)]
    return pytest.mark.parametrize(
        ("name", "dynamic"),
        [
            pytest.param(
                *case,
                id=f"{case[0]}-{'dynamic' if case[1] else 'static'}",
                marks=[pytest.mark.long] * (case[1] and case[0] not in SYMBOLIC),
            )
            for case in both
        ],
    )


@static_and_dynamic(KNOWN)
def test_padding_that_structure_tells(name: str, dynamic: bool) -> None:
    function, more, words = KNOWN[name]
    site = compare(function, [*qkv(), *more], LOW, dynamic)
    assert (site.verdict, site.mask, site.seen) == ("low_rank", words, words), str(site)


@static_and_dynamic(UNKNOWN)
def test_masks_that_each_call_looks_at(name: str, dynamic: bool) -> None:
    function, more, words, seen = UNKNOWN[name]
    site = compare(function, [*qkv(), *more], LOW, dynamic)
    assert (site.verdict, site.mask, site.seen) == ("low_rank", words, seen), str(site)
    assert seen == words or f"mask={words}, seen: {seen}" in str(site)


OTHERS: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "sliding window": (sdpa, TRIL & ~TRIL.tril(-4)),
    "blocks": (sdpa, torch.block_diag(*[torch.ones(4, 4)] * 3).bool()),
    "heads differ": (sdpa, torch.stack([TRIL, TRIL.mT])),
    "keys of heads differ": (sdpa, torch.stack([RIGHT[:, None], LEFT[:, None]], 1)),
    "a bias of the keys": (added, rand(N, grad=False)),
    "a bias": (added, rand(H, N, N, grad=False)),
    "a small fill": (added, float_mask(RIGHT, -50.0)[:, None, None]),
    "NaN": (added, float_mask(RIGHT, math.nan)[:, None, None]),
    "one visible pair too many": (sdpa, TRIL | (torch.arange(N * N).view(N, N) == 5)),
    "one hidden pair": (sdpa, torch.arange(N * N).view(N, N) != 5),
    "holes under the diagonal": (sdpa, TRIL & (torch.arange(N * N).view(N, N) % 5 != 1)),
    "bottom right": (sdpa, TRIL.roll(3, 1) | (torch.arange(N) < 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_exact(name: str) -> None:
    function, mask = OTHERS[name]
    inputs = [*qkv(), mask]
    compiled, found = compile_and_report(function, options=LOW)
    got, want = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=1e-8, atol=1e-9, equal_nan=True)
    (site,) = found[0].sites
    assert (site.verdict, site.seen) == ("exact", OTHER)
    assert OTHER in site.reason


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_layers_of_torch(inner: str, training: bool) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64).train(training)
    with torch.no_grad():
        for x in layer.self_attn.parameters():
            x *= 0.3
    x, options = rand(B, N, 8, grad=training), {**LOW_MAPPING, "inner": inner}
    for keep in (RIGHT, LEFT):
        polyattn.reset()
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="polyattn", options=options)
        with torch.set_grad_enabled(training):
            got, want = compiled(x, src_key_padding_mask=~keep), layer(x, src_key_padding_mask=~keep)
        # torch's own fast path leaves padded positions at 0
        shown = keep[..., None] if not training else torch.tensor(True)
        torch.testing.assert_close(got * shown, want * shown, rtol=0, atol=1e-5)
        (site,) = polyattn.reports()[-1].sites
        assert (site.verdict, site.seen) == ("low_rank", "key padding"), str(site)


LOW_MAPPING = {"policy": "low_rank", "audit_rows": 0, "degree": 4}


def test_one_site_sees_what_each_call_brings() -> None:
    """Batches with and without padding, and under other masks, are states of their own."""
    inputs, seen = qkv(), []
    polyattn.reset()
    compiled, found = compile_and_report(sdpa, options=LOW)
    for mask in (
        torch.ones(B, 1, N, N).bool(),
        TRIL.expand(B, 1, N, N),
        (RIGHT[:, None, None] & TRIL),
        TRIL.tril(2).mT,
    ):
        mask = mask.expand(B, 1, N, N).contiguous()
        torch.testing.assert_close(compiled(*inputs, mask), sdpa(*inputs, mask), rtol=0, atol=1e-5)
        seen = [state.decision.seen for state in found[0].sites[0].states]
    assert len(found) == 1
    assert seen == ["none", "causal", "causal + key padding", OTHER]


def test_grouped_queries_and_more_keys_than_queries() -> None:
    inputs = [*qkv(n=9, heads=1), RIGHT]

    def function(q: Any, k: Any, v: Any, m: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, None], enable_gqa=True)

    site = compare(function, inputs, LOW, False)
    assert (site.verdict, site.seen) == ("low_rank", "key padding")


def test_a_mask_that_needs_a_gradient_makes_the_site_exact() -> None:
    inputs = [*qkv(), rand(H, N, N)]
    compiled, found = compile_and_report(added, options=LOW)
    got, want = compiled(*inputs), added(*inputs)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=1e-8, atol=1e-9)
    (site,) = found[0].sites
    assert site.verdict == "exact"
    assert "needs a gradient" in site.reason
