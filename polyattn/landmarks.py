"""The fitted features of a site: made at its first low-rank call, kept with its state, used by every call after it."""

from __future__ import annotations

import torch

from polyattn.guard import SiteState, seed
from polyattn.lowrank_op import Setting, grouped
from polyattn.options import Options
from polyattn.rewriter.landmarks import fit

ELEMENTS = 4
"""Batch elements that a fit looks at."""


def of(
    site: str,
    state: SiteState,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    setting: Setting,
    options: Options,
) -> torch.Tensor:
    """Landmarks and cores of all key heads, [kv_heads, m, 2 d + m], in the accumulator's dtype.

    They are fitted to the first batch elements of the site's first low-rank call: a fit belongs to a head, not to a
    sequence. Random choices come from a generator of their own, seeded by ``Options.seed`` and the site.
    """
    with state.lock:
        if state.landmarks is None:
            q, k, _ = grouped(*(x[:ELEMENTS] for x in tensors))
            moved = setting.moved(q, k)
            q, k = moved.q, moved.k
            weights = torch.ones_like(k[..., 0]) if moved.weights is None else moved.weights
            m = options.resolved_rank(k.shape[-1])
            generator = torch.Generator().manual_seed(seed(options, site, "fit"))
            elements = len(q) // tensors[1].shape[1]

            def by_head(x: torch.Tensor) -> torch.Tensor:
                return x.reshape(elements, len(x) // elements, *x.shape[1:]).transpose(0, 1)

            made = fit(
                by_head(q.flatten(1, 2)), by_head(k), by_head(weights), setting.scale, m, generator, setting.causal
            )
            state.landmarks = torch.cat([made.keys, made.queries, made.core], 2).to(q.dtype)
        return state.landmarks
