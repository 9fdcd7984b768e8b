"""Specifications: loops, what may leave them, and their memory."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from rules import kernels

from polyattn.codegen.schedule import schedule
from polyattn.errors import ScheduleError
from polyattn.passes.derive.derive import exact
from polyattn.passes.derive.forms import FORMS
from polyattn.rewriter.planning.order import plan


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_with_a_feature_axis_leaves_a_loop(causal: bool, gradient: str) -> None:
    made = kernels(causal, 2, gradient)
    for spec in (made.forward, made.backward(("dQ", "dK", "dV"))):
        for loop in spec.loops:
            for name, stored in loop.stores:
                assert not any(kind.letter in "αβ" for kind in stored.axes), (spec.name, name)
            pairs = [tile for tile in loop.tiles if tile.tokens == 2]
            assert loop.axis is None or not pairs


def test_causal_backward_walks_up_for_queries_and_down_for_keys() -> None:
    loops = kernels(True, 2, "consistent").backward(("dQ", "dK", "dV")).loops
    assert [(loop.descending, sorted(name for name, _ in loop.stores)) for loop in loops] == [
        (False, ["dQ"]),
        (True, ["dK", "dV"]),
    ]


def test_unwanted_gradients_are_not_in_the_loops() -> None:
    names = {name for loop in kernels(True, 2, "consistent").backward(("dQ",)).loops for name, _ in loop.stores}
    assert names == {"dQ"}


def test_exact_attention_cannot_be_laid_out() -> None:
    outputs = plan(exact(FORMS["softmax"])).outputs
    with pytest.raises(ScheduleError, match="two token axes"):
        schedule("exact", outputs)


MEMORY = """
import resource, sys, torch, polyattn
torch.manual_seed(0)
q, k, v = (0.3 * torch.randn(1, 1, int(sys.argv[1]), 32) for _ in range(3))
causal = sys.argv[2] == "causal"
for x in (q, k, v): x.requires_grad_()
options = {"policy": "low_rank", "degree": 2, "audit_rows": 0}
polyattn.attention(q[:, :, :2048], k[:, :, :2048], v[:, :, :2048], causal=causal, options=options).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
polyattn.attention(q, k, v, causal=causal, options=options).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="needs getrusage")
@pytest.mark.parametrize("causal", ["full", "causal"])
def test_peak_memory_at_65536_tokens(causal: str) -> None:
    """Forward and backward, one head, d = 32, degree 2: an n x r matrix alone would be 147 MiB in float32."""
    done = subprocess.run([sys.executable, "-c", MEMORY, "65536", causal], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200.0
