"""torch's fused attention of GPUs: the check that stands before it, and the shapes that it takes."""

from __future__ import annotations

import pytest
import torch

from polyattn.codegen import targets
from polyattn.codegen.cpu.fused import FLASH
from polyattn.codegen.triton.fused import EFFICIENT, difference

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_check_accepts_right_kernels_and_refuses_wrong_ones(causal: bool) -> None:
    """The CPU's fused kernel stands in for the GPU's."""
    with torch.no_grad():
        assert difference(FLASH, CPU, torch.float32, causal) < 1e-5
    wrong = FLASH._replace(backward=lambda *args: FLASH.backward(*args[:-1], not args[-1]))
    assert difference(wrong, CPU, torch.float32, causal) > 1e-1


def test_shapes_of_the_gpu_kernels() -> None:
    """On meta tensors: the log-sum-exp is cut to the queries and padded again as the backward wants it."""
    q, k = (torch.empty(2, 3, n, 40, device="meta", dtype=torch.bfloat16) for n in (37, 50))
    out, lse = EFFICIENT.forward(q, k, k, 0.3, True)
    assert (out.shape, lse.shape) == (q.shape, (2, 3, 37))
    made = EFFICIENT.backward(out, q, k, k, out, lse, 0.3, True)
    assert [x.shape for x in made] == [q.shape, k.shape, k.shape]


def test_only_a_gpu_has_them() -> None:
    assert targets.fused_kernel(torch.zeros(1, 1, 2, 8)) is not EFFICIENT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_agrees_on_this_gpu(dtype: torch.dtype) -> None:
    assert targets.fused_kernel(torch.zeros(1, 1, 2, 8, device="cuda", dtype=dtype)) is EFFICIENT
