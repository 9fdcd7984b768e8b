"""A whole model through the rewritten graph, against eager training through the dense polynomial."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import dense_polynomial
from torch import nn
from torch.utils.checkpoint import checkpoint

import polyattn
from polyattn.runtime import registry

CHUNK = 16


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, w = x.shape
        q, k, v = (y.view(b, n, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, w))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(16, 2), Block(16, 2)])
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool = True) -> torch.Tensor:
    return dense_polynomial(q, k, v, 2, is_causal, CHUNK, False, "call")


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointed"])
def test_gradients_of_a_compiled_model_are_those_of_the_dense_polynomial(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.reset()
    polyattn.reset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(recompute).double()
        batches = [torch.randn(2, n, 16, dtype=torch.float64) for n in (50, 37)]
    torch._dynamo.reset()
    options = {"policy": "low_rank", "causal_chunk": CHUNK, "inner": "eager", "expect_sites": 2}
    compiled = torch.compile(model, backend="polyattn", fullgraph=True, options=options)
    for x in batches:
        model.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", dense)
            wanted = model(x).square().mean()
            wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    report = polyattn.reports()[0]
    assert [site.verdict for site in report.sites] == ["low_rank", "low_rank"]
    assert all(site.error is not None and 0 < site.error < 0.1 for site in report.sites)
