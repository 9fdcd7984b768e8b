"""Random operands that several test files take: of a form of attention, and of a kernel specification."""

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
