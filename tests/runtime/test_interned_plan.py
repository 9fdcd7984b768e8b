"""The plan that a backward gets back by an identifier: under saved-tensor hooks, beside other plans, from caches."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operands import operands

import polyattn
from polyattn.runtime import registry

LOW: dict[str, Any] = {"policy": "low_rank", "audit_rows": 0}
PLANS: tuple[dict[str, Any], ...] = (
    {"degree": 2},
    {"degree": 3, "rank": 12},
    {"features": "skeleton", "rank": 12, "gradient": "substituted"},
    {"policy": "exact"},
)


def attend(options: dict[str, Any], tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    registry.reset()
    return polyattn.attention(*tensors, options={**LOW, **options})


def pack(x: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


def unpack(x: bytes) -> torch.Tensor:
    return torch.load(io.BytesIO(x))


def test_saved_tensors_may_be_written_and_read() -> None:
    *inputs, g = operands(1, 2, 2, 33, 33, 5, 3)
    for options in PLANS:
        wanted = torch.autograd.grad(attend(options, tuple(inputs)), inputs, g)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = attend(options, tuple(inputs))
        for x, y in zip(torch.autograd.grad(out, inputs, g), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_backwards_take_their_own_plans_in_any_order() -> None:
    *inputs, g = operands(1, 2, 2, 33, 33, 5, 3)
    wanted = [torch.autograd.grad(attend(options, tuple(inputs)), inputs, g) for options in PLANS]
    outs = [attend(options, tuple(inputs)) for options in PLANS]
    for at in (2, 0, 3, 1):
        for x, y in zip(torch.autograd.grad(outs[at], inputs, g), wanted[at], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


CACHED = """
import sys, torch, polyattn
from torch._functorch import config
config.enable_autograd_cache = True
torch.manual_seed(0)
model = torch.nn.MultiheadAttention(12, 2, batch_first=True, dtype=torch.float64)
x = torch.randn(1, 40, 12, dtype=torch.float64)
if sys.argv[1] == "second":  # other plans take the first identifiers
    for degree in (1, 3, 4):
        q = torch.randn(1, 1, 9, 4)
        polyattn.attention(q, q, q, options={"policy": "low_rank", "degree": degree})
options = {"policy": "low_rank", "audit_rows": 0, "degree": 3, "gradient": "substituted"}
run = torch.compile(lambda x: model(x, x, x, need_weights=False)[0], backend="polyattn", options=options)
run(x).square().sum().backward()
from torch._dynamo.utils import counters
print(counters["aot_autograd"]["autograd_cache_hit"], float(model.in_proj_weight.grad.norm()))
"""


@pytest.mark.long
def test_a_backward_from_the_cache_of_another_process(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    found = []
    for name in ("first", "second"):
        done = subprocess.run([sys.executable, "-c", CACHED, name], capture_output=True, text=True, env=env, check=True)
        found.append(done.stdout.split())
    assert found[0][0] == "0"
    assert int(found[1][0]) >= 1, "the second process takes the compiled backward from the cache"
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), rel=1e-12)
