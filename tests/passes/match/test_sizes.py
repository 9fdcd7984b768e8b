"""Symbolic sizes stay symbolic, also in the scale of the logits; sites know the weights that made their operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import INF, check, compile_and_report, rand, refused

N, D, E = 10, 8, 6


def qkv() -> list[torch.Tensor]:
    return [rand(2, 3, N, size, seed=place) for place, size in enumerate((D, D, E))]


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


DYNAMIC_SCALES: dict[str, Callable[..., Any]] = {
    "multiplied": lambda q, k, v: (q @ k.mT * (1 / q.shape[-2])).softmax(-1) @ v,
    "divided": lambda q, k, v: ((q @ k.mT) * 2 / math.sqrt(q.shape[-1])).softmax(-1) @ v,
    "masked": lambda q, k, v: (
        ((q @ k.mT) / q.shape[-1] ** 0.5)
        .masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, -1e9)
        .softmax(-1)
        @ v
    ),
    "torch's own": F.scaled_dot_product_attention,
    "torch's own, with a scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-2]),
    "torch's own, masked": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2]).tril(2) == 1
    ),
    "masked by hand": lambda q, k, v: (
        (q @ k.mT / q.shape[-2]).masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril(2) == 0, -INF).softmax(-1) @ v
    ),
}


@pytest.mark.parametrize("name", DYNAMIC_SCALES)
def test_scale_of_a_dynamic_size(name: str) -> None:
    function = DYNAMIC_SCALES[name]
    wider = [rand(2, 3, N, size) for size in (2 * D, 2 * D, E)]
    (site,) = check(function, qkv(), dynamic=True, also=[wider]).sites
    assert math.isnan(site.scale) is (name != "torch's own, with a scale")  # a number that Dynamo makes a constant


NO_DYNAMIC_SCALES: dict[str, tuple[Callable[..., Any], str]] = {
    "of any sign": (lambda q, k, v: (q @ k.mT * (q.shape[-2] - 20)).softmax(-1) @ v, "may not be positive"),
    "a bias before it": (
        lambda q, k, v: ((q @ k.mT + k.mean(-1)[..., None, :]) / q.shape[-1]).softmax(-1) @ v,
        "multiplied by a dynamic size",
    ),
    "a finite fill before it": (
        lambda q, k, v: ((q @ k.mT).masked_fill(torch.ones(N, N).tril() == 0, -1e4) / q.shape[-1]).softmax(-1) @ v,
        "that replaces them",
    ),
}


@pytest.mark.parametrize("name", NO_DYNAMIC_SCALES)
def test_near_misses_of_a_dynamic_scale(name: str) -> None:
    function, words = NO_DYNAMIC_SCALES[name]
    assert words in refused(function, qkv(), dynamic=True)
