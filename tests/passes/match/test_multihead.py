"""torch.nn.MultiheadAttention and the function behind it, with every mask: found, equal value and gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import INF, compile_and_report, rand
from modules import LATER, MINE, PADDING, B, C, H, M, N, attention, check, compare, inputs_of
from torch import nn

PADDED = torch.zeros(B, M, dtype=torch.float64).masked_fill(PADDING, -INF)
HIDDEN = torch.ones(N, M, dtype=torch.bool).triu(3)
SELF, CROSS = ((B, N, C),), ((B, N, C), (B, M, C))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of q, of keys and values where they differ, and of values where those differ from the keys."""

    shapes: tuple[tuple[int, ...], ...] = CROSS
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    masks: tuple[str, str] = ("none", "none")
    """The mask of the site with the weights asked for (softmax by hand), and without (torch's fused attention)."""
    sizes: tuple[int, int, int] = (B * H, N, M)
    """Heads of the whole batch, queries, keys."""


BIAS = ("bias", "bias")
CASES = {
    "self": Case(SELF, sizes=(B * H, N, N)),
    "cross": Case(),
    "three inputs": Case(((B, N, C), (B, M, C), (B, M, C))),
    "other widths": Case(((B, N, C), (B, M, 6), (B, M, 4)), {"kdim": 6, "vdim": 4}),
    "tokens first": Case(((N, B, C), (M, B, C)), {"batch_first": False}),
    "unbatched": Case(((N, C), (M, C)), sizes=(H, N, M)),
    "without biases": Case(options={"bias": False}),
    "learned key": Case(options={"add_bias_kv": True}, sizes=(B * H, N, M + 1)),
    "key of zeros": Case(options={"add_zero_attn": True}, sizes=(B * H, N, M + 1)),
    "key of zeros and padding": Case(
        CROSS, {"add_zero_attn": True}, {"key_padding_mask": PADDING}, BIAS, (B * H, N, M + 1)
    ),
    "padding, bool": Case(given={"key_padding_mask": PADDING}, masks=BIAS),
    "padding, float": Case(given={"key_padding_mask": PADDED}, masks=BIAS),
    "all padding": Case(given={"key_padding_mask": PADDING | torch.tensor([[True], [False]])}, masks=BIAS),
    "mask, bool": Case(given={"attn_mask": HIDDEN}, masks=BIAS),
    "mask, float and learned": Case(given={"attn_mask": rand(N, M)}, masks=BIAS),
    "mask of every head, bool": Case(given={"attn_mask": rand(B * H, N, M, grad=False) > 1.5}, masks=BIAS),
    "mask of every head, float and learned": Case(given={"attn_mask": rand(B * H, N, M)}, masks=BIAS),
    "mask and padding": Case(given={"attn_mask": HIDDEN, "key_padding_mask": PADDING}, masks=BIAS),
    "causal mask, which torch looks at": Case(
        SELF, {}, {"attn_mask": LATER, "is_causal": True}, ("bias", "causal"), (B * H, N, N)
    ),
}  # fmt: skip


def three(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (*inputs, *[inputs[-1]] * (3 - len(inputs)))


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights thrown away", "no weights"])
@pytest.mark.parametrize("name", CASES)
def test_multihead_attention(name: str, need_weights: bool, grad: bool) -> None:
    case = CASES[name]
    module = attention(**case.options).train(grad)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        out, _ = module(*three(inputs), need_weights=need_weights, **case.given)
        return out

    masks = [value for value in case.given.values() if isinstance(value, torch.Tensor)]
    with contextlib.nullcontext() if grad else torch.no_grad():
        (site,) = check(function, inputs_of(case.shapes), [*module.parameters(), *masks])
    mask = case.masks[0 if need_weights else 1]
    assert site.mask == mask
    assert (site.exact == "") is (mask in ("none", "causal")), "low rank is allowed where no mask stands in its way"
    by_hand = f"softmax(q @ kᵀ{' + bias' if mask == 'bias' else ''}) @ v"
    assert site.spelling == (by_hand if need_weights else "scaled_dot_product_attention")
    shape = site.compiled_shape
    assert (int(shape["batch"]) * int(shape["heads"]), shape["n_q"], shape["n_k"]) == case.sizes
    assert (shape["d"], shape["e"]) == (C // H, C // H)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights thrown away", "no weights"])
@pytest.mark.parametrize("built", ["bool", "float"])
def test_a_causal_mask_that_the_model_builds_is_causal(built: str, need_weights: bool, dynamic: bool) -> None:
    module = attention()

    def function(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        if built == "float":
            mask = nn.Transformer.generate_square_subsequent_mask(n, dtype=x.dtype)
        out: torch.Tensor = module(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        return out

    (site,) = check(function, [rand(B, N, C)], module.parameters(), dynamic)
    assert (site.mask, site.causal, site.exact) == ("causal", True, "")


def test_weights_that_are_looked_at_and_thrown_away() -> None:
    module = attention()

    def function(x: torch.Tensor) -> torch.Tensor:
        out, weights = module(x, x, x, average_attn_weights=False)
        weights.amax(-1).mean(1)
        return out

    (site,) = check(function, [rand(B, N, C)], module.parameters())
    assert site.mask == "none"


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "of every head"])
def test_weights_that_are_used_leave_attention_as_it_is(average: bool, masked: bool) -> None:
    module = attention()
    given = {"key_padding_mask": PADDING} if masked else {}

    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        return module(x, y, y, average_attn_weights=average, **given)

    inputs = [rand(B, N, C), rand(B, M, C)]
    compiled, found = compile_and_report(function)
    got, want = compiled(*inputs), function(*inputs)
    compare(got, want, [*inputs, *module.parameters()])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got[1].shape == ((B, N, M) if average else (B, H, N, M))
    (report,) = found
    assert not report.sites
    (refusal,) = report.refusals
    assert refusal.reason == "the attention weights are used elsewhere"
    assert MINE.search(refusal.where)


def test_weights_without_the_attention_are_no_attention() -> None:
    module = attention()
    assert check(lambda x: module(x, x, x)[1], [rand(B, N, C)], module.parameters()) == ()


def _packed(need_weights: bool, q, k, w, b, out, out_bias):
    return F.multi_head_attention_forward(
        q, k, k, C, H, w, b, None, None, False, 0.0, out, out_bias, need_weights=need_weights
    )[0]


def _separate(need_weights: bool, q, k, v, wq, wk, wv, out):
    return F.multi_head_attention_forward(
        q, k, v, C, H, None, None, None, None, False, 0.0, out, None, need_weights=need_weights,
        use_separate_proj_weight=True, q_proj_weight=wq, k_proj_weight=wk, v_proj_weight=wv,
    )[0]  # fmt: skip


def _static(need_weights: bool, q, w, b, out, out_bias, k, v):
    return F.multi_head_attention_forward(
        q, q, q, C, H, w, b, None, None, False, 0.0, out, out_bias, need_weights=need_weights, static_k=k, static_v=v
    )[0]


FUNCTIONAL: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "packed weights": (_packed, ((N, B, C), (M, B, C), (3 * C, C), (3 * C,), (C, C), (C,))),
    "separate weights": (_separate, ((N, B, C), (M, B, 6), (M, B, 4), (C, C), (C, 6), (C, 4), (C, C))),
    "keys and values given": (
        _static,
        ((N, B, C), (3 * C, C), (3 * C,), (C, C), (C,), (B * H, M, C // H), (B * H, M, C // H)),
    ),
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights thrown away", "no weights"])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_the_function_behind_the_module(name: str, need_weights: bool) -> None:
    function, shapes = FUNCTIONAL[name]
    (site,) = check(lambda *inputs: function(need_weights, *inputs), inputs_of(shapes))
    assert (site.mask, site.compiled_shape["n_k"], site.exact) == ("none", M, "")
