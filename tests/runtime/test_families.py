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


PADDINGS = {
    "right": torch.arange(41) < torch.tensor([[29], [41]]),
    "left": torch.arange(41) >= torch.tensor([[12], [3]]),
    "holes": torch.rand(2, 41, generator=torch.Generator().manual_seed(5)) < 0.7,
    "an element without keys": torch.arange(41) < torch.tensor([[0], [35]]),
}


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_key_padding_in_every_family_under_every_mask(family: str, mask: str, gradient: str) -> None:
    """Values, and what is hidden of keys and values, are those of the dense form without the hidden keys."""
    inputs = operands(4, 2, 41, 41, 5, 3)
    g = torch.randn(2, 4, 41, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {**LOW, **FAMILIES[family], **MASKS[mask], "gradient": gradient}
    compared = 0
    for keep in PADDINGS.values():
        registry.reset()
        out = polyattn.attention(*inputs, key_mask=keep, causal=mask.startswith("causal"), options=options)
        state = only_state()
        if state.exact_rows:  # which the dense form has not
            continue
        compared += 1
        wanted = dense_family(*inputs, state.plan, state.fitted, keep)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-9)
        found, dense = (torch.autograd.grad(x, inputs, g) for x in (out, wanted))
        for x, y in zip(found, dense, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(1.0, float(y.abs().max())))
        assert not bool(found[1].masked_select(~keep[:, None, :, None]).any())
    if not compared:
        pytest.skip("rows had to be exact in every call")


def test_values_of_hidden_keys_do_not_matter() -> None:
    """However large they are, as long as they are numbers."""
    inputs, keep = operands(4, 2, 41, 41, 5, 3), PADDINGS["holes"]
    hidden = ~keep[:, None, :, None]
    wild = [inputs[0], inputs[1].detach().masked_fill(hidden, 1e6), inputs[2].detach().masked_fill(hidden, -1e6)]
    for family in FAMILIES.values():
        made = []
        for tensors in (inputs, wild):
            registry.reset()
            made.append(polyattn.attention(*tensors, key_mask=keep, options={**LOW, **family}))
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_with_key_padding(causal: bool) -> None:
    """Rows that see no key are zero and have no gradient."""
    inputs = operands(4, 2, 37, 41, 5, 3)
    g = torch.randn(2, 4, 37, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for keep in PADDINGS.values():
        out = polyattn.attention(*inputs, key_mask=keep, causal=causal, options={"policy": "exact"})
        seen = keep[:, None, None] & (torch.ones(37, 41).tril().bool() if causal else torch.tensor(True))
        k, v = (x.repeat_interleave(2, 1) for x in inputs[1:])
        scores = (inputs[0] @ k.mT / 5**0.5).masked_fill(~seen, -torch.inf)
        lost = ~seen.any(-1, keepdim=True)
        wanted = torch.softmax(scores.masked_fill(lost, 0), -1).masked_fill(lost, 0) @ v
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-9)
        for x, y in zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
