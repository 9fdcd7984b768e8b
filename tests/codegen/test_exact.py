"""Exact attention on a GPU: the check that stands before torch's fused kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyattn.codegen import fused_cuda

CPU = torch.device("cpu")


def _cpu_forward(q: Any, k: Any, v: Any, scale: float, causal: bool) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float, causal: bool) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, causal, scale=scale
    )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_check_accepts_right_kernels_and_refuses_wrong_ones(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's fused kernel stands in for the GPU's."""
    monkeypatch.setattr(fused_cuda, "forward", _cpu_forward)
    monkeypatch.setattr(fused_cuda, "backward", _cpu_backward)
    with torch.no_grad():
        assert fused_cuda.difference(CPU, torch.float32, causal) < 1e-5
    monkeypatch.setattr(fused_cuda, "backward", lambda *args: _cpu_backward(*args[:-1], not args[-1]))
    assert fused_cuda.difference(CPU, torch.float32, causal) > 1e-1


def test_shapes_of_the_gpu_kernels() -> None:
    """On meta tensors: the log-sum-exp is cut to the queries and padded again as the backward wants it."""
    q, k = (torch.empty(2, 3, n, 40, device="meta", dtype=torch.bfloat16) for n in (37, 50))
    out, lse = fused_cuda.forward(q, k, k, 0.3, True)
    assert (out.shape, lse.shape) == (q.shape, (2, 3, 37))
    made = fused_cuda.backward(out, q, k, k, out, lse, 0.3, True)
    assert [x.shape for x in made] == [q.shape, k.shape, k.shape]


def test_only_a_gpu_has_them() -> None:
    assert not fused_cuda.agrees(torch.zeros(1, 1, 2, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_agrees_on_this_gpu(dtype: torch.dtype) -> None:
    assert fused_cuda.agrees(torch.zeros(1, 1, 2, 8, device="cuda", dtype=dtype))
