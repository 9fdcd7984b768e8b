"""Every feature family, with every mask and both gradients, against its own dense form and autograd through that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import dense_family
from sites import only_state

import polyattn
from polyattn.runtime import registry

FAMILIES: dict[str, dict[str, Any]] = {
    "Taylor": {"degree": 3},
    "least squares": {"degree": 2, "polynomial": "least_squares"},
    "nested": {"degree": 3, "rank": 18},
    "skeleton": {"features": "skeleton", "rank": 12},
    "random": {"features": "random", "rank": 12},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal_chunk": 8},
    "causal, first chunk": {"causal_chunk": 8, "causal_stats": "first_chunk"},
    "local window": {"local_window": 8},
    "outlier keys": {"outlier_keys": 2, "exact_keys": (1,)},
    "not centred": {"centring": False},
}
LOW: dict[str, Any] = {"policy": "low_rank", "audit_rows": 0}


def operands(heads: int, kv_heads: int, n_q: int, n_k: int, d: int, e: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads + 10 * n_q + 100 * d)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    q, k, v = 0.4 * rand(2, heads, n_q, d) + 0.1, 0.4 * rand(2, kv_heads, n_k, d) - 0.2, rand(2, kv_heads, n_k, e)
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_dense_form(family: str, mask: str, gradient: str) -> None:
    inputs = operands(4, 2, 41, 41, 5, 3)
    g = torch.randn(2, 4, 41, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    registry.reset()
    options = {**LOW, **FAMILIES[family], **MASKS[mask], "gradient": gradient}
    out = polyattn.attention(*inputs, causal=mask.startswith("causal"), options=options)
    state = only_state()
    if state.exact_rows:
        pytest.skip("rows had to be exact, which the dense form has not")
    wanted = dense_family(*inputs, state.plan, state.fitted)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-9)
    found, dense = (torch.autograd.grad(x, inputs, g) for x in (out, wanted))
    for x, y in zip(found, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(1.0, float(y.abs().max())))
