"""Exact attention under the masks of a call, with the fused kernel of a device and where that takes no masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import EXACT, compile_and_report, gradients, rand

import polyattn
from polyattn.options import Options
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.runtime import masked
from polyattn.runtime.call_masks import Masks

B, H, N, D, E = 2, 2, 9, 4, 3
INF = float("inf")
KEEP = torch.arange(N) < torch.tensor([[5], [0]])
LATE = torch.arange(N) >= torch.tensor([[3], [0]])
MIN = torch.finfo(torch.float64).min


def added(fill: float) -> torch.Tensor:
    return torch.zeros(B, 1, 1, N, dtype=torch.float64).masked_fill(~KEEP[:, None, None], fill)


def scores(q: Any, k: Any) -> Any:
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * 0.5


def spread(q: Any, v: Any) -> Any:
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


CALLS: dict[str, tuple[list[torch.Tensor], str, bool, Callable[..., Any]]] = {
    # masks, changes, causal, the same in eager attention
    "bool, -inf": (
        [KEEP[:, None, None]],
        "softmax; replace -inf",
        False,
        lambda q, k, v: scores(q, k).masked_fill(~KEEP[:, None, None], -INF).softmax(-1) @ spread(q, v),
    ),
    "bool, -1e9": (
        [KEEP[:, None, None]],
        "softmax; replace -1e9",
        False,
        lambda q, k, v: scores(q, k).masked_fill(~KEEP[:, None, None], -1e9).softmax(-1) @ spread(q, v),
    ),
    "causal, left padding, -1e9": (
        [LATE[:, None, None]],
        "softmax; replace -1e9 causal",
        True,
        lambda q, k, v: (
            scores(q, k).masked_fill(~(LATE[:, None, None] & torch.ones(N, N).tril().bool()), -1e9).softmax(-1)
            @ spread(q, v)
        ),
    ),
    "causal first, then left padding": (
        [LATE[:, None, None]],
        "softmax; replace -1e30 causal alone; replace -1e9",
        True,
        lambda q, k, v: (
            scores(q, k)
            .masked_fill(torch.ones(N, N).triu(1).bool(), -1e30)
            .masked_fill(~LATE[:, None, None], -1e9)
            .softmax(-1)
            @ spread(q, v)
        ),
    ),
    "torch's own": (
        [LATE[:, None, None]],
        "zero; replace -inf causal",
        True,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, LATE[:, None, None] & torch.ones(N, N).tril().bool(), scale=0.5, enable_gqa=True
        ),
    ),
    "added": (
        [added(MIN)],
        "softmax; add -inf",
        False,
        lambda q, k, v: (scores(q, k) + added(MIN)).softmax(-1) @ spread(q, v),
    ),
    "added, -1e4": (
        [added(-1e4)],
        "softmax; add -inf",
        False,
        lambda q, k, v: (scores(q, k) + added(-1e4)).softmax(-1) @ spread(q, v),
    ),
    "a bias": (
        [rand(H, N, N, grad=False)],
        "softmax; add -inf",
        False,
        lambda q, k, v: (scores(q, k) + rand(H, N, N, grad=False)).softmax(-1) @ spread(q, v),
    ),
}


@pytest.mark.parametrize("kernel", [True, False], ids=["fused", "any"])
@pytest.mark.parametrize("kv_heads", [H, 1])
@pytest.mark.parametrize("policy", ["exact", "low_rank"])
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_eager_attentions(
    name: str, policy: str, kv_heads: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, changes, causal, eager = CALLS[name]
    if not kernel:
        monkeypatch.setattr(masked, "_kernel", lambda q: None)
        monkeypatch.setattr(masked, "kernel_takes_masks", lambda q: False)
    sizes = (B, H, N, D), (B, kv_heads, N, D), (B, kv_heads, N, E)
    q, k, v = ((rand(*s, seed=at, grad=False) * (1 if at == 2 else 0.2)).requires_grad_() for at, s in enumerate(sizes))
    options = Options(policy=policy, audit_rows=0, degree=4).key()
    from polyattn.runtime.ops import VERSION

    polyattn.reset()
    got = torch.ops.polyattn.attention(q, k, v, masks, [], 0.5, causal, changes, True, "test", options, VERSION)[0]
    want = eager(q, k, v)
    close = 1e-9 if policy == "exact" else 1e-5
    torch.testing.assert_close(got, want, rtol=0, atol=close, equal_nan=True)
    made, wanted = gradients(got, [q, k, v]), gradients(want, [q, k, v])
    torch.testing.assert_close(made, wanted, rtol=0, atol=10 * close, equal_nan=True)


def test_one_row_is_looked_at_even_where_low_rank_is_no_use() -> None:
    q = torch.zeros(B, H, N, D)
    made = Masks.of([KEEP[:, None, None]], "zero; replace -inf", NONE, q, q, useful=False)
    assert not made.other
    assert made.keep is not None
    assert torch.equal(made.keep, KEEP)
    whole = KEEP[:, None, None].expand(B, 1, N, N).clone()
    assert Masks.of([whole], "zero; replace -inf", NONE, q, q, useful=False).other
    assert not Masks.of([whole], "zero; replace -inf", NONE, q, q, useful=True).other


def test_without_masks_nothing_is_looked_at() -> None:
    q = torch.zeros(B, H, N, D)
    assert Masks.of([], "softmax", CAUSAL, q, q, useful=True) == Masks(None, CAUSAL)


def test_a_mask_that_does_not_fit_is_a_named_error() -> None:
    q, k, v = (rand(B, H, N, D) for _ in range(3))
    from polyattn.runtime.ops import VERSION

    with pytest.raises(polyattn.errors.ShapeError, match="does not broadcast"):
        torch.ops.polyattn.attention(
            *(q, k, v, [torch.ones(3, 1, 1, N).bool()], [], 1.0, False),
            *("zero; replace -inf", True, "test", EXACT.key(), VERSION),
        )


def test_through_saved_tensor_hooks_and_checkpoints() -> None:
    """Masks, and what was seen of them, are saved tensors like any other."""

    def attend(q: Any, k: Any, v: Any, m: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

    def function(q: Any, k: Any, v: Any, m: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(attend, q, k, v, m, use_reentrant=False)

    inputs = [rand(B, H, N, D, seed=at) for at in range(3)]
    inputs = [(0.2 * x.detach()).requires_grad_() for x in inputs]
    mask = (LATE[:, None, None] & torch.ones(N, N).tril().bool()).contiguous()
    low = Options(policy="low_rank", audit_rows=0, degree=4, inner="eager")
    for some in (attend, function):
        polyattn.reset()
        compiled, found = compile_and_report(some, options=low)
        packed: list[torch.Tensor] = []

        def pack(x: torch.Tensor, packed: list[torch.Tensor] = packed) -> int:
            packed.append(x.clone())
            return len(packed) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda at, packed=packed: packed[at]):
            got = compiled(*inputs, mask)
        made = gradients(got, inputs)
        want = attend(*inputs, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(made, gradients(want, inputs), rtol=0, atol=1e-4)
        assert found[0].sites[0].seen == "causal + key padding"
    assert math.isfinite(float(got.sum()))
