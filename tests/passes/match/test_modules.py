"""torch.nn's attention and transformer modules, in every mode and with every mask: found, equal value and gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import INF, compile_and_report, rand
from torch import nn

from polyattn.report.model import SiteReport

B, H, N, M, C = 2, 2, 5, 7, 8
MINE = Path(__file__).name


def made(module: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    """A module with parameters of every size, biases too, which torch starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = module(*args, **options, dtype=torch.float64)
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return result


def compare(got: Any, want: Any, needing: Iterable[torch.Tensor]) -> None:
    """Equal values, NaN where the other is NaN, and equal gradients of all that needs some."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    pairs = [(a, b) for a, b in zip(leaves(got), leaves(want), strict=True) if b.requires_grad]
    assert bool(pairs) == torch.is_grad_enabled()
    if pairs:
        weights = [rand(*b.shape, seed=1, grad=False) for _, b in pairs]
        inputs = [x for x in needing if x.requires_grad]
        a, b = (torch.autograd.grad(side, inputs, weights, allow_unused=True) for side in zip(*pairs, strict=True))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, equal_nan=True)


def leaves(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def check(
    function: Callable[..., Any],
    inputs: list[torch.Tensor],
    needing: Iterable[torch.Tensor] = (),
    dynamic: bool = False,
) -> tuple[SiteReport, ...]:
    """One graph without refusals, sites with my lines, equal values and gradients; the sites."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    compare(compiled(*inputs), function(*inputs), [*inputs, *needing])
    (report,) = found
    assert report.failure is None, str(report)
    assert not report.refusals, str(report)
    for site in report.sites:
        assert site.verdict == "exact"
        assert f"{MINE}:" in site.where
    return report.sites


# ---------------------------------------------------------------------------------------------------------------------
# nn.MultiheadAttention

PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
PADDED = torch.zeros(B, M, dtype=torch.float64).masked_fill(PADDING, -INF)
HIDDEN = torch.ones(N, M, dtype=torch.bool).triu(3)
LATER = torch.ones(N, N, dtype=torch.bool).triu(1)
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


def attention(**options: Any) -> nn.MultiheadAttention:
    module: nn.MultiheadAttention = made(nn.MultiheadAttention, C, H, **{"batch_first": True, **options})
    return module


def inputs_of(shapes: Iterable[tuple[int, ...]]) -> list[torch.Tensor]:
    return [rand(*shape, seed=place) for place, shape in enumerate(shapes)]


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
    assert f"{MINE}:" in refusal.where


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


# ---------------------------------------------------------------------------------------------------------------------
# layers and whole transformers


def layer(kind: Callable[..., nn.Module], dropout: float = 0.0, **options: Any) -> Any:
    return made(kind, C, H, 16, dropout, **{"batch_first": True, **options})


def encoder(**options: Any) -> nn.Module:
    # A nested tensor, which eager inference makes of padded input, would set the padded rows of the output to zero.
    return nn.TransformerEncoder(layer(nn.TransformerEncoderLayer, **options), 2, enable_nested_tensor=False)


def transformer() -> Any:
    return made(nn.Transformer, C, H, 1, 1, 16, 0.0, batch_first=True)


PAD = torch.tensor([[False] * 4 + [True], [False] * 5])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
CAUSAL_M = nn.Transformer.generate_square_subsequent_mask(M, dtype=torch.float64)
X, XY = ((B, N, C),), ((B, N, C), (B, M, C))
Layers = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], dict[str, Any], list[str], list[str]]

LAYERS: dict[str, Layers] = {
    # module, inputs, masks given, masks of the sites with gradients, and in inference (where torch has a fast path)
    "encoder layer": (lambda: layer(nn.TransformerEncoderLayer), X, {}, ["none"], ["none"]),
    "encoder layer, norm first": (
        lambda: layer(nn.TransformerEncoderLayer, norm_first=True, activation="gelu"), X, {}, ["none"], ["none"],
    ),
    "encoder layer, tokens first": (
        lambda: layer(nn.TransformerEncoderLayer, batch_first=False), X, {}, ["none"], ["none"],
    ),
    "encoder layer, unbatched": (lambda: layer(nn.TransformerEncoderLayer), ((N, C),), {}, ["none"], ["none"]),
    "encoder layer, padding": (
        lambda: layer(nn.TransformerEncoderLayer), X, {"src_key_padding_mask": PAD}, ["bias"], ["mask"],
    ),
    "encoder layer, mask": (lambda: layer(nn.TransformerEncoderLayer), X, {"src_mask": CAUSAL}, ["bias"], ["mask"]),
    "encoder layer, causal": (
        lambda: layer(nn.TransformerEncoderLayer), X, {"src_mask": CAUSAL, "is_causal": True}, ["causal"], ["mask"],
    ),
    "encoder layer, mask and padding": (
        lambda: layer(nn.TransformerEncoderLayer), X, {"src_mask": LATER, "src_key_padding_mask": PAD},
        ["bias"], ["mask"],
    ),
    "decoder layer": (lambda: layer(nn.TransformerDecoderLayer), XY, {}, ["none"] * 2, ["none"] * 2),
    "decoder layer, mask": (
        lambda: layer(nn.TransformerDecoderLayer), XY, {"tgt_mask": CAUSAL}, ["bias", "none"], ["bias", "none"],
    ),
    "decoder layer, causal": (
        lambda: layer(nn.TransformerDecoderLayer), XY, {"tgt_mask": CAUSAL, "tgt_is_causal": True},
        ["causal", "none"], ["causal", "none"],
    ),
    "decoder layer, paddings": (
        lambda: layer(nn.TransformerDecoderLayer), XY,
        {"tgt_mask": LATER, "tgt_key_padding_mask": PAD, "memory_key_padding_mask": PADDING},
        ["bias"] * 2, ["bias"] * 2,
    ),
    "encoder": (encoder, X, {}, ["none"] * 2, ["none"] * 2),
    "encoder, padding": (encoder, X, {"src_key_padding_mask": PAD}, ["bias"] * 2, ["mask"] * 2),
    "encoder, mask": (encoder, X, {"mask": CAUSAL, "is_causal": False}, ["bias"] * 2, ["mask"] * 2),
    "encoder, causal": (encoder, X, {"mask": CAUSAL, "is_causal": True}, ["causal"] * 2, ["mask"] * 2),
    "transformer": (transformer, XY, {}, ["none"] * 3, ["none"] * 3),
    "transformer, causal": (
        transformer, XY, {"tgt_mask": CAUSAL_M, "tgt_is_causal": True},
        ["none", "causal", "none"], ["none", "causal", "none"],
    ),
    "transformer, paddings": (
        transformer, XY, {"src_key_padding_mask": PAD, "memory_key_padding_mask": PAD, "tgt_key_padding_mask": PADDING},
        ["bias"] * 3, ["mask", "bias", "bias"],
    ),
}  # fmt: skip


IN_EVAL = ["encoder layer, causal", "decoder layer, mask", "encoder, padding", "transformer"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, mode) for name in LAYERS for mode in ("train", "inference")), *((name, "eval") for name in IN_EVAL)],
)
def test_layers(name: str, mode: str) -> None:
    make, shapes, given, trained, inferred = LAYERS[name]
    module = make().train(mode == "train")
    with torch.no_grad() if mode == "inference" else contextlib.nullcontext():
        sites = check(lambda *inputs: module(*inputs, **given), inputs_of(shapes), module.parameters())
    assert [site.mask for site in sites] == (inferred if mode == "inference" else trained)
    assert [site.exact == "" for site in sites] == [site.mask in ("none", "causal") for site in sites]


def causal(x: torch.Tensor) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)


ANY_LENGTH: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], list[str]]] = {
    "multi-head attention": (attention, lambda m, x, y: m(x, y, y)[0], ["none"]),
    "multi-head attention, no weights": (attention, lambda m, x, y: m(x, y, y, need_weights=False)[0], ["none"]),
    "encoder layer, padding": (
        lambda: layer(nn.TransformerEncoderLayer),
        lambda m, x, y: m(x, src_key_padding_mask=x[..., 0] > 1.5),
        ["bias"],
    ),
    "decoder layer, causal": (
        lambda: layer(nn.TransformerDecoderLayer),
        lambda m, x, y: m(x, y, tgt_mask=causal(x), tgt_is_causal=True),
        ["causal", "none"],
    ),
    "encoder": (encoder, lambda m, x, y: m(x), ["none"] * 2),
}


@pytest.mark.parametrize("name", ANY_LENGTH)
def test_any_length(name: str) -> None:
    make, forward, masks = ANY_LENGTH[name]
    module = make()
    compiled, found = compile_and_report(lambda x, y: forward(module, x, y), dynamic=True)
    for n in (5, 11):
        x, y = rand(B, n, C), rand(B, n + 4, C)
        compare(compiled(x, y), forward(module, x, y), [x, y, *module.parameters()])
    (report,) = found
    assert [site.mask for site in report.sites] == masks
    assert all(isinstance(site.compiled_shape["n_q"], str) for site in report.sites)


# ---------------------------------------------------------------------------------------------------------------------
# dropout and narrow dtypes

DROPOUT: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], int]] = {
    "weights thrown away": (lambda: attention(dropout=0.1), lambda m, x: m(x, x, x)[0], 1),
    "no weights": (lambda: attention(dropout=0.1), lambda m, x: m(x, x, x, need_weights=False)[0], 1),
    "encoder layer": (lambda: layer(nn.TransformerEncoderLayer, 0.1), lambda m, x: m(x), 1),
    "decoder layer": (lambda: layer(nn.TransformerDecoderLayer, 0.1), lambda m, x: m(x, x), 2),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_that_rests_is_not_there(name: str) -> None:
    make, forward, count = DROPOUT[name]
    module = make().eval()
    sites = check(lambda x: forward(module, x), [rand(B, N, C)], module.parameters())
    assert [(site.mask, site.exact) for site in sites] == [("none", "")] * count


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_in_training_is_exact_with_that_reason(name: str) -> None:
    make, forward, count = DROPOUT[name]
    module, x = make().train(), rand(B, N, C)
    compiled, found = compile_and_report(lambda x: forward(module, x))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = compiled(x)
        second = compiled(x)
    assert float((first - second).detach().abs().max()) > 1e-3, "every call draws its own"
    (report,) = found
    assert [(site.verdict, site.exact) for site in report.sites] == [
        ("exact", "dropout with p=0.1 on the weights")
    ] * count


NARROW: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "weights thrown away": (attention, lambda m, x: m(x, x, x)[0]),
    "no weights": (attention, lambda m, x: m(x, x, x, need_weights=False)[0]),
    "causal": (attention, lambda m, x: m(x, x, x, attn_mask=causal(x))[0]),
    "encoder layer": (lambda: layer(nn.TransformerEncoderLayer), lambda m, x: m(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_no_less_precise_than_eager(name: str, dtype: torch.dtype) -> None:
    """The error against float64, of the output and of the input's gradient, is at most twice that of eager."""
    make, forward = NARROW[name]
    module = make().to(dtype)
    reference = copy.deepcopy(module).double()
    x = rand(4, 24, C).detach().to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    compiled, found = compile_and_report(lambda x: forward(module, x))
    weight = rand(4, 24, C, seed=1, grad=False)
    sides = [(compiled(x), x), (forward(module, x), x), (forward(reference, wide), wide)]
    results = [(y, torch.autograd.grad(y, of, weight.to(y.dtype))[0]) for y, of in sides]
    assert len(found[0].sites) == 1
    for got, eager, exact in zip(*results, strict=True):
        assert got.dtype == dtype
        error, allowed = (got - exact).norm(), 2 * (eager - exact).norm()
        assert error.item() <= allowed.item()


# ---------------------------------------------------------------------------------------------------------------------
# a mask and dropout at once: both are reasons


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights thrown away", "no weights"])
def test_a_mask_does_not_hide_that_there_is_dropout(need_weights: bool) -> None:
    module = attention(dropout=0.1).train()
    x = rand(B, N, C, grad=False)
    compiled, found = compile_and_report(lambda x: module(x, x, x, need_weights=need_weights, key_padding_mask=PAD)[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        compiled(x)
    (site,) = found[0].sites
    assert "dropout with p=0.1 on the weights" in site.exact
    assert "mask" in site.exact or "bias" in site.exact
