"""Heads as trained ones are, small: tokens of sixteen sorts, and attention of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polyattn
from polyattn.codegen.cpu.target import CPUTarget
from polyattn.codegen.target import TileCosts
from polyattn.runtime import registry

LOW: dict[str, Any] = {"features": "clustered", "policy": "low_rank"}


def operands(
    heads: int = 2, kv_heads: int = 2, n_q: int = 512, n_k: int = 512, d: int = 8, e: int = 6, batch: int = 1,
    spread: float = 0.25, dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:  # fmt: skip
    """Tokens of sixteen sorts, as trained heads have them: keys of a sort have similar values; logits are sharp."""
    generator = torch.Generator().manual_seed(heads + n_q + 3 * n_k)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    centres = 1.5 * rand(batch, kv_heads, 16, d)
    values = rand(batch, kv_heads, 16, e)
    of_q = torch.randint(16, (batch, heads, n_q), generator=generator)
    of_k = torch.randint(16, (batch, kv_heads, n_k), generator=generator)
    wide = centres.repeat_interleave(heads // kv_heads, 1)
    q = wide.gather(2, of_q[..., None].expand(-1, -1, -1, d)) + spread * rand(batch, heads, n_q, d)
    k = centres.gather(2, of_k[..., None].expand(-1, -1, -1, d)) + spread * rand(batch, kv_heads, n_k, d)
    v = values.gather(2, of_k[..., None].expand(-1, -1, -1, e)) + spread * rand(batch, kv_heads, n_k, e)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def exact(
    inputs: list[torch.Tensor],
    keep: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Exact attention; rows that see no key are 0."""
    q, k, v = inputs
    groups = q.shape[1] // k.shape[1]
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = (seen.tril() if causal else seen)[None, None]
    seen = seen if keep is None else seen & keep[:, None, None]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    none = ~seen.any(3, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen | none, scale=scale)
    return out.masked_fill(none, 0)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖x − y‖ / ‖y‖"""
    return float((x - y).detach().norm() / y.detach().norm().clamp_min(1e-30))


def run(inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """The first call of a site."""
    registry.reset()
    return call(inputs, **options)


def call(inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """One more call of it."""
    keywords = {name: options.pop(name) for name in ("key_mask", "scale", "causal") if name in options}
    return polyattn.attention(*inputs, options={**LOW, **options}, **keywords)


def tiles_pay(monkeypatch: pytest.MonkeyPatch, near: float = 2.0, far: float = 1.0, fixed: float = 0.0) -> None:
    """Let short calls in tiles cost as little as if they paid, or as is asked for."""
    monkeypatch.setattr(CPUTarget, "tile_costs", lambda *_: TileCosts(near, far, fixed))
