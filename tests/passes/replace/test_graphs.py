"""Several graphs of one model: their reports, ``expect_sites``, ``fullgraph`` and the log."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from matching import EXACT, compile_and_report, rand
from regions import (
    MINE,
    B,
    D,
    H,
    N,
    causal,
    plain,
    qkv,
    same,
)

from polyattn.errors import ExpectSitesError


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
    assert all(MINE.search(line) for line in lines)
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
