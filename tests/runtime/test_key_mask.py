"""Keys that a mask leaves out of attention (``key_mask`` of ``polyattn.attention``): values, gradients, centring."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense import dense_polynomial
from operands import operands

import polyattn


@pytest.fixture(autouse=True)
def fresh_states() -> None:
    polyattn.reset()


KEY_MASKS = {
    "one_for_all": (torch.arange(23) % 3 != 1, False),
    "per_element": (torch.rand(2, 23, generator=torch.Generator().manual_seed(3)) < 0.6, False),
    "padding": (torch.arange(23) < torch.tensor([[17], [23]]), True),
    "everything": (torch.ones(23, dtype=torch.bool), True),
}


@pytest.mark.parametrize("policy", ["low_rank", "exact"])
@pytest.mark.parametrize("name", sorted(KEY_MASKS))
def test_key_mask(name: str, policy: str) -> None:
    mask, causal = KEY_MASKS[name]
    q, k, v, g = operands(2, 4, 2, 19, 23, 5, 3)
    full = mask.expand(2, 23)[:, None, None] & (torch.ones(19, 23).tril().bool() if causal else torch.tensor(True))
    if policy == "exact":
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=full, enable_gqa=True)
    else:
        x = q @ k.repeat_interleave(2, 1).mT / math.sqrt(5)
        a = (x.exp() if causal else 1 + x + x * x / 2).masked_fill(~full, 0.0)  # with one chunk all of it is exact
        wanted = a / a.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    options = {"policy": policy, "causal_chunk": 32, "audit_rows": 0, "centring": False}
    found = polyattn.attention(q, k, v, key_mask=mask, causal=causal, options=options)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for x, y in zip(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(wanted, (q, k, v), g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def test_a_batch_element_without_keys_is_zero() -> None:
    q, k, v, g = operands(2, 1, 1, 6, 5, 3, 3)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = polyattn.attention(q, k, v, key_mask=mask, options={"policy": "exact"})
    torch.testing.assert_close(out[0], F.scaled_dot_product_attention(q[0], k[0], v[0]))
    assert not out[1].any()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out, (q, k, v), g))


def test_key_mask_without_batch_axes() -> None:
    q, k, v, _ = operands(1, 2, 2, 6, 5, 3, 3)
    mask = torch.tensor([True, False, True, True, False])
    options = {"policy": "exact"}
    wanted = polyattn.attention(q, k, v, key_mask=mask, options=options)
    torch.testing.assert_close(polyattn.attention(q[0], k[0], v[0], key_mask=mask, options=options), wanted[0])
    five = polyattn.attention(q[None], k[None], v[None], key_mask=mask.expand(1, 1, 5), options=options)
    torch.testing.assert_close(five, wanted[None])


def test_key_mask_shifts_by_the_mean_of_the_keys_that_take_part() -> None:
    q, k, v, g = operands(2, 4, 2, 19, 23, 5, 3)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 15:], mask[1, :4] = False, False
    found = polyattn.attention(q, k, v, key_mask=mask, options={"policy": "low_rank", "audit_rows": 0})
    parts = [
        dense_polynomial(q[b : b + 1], k[b : b + 1, :, mask[b]], v[b : b + 1, :, mask[b]], 2, False, 1, False, "call")
        for b in range(2)
    ]
    wanted = torch.cat(parts)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    for x, y in zip(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(wanted, (q, k, v), g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
