"""A block of pairs in tiles: some queries and some keys of a call, of which every query sees every key.

Heads whose threshold is 0 are exact, by torch's kernel. Tensors are grouped as in :mod:`polyattn.runtime.tile_layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from polyattn.rewriter.masks.mask import NONE
from polyattn.runtime import exact, row_checks, tile_layout
from polyattn.runtime.exact import ExactSoftmax, Grouped
from polyattn.runtime.tile_layout import Layout
from polyattn.site_plan import SitePlan

LOST = 1 / 8
"""A head with more rows than this part that are no softmax's is computed exactly."""
LARGE = 1e30
"""The logarithm of a sum beside which every exponential is 0."""
Layouts = Callable[[torch.Tensor], Layout]
"""Tiles of some of the heads, by their numbers."""


@dataclass(frozen=True)
class Block:
    """The outputs of a block."""

    out: torch.Tensor
    """[H, groups, n_q, e]"""
    lse: torch.Tensor
    """Logarithms of the sums of rows [H, groups, n_q]; −inf where a row sees no key."""
    bad: torch.Tensor
    """[H, groups, n_q], bool: rows that are no softmax's and are to be computed exactly."""
    tau: torch.Tensor
    """[H]: the threshold of each head, 0 where it was exact."""
    share: torch.Tensor
    """[H]: the share of the pairs that was computed exactly."""


def merged(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [..., e] and logarithms of sums [...] over two sets of keys, from those over each."""
    total = torch.logaddexp(lse, sums)
    known = ~total.isneginf()  # rows that see no key of either
    first, second = ((x - total).exp().where(known, 0)[..., None] for x in (lse, sums))
    return first * out + second * more, total


def forward(
    tensors: Grouped,
    plan: SitePlan,
    tau: torch.Tensor,
    keep: torch.Tensor | None,
    layouts: Layouts,
    values: torch.Tensor | None = None,
) -> Block:
    """The form in tiles where a head's threshold is positive, exact attention elsewhere.

    Args:
        tau: the threshold of each head, [H].
        keep: which keys take part, bool [H, n_k]; None: all. A row that sees no key is 0.
        values: the values whose outputs are wanted, the first columns of which are those of the tensors; None: those.
    """
    q, k, v = tensors
    values, e = v if values is None else values, v.shape[-1]
    if keep is not None:
        tau = torch.where(keep.any(1), tau, 0)
    out, lse = q.new_empty(*q.shape[:3], values.shape[-1]), q.new_empty(q.shape[:3])
    share, bad = torch.ones_like(tau), torch.zeros_like(lse, dtype=torch.bool)
    low = (tau > 0).nonzero().squeeze(1)
    if len(low):
        made = tile_layout.approximate(layouts(low), plan, tau[low], q.shape[2], values[low])
        kept = None if keep is None else keep[low]
        wrong = ~torch.isfinite(made.lse) | row_checks.outputs(v[low], made.out[..., :e], kept)
        whole = wrong.flatten(1).to(torch.float32).mean(1) > LOST
        out[low], lse[low], share[low] = made.out, made.lse, made.share.to(q.dtype)
        bad[low] = wrong & ~whole[:, None, None]
        tau = tau.index_put((low[whole],), tau.new_zeros(()))
    high = (tau == 0).nonzero().squeeze(1)
    if len(high):
        some = q[high], k[high][:, None], values[high][:, None]
        kept = None if keep is None else keep[high]
        out[high], lse[high] = exact.forward(*some, ExactSoftmax(plan.scale, NONE), kept)
        share[high] = 1
    if keep is not None:
        lost = ~keep.any(1)
        out, lse = out.masked_fill(lost[:, None, None, None], 0), lse.masked_fill(lost[:, None, None], -torch.inf)
    return Block(out, lse, bad, tau, share)


def gradients(
    g: torch.Tensor,
    tensors: Grouped,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: SitePlan,
    tau: torch.Tensor,
    wanted: Sequence[str],
    keep: torch.Tensor | None,
    layouts: Layouts,
) -> dict[str, torch.Tensor]:
    """What the pairs of a block add to gradients, by name, of ``dQ``, ``dK`` and ``dV`` those that are wanted.

    Args:
        g: gradient of the output, grouped; out: the output, over other keys too.
        lse: logarithms of the rows' sums, over other keys too; where they are infinite a row has no gradient.
        tau: the thresholds that the forward used, [H].
    """
    q, k, v = tensors
    result = {name: torch.empty_like(x) for name, x in zip(("dQ", "dK", "dV"), tensors, strict=True) if name in wanted}
    low, high = (tau > 0).nonzero().squeeze(1), (tau == 0).nonzero().squeeze(1)
    if len(low):
        made = tile_layout.gradients(
            layouts(low), g[low], out[low], lse[low], plan, tau[low].to(q.dtype), tuple(result), k.shape[1]
        )
        for name, x in made.items():
            result[name][low] = x
    if len(high):
        kept = None if keep is None else keep[high]
        made = exact_gradients(
            g[high], (q[high], k[high], v[high]), out[high], lse[high], ExactSoftmax(plan.scale, NONE), kept
        )
        for name, like in result.items():
            like[high] = made[name]
    return result


def exact_gradients(
    g: torch.Tensor,
    tensors: Grouped,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax: ExactSoftmax,
    keep: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Exact gradients of all pairs that a mask shows, by name; rows whose sums' logarithms are infinite have none."""
    quiet = lse.isinf()
    q, k, v = tensors
    clean = g.masked_fill(quiet[..., None], 0), lse.masked_fill(quiet, LARGE)
    dq, dk, dv = exact.backward(clean[0], (q, k[:, None], v[:, None]), out, clean[1], softmax, keep)
    return {"dQ": dq, "dK": dk[:, 0], "dV": dv[:, 0]}
