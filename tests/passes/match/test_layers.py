"""torch.nn's layers and whole transformers: found, equal value and gradients; any length, dropout, narrow dtypes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import compile_and_report, rand
from modules import LATER, PADDING, B, C, H, M, N, attention, check, compare, inputs_of, layer, made
from torch import nn


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
        lambda: layer(nn.TransformerEncoderLayer), X, {"src_key_padding_mask": PAD}, ["bias"], ["key padding"],
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
    "encoder, padding": (encoder, X, {"src_key_padding_mask": PAD}, ["bias"] * 2, ["key padding"] * 2),
    "encoder, mask": (encoder, X, {"mask": CAUSAL, "is_causal": False}, ["bias"] * 2, ["mask"] * 2),
    "encoder, causal": (encoder, X, {"mask": CAUSAL, "is_causal": True}, ["causal"] * 2, ["mask"] * 2),
    "transformer": (transformer, XY, {}, ["none"] * 3, ["none"] * 3),
    "transformer, causal": (
        transformer, XY, {"tgt_mask": CAUSAL_M, "tgt_is_causal": True},
        ["none", "causal", "none"], ["none", "causal", "none"],
    ),
    "transformer, paddings": (
        transformer, XY, {"src_key_padding_mask": PAD, "memory_key_padding_mask": PAD, "tgt_key_padding_mask": PADDING},
        ["bias"] * 3, ["key padding", "bias", "bias"],
    ),
}  # fmt: skip


IN_EVAL = ["encoder layer, causal", "decoder layer, mask", "encoder, padding", "transformer"]
STACKS = {
    *((name, mode) for name in ("encoder", "encoder, mask", "encoder, causal") for mode in ("train", "inference")),
    *(("transformer", "train"), ("transformer", "eval"), ("transformer, causal", "inference")),
}
"""Stacks of layers that are tested by themselves, with masks and in modes that another stack has too."""
MODES = [*((name, mode) for name in LAYERS for mode in ("train", "inference")), *((name, "eval") for name in IN_EVAL)]


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*case, marks=[pytest.mark.long] if case in STACKS else []) for case in MODES],
)
def test_layers(name: str, mode: str) -> None:
    make, shapes, given, trained, inferred = LAYERS[name]
    module = make().train(mode == "train")
    with torch.no_grad() if mode == "inference" else contextlib.nullcontext():
        sites = check(lambda *inputs: module(*inputs, **given), inputs_of(shapes), module.parameters())
    assert [site.mask for site in sites] == (inferred if mode == "inference" else trained)
    assert [site.exact == "" for site in sites] == [site.mask in ("none", "causal") for site in sites]


@pytest.mark.parametrize(
    ("activation", "norm_first"),
    [
        ("relu", False),
        ("gelu", True),
        pytest.param("relu", True, marks=pytest.mark.long),
        pytest.param("gelu", False, marks=pytest.mark.long),
    ],
)
def test_the_fused_encoder_layer_is_opened(norm_first: bool, activation: str) -> None:
    """A second attention in the graph, which is replaced, makes the opened layer run."""
    n = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, 0.0, batch_first=True, norm_first=norm_first, activation=activation
        ).eval()
        x = torch.randn(2, n, 16)
    padding = torch.zeros(2, n, dtype=torch.bool)
    padding[0, 7:] = True
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    for given, mask in (({}, "none"), ({"src_key_padding_mask": padding}, "key padding"), ({"src_mask": later}, "mask"),
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name == "encoder" else []) for name in ANY_LENGTH]
)
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
