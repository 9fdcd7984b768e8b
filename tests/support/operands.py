"""Random operands that several test files take: of a form, of a kernel specification, and of attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.passes.derive.forms import Form
from polyattn.rewriter.algebra.expr import Indicator


def form_inputs(form: Form, sizes: Mapping[str, int], chunk: int) -> dict[str, torch.Tensor]:
    """Inputs, cotangent and masks of a form, float64; ``sizes`` by the letters of the axes."""
    generator = torch.Generator().manual_seed(7)
    found = {
        t.name: 0.5 * torch.randn([sizes[k.letter] for k in t.kinds], dtype=torch.float64, generator=generator)
        for t in (*form.inputs, form.cotangent)
        if not isinstance(t, Indicator)
    }
    if any(isinstance(t, Indicator) for t in form.inputs):
        i, j = torch.arange(sizes["i"])[:, None], torch.arange(sizes["j"])[None]
        found["M_near"] = ((i // chunk == j // chunk) & (j <= i)).double()
        found["M_far"] = (j // chunk < i // chunk).double()
        found["M"] = found["M_near"] + found["M_far"]
    return found


def spec_inputs(
    d: int,
    e: int,
    n_q: int,
    n_k: int,
    heads: int = 2,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Q, K, V, G and weights B of the keys as specifications take them."""
    generator = torch.Generator().manual_seed(1000 * d + 10 * e + n_q)

    def rand(*size: int) -> torch.Tensor:
        made = torch.randn(*size, generator=generator, dtype=torch.float64) * 0.5
        return made.to(device=device, dtype=dtype)

    return {
        "Q": rand(heads, groups, n_q, d),
        "K": rand(heads, n_k, d),
        "V": rand(heads, n_k, e),
        "G": rand(heads, groups, n_q, e),
        "B": rand(heads, n_k).exp(),
    }


def operands(
    batch: int,
    heads: int,
    kv: int,
    n_q: int,
    n_k: int,
    d: int,
    e: int,
    dtype: torch.dtype = torch.float64,
    size: float = 0.7,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, which require gradients, and a gradient of the output; queries and keys of deviation ``size``."""
    generator = torch.Generator().manual_seed(n_q * 1000 + n_k)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    q, k, v = size * make(batch, heads, n_q, d), size * make(batch, kv, n_k, d), make(batch, kv, n_k, e)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), make(batch, heads, n_q, e)
