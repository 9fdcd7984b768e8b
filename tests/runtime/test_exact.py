"""Exact attention: operands as they come."""

from __future__ import annotations

import pytest
import torch

import polyattn


@pytest.mark.parametrize("which", [0, 1, 2])
def test_operands_whose_last_axis_is_not_contiguous(which: int) -> None:
    """Torch's CPU kernel takes such tensors and returns garbage."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 4, 16, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    strided = [x.mT.contiguous().mT.requires_grad_() if at == which else x for at, x in enumerate(tensors)]
    got = polyattn.attention(*strided, options={"policy": "exact"})
    plain = [x.detach().clone().requires_grad_() for x in tensors]
    want = torch.nn.functional.scaled_dot_product_attention(*plain)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    (made,) = torch.autograd.grad(got, [strided[which]], weight.mT.contiguous().mT)
    (wanted,) = torch.autograd.grad(want, [plain[which]], weight)
    torch.testing.assert_close(made, wanted)
