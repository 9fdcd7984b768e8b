"""Attention in tiles of a call's tensors: tokens into tiles, the emitted kernels, and tokens back in their order.

Tensors are grouped by key head: queries [H, groups, n_q, d], keys [H, n_k, d], values [H, n_k, e]; queries of all
groups share the tiles of their key head. Heads whose threshold is 0 are exact, by torch's kernel; so are heads with
numbers that are not finite. What a forward hands to its backward beside the output are logarithms of the rows' sums
(−inf for rows computed exactly, inf for rows that see no key) and the thresholds; tiles and near pairs are found again,
from the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyattn.codegen import targets
from polyattn.codegen.spec import KernelSpec
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import Kernels, kernels
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.masks.mask import NEAR_TILES, NONE
from polyattn.rewriter.tiles.family import TiledFamily
from polyattn.rewriter.tiles.near import NearPairs
from polyattn.rewriter.tiles.tree import Shape, Tiles, features, tree
from polyattn.runtime import exact, row_checks
from polyattn.runtime.exact import ExactSoftmax, Grouped
from polyattn.site_plan import SitePlan

BLOCK_ELEMENTS = 1 << 19
"""Elements of the values that a block of tiles of queries has for every key: they are to stay in the cache."""
LOST = 1 / 8
"""A head with more rows than this part that are no softmax's is computed exactly."""
NOTHING = -85.0
"""The logarithm of the factor of a place without a key, whose exponential is no number but 0 for all purposes."""


def family_of(plan: SitePlan) -> TiledFamily:
    """The family of a plan in tiles."""
    assert isinstance(plan.family, TiledFamily)
    return plan.family


@dataclass(frozen=True)
class Layout:
    """The tokens of some heads in tiles."""

    of_queries: Tiles
    of_keys: Tiles
    q: torch.Tensor
    """[H, A, T_q, d]"""
    k: torch.Tensor
    v: torch.Tensor
    share_q: torch.Tensor
    """[H, A, T_q]: what a query counts in the mean of its tile."""
    share_k: torch.Tensor

    @classmethod
    def of(cls, tensors: Grouped, plan: SitePlan, keep: torch.Tensor | None) -> Layout:
        """Tiles of grouped tensors; keys that are not kept [H, n_k] are in none."""
        q, k, v = tensors[0].flatten(1, 2), tensors[1], tensors[2]
        family = family_of(plan)
        of_q, of_k = features(q, k, v, keep)
        queries = tree(of_q, Shape.of(q.shape[1], family.tile_width(tensors[0].shape[2])))
        keys = tree(of_k, Shape.of(k.shape[1], family.tile_width(k.shape[1])), keep)
        del of_q, of_k  # as large as half of q and k
        shares = (_shares(tiles, q.dtype) for tiles in (queries, keys))
        return cls(queries, keys, queries.gather(q), keys.gather(k), keys.gather(v), *shares)

    @property
    def weighted(self) -> bool:
        """Whether places of tiles of keys are empty."""
        return not self.of_keys.full

    def kernels(self, plan: SitePlan) -> Kernels:
        """The specifications for this layout."""
        return kernels(softmax(NEAR_TILES, self.weighted), family_of(plan).rule, plan.gradient)

    def inputs(self) -> dict[str, torch.Tensor]:
        """The inputs of the kernels that do not depend on the choice of near pairs."""
        floor = torch.full_like(self.share_q[..., 0], torch.finfo(self.q.dtype).tiny)
        made = {"Q": self.q, "K": self.k, "V": self.v, "W_Q": self.share_q, "W_K": self.share_k, "FLOOR": floor}
        if self.weighted:
            valid = self.of_keys.valid
            made["LOG_B"] = torch.zeros_like(self.share_k).masked_fill_(~valid, NOTHING)
        return made

    def choice(self, plan: SitePlan, tau: torch.Tensor) -> NearPairs:
        """The choice of near pairs, with thresholds [H]."""
        return NearPairs(self.q, self.k, self.v, self.share_q, self.share_k, plan.scale, tau)

    def some(self, heads: torch.Tensor) -> Layout:
        """The layout of some of the heads."""
        q, k = (Tiles(tiles.index[heads], tiles.valid[heads], tiles.full) for tiles in (self.of_queries, self.of_keys))
        rest = (x[heads] for x in (self.q, self.k, self.v, self.share_q, self.share_k))
        return Layout(q, k, *rest)


def _shares(tiles: Tiles, dtype: torch.dtype) -> torch.Tensor:
    valid = tiles.valid.to(dtype)
    return valid / valid.sum(2, keepdim=True).clamp_min(1)


def run(
    spec: KernelSpec, inputs: dict[str, torch.Tensor], plan: SitePlan, choice: NearPairs
) -> dict[str, torch.Tensor]:
    """One specification in tiles over all heads."""
    q, k = inputs["Q"], inputs["K"]
    block = max(1, BLOCK_ELEMENTS // (k.shape[1] * k.shape[2]))
    return targets.run(spec, inputs, {"s": plan.scale}, monomials.full(q.shape[-1], 0), block, choice)


@dataclass(frozen=True)
class TiledForward:
    """What the kernels make of a layout."""

    out: torch.Tensor
    """[H, groups, n_q, e]"""
    lse: torch.Tensor
    """Logarithms of the rows' sums, [H, groups, n_q]."""
    share: torch.Tensor
    """The share of the pairs of tiles that were near, [H]."""


def approximate(
    tensors: Grouped, layout: Layout, plan: SitePlan, tau: torch.Tensor, near: torch.Tensor | None = None
) -> TiledForward:
    """The form of a family in tiles in all heads of a layout, with thresholds [H].

    Args:
        near: [H, A, B] bool, which is filled with what is near; None: it is not kept.
    """
    q, v = tensors[0], tensors[2]
    choice = layout.choice(plan, tau)
    choice.near = q.new_zeros(*layout.q.shape[:2], layout.k.shape[1], dtype=torch.bool) if near is None else near
    choice.shifts = torch.zeros_like(layout.share_q)
    made = run(layout.kernels(plan).forward, layout.inputs(), plan, choice)
    lse = made["D"].log() + choice.shifts
    n = q.shape[1] * q.shape[2]
    out = layout.of_queries.scatter(made["O"], n).view(*q.shape[:3], v.shape[-1])
    share = choice.near.flatten(1).to(torch.float32).mean(1)
    return TiledForward(out, layout.of_queries.scatter(lse, n).view(q.shape[:3]), share)


@dataclass(frozen=True)
class Forward:
    """The output of grouped tensors, what its backward reads, and what is known of its heads."""

    out: torch.Tensor
    denominators: torch.Tensor
    """Logarithms of the rows' sums: −inf for rows computed exactly, inf for rows that see no key."""
    exact_rows: int
    tau: torch.Tensor
    """[H, 1]: the threshold of each head, 0 where it was exact."""
    share: torch.Tensor
    """[H]: the share of the pairs that was computed exactly."""

    def packed(self, fit: Fit) -> torch.Tensor:
        """What the operator hands to its backward: the thresholds of each batch element, 0 where it was exact."""
        return self.tau.clone()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SitePlan,
    tau: torch.Tensor,
    keep: torch.Tensor | None = None,
    layout: Layout | None = None,
) -> Forward:
    """The form in tiles where a head's threshold is positive, exact attention elsewhere.

    Args:
        tau: the threshold of each head, [H].
        keep: which keys take part, bool [H, n_k]; None: all. A row that sees no key is 0.
        layout: the tiles of all heads, where there are some already.
    """
    tensors = q, k, v
    tau = torch.where(_finite(tensors), tau.to(q.dtype), 0)
    if keep is not None:
        tau = torch.where(keep.any(1), tau, 0)
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
    share, rows = torch.ones_like(tau), 0
    low = (tau > 0).nonzero().squeeze(1)
    if len(low):
        everything = len(low) == len(q)
        some = tensors if everything else (q[low], k[low], v[low])
        kept = keep if keep is None or everything else keep[low]
        if layout is None:
            layout = Layout.of(some, plan, kept)
        elif not everything:
            layout = layout.some(low)
        made = approximate(some, layout, plan, tau[low])
        bad = ~torch.isfinite(made.lse) | row_checks.outputs(some[2], made.out, kept)
        whole = bad.flatten(1).to(torch.float32).mean(1) > LOST
        out[low], lse[low], share[low] = made.out, made.lse, made.share.to(q.dtype)
        tau = tau.index_put((low[whole],), tau.new_zeros(()))
        single = torch.zeros_like(lse, dtype=torch.bool).index_put((low,), bad & ~whole[:, None, None])
        rows = exact.write_rows(out, single, tensors, plan, keep)
        lse = lse.masked_fill(single, -torch.inf)
    high = (tau == 0).nonzero().squeeze(1)
    if len(high):
        out[high], lse[high] = _exact_heads(tensors, high, plan, keep)
        share[high] = 1
    if keep is not None:
        lost = ~keep.any(1)
        out, lse = out.masked_fill(lost[:, None, None, None], 0), lse.masked_fill(lost[:, None, None], torch.inf)
    return Forward(out, lse, rows, tau[:, None], share)


def _finite(tensors: Grouped) -> torch.Tensor:
    """Which heads have finite numbers alone, [H]."""
    return torch.stack([torch.isfinite(x.flatten(1).sum(1)) for x in tensors]).all(0)


def _exact_heads(
    tensors: Grouped, heads: torch.Tensor, plan: SitePlan, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x[heads] for x in tensors)
    kept = None if keep is None else keep[heads]
    return exact.forward(q, k[:, None], v[:, None], ExactSoftmax(plan.scale, NONE), kept)


def backward(
    g: torch.Tensor,
    tensors: Grouped,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: SitePlan,
    tau: torch.Tensor,
    wanted: Sequence[str],
    keep: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Gradients by name, of ``dQ``, ``dK`` and ``dV`` those that are wanted.

    Args:
        g: gradient of the output, grouped; out, lse: what :func:`forward` returned.
        tau: the thresholds that it used, [H].
    """
    q, k, v = tensors
    result = {name: torch.empty_like(x) for name, x in zip(("dQ", "dK", "dV"), tensors, strict=True) if name in wanted}
    low, high = ((tau > 0).nonzero().squeeze(1), (tau == 0).nonzero().squeeze(1))
    if len(low) and result:
        some = q[low], k[low], v[low]
        kept = None if keep is None else keep[low]
        bad = lse[low].isneginf()
        layout = Layout.of(some, plan, kept)
        n = q.shape[1] * q.shape[2]
        quiet = bad[..., None]

        def rows(x: torch.Tensor) -> torch.Tensor:
            return layout.of_queries.gather(x.reshape(len(low), n, *x.shape[3:]))

        valid = layout.of_queries.valid
        choice = layout.choice(plan, tau[low].to(q.dtype))
        # where a row is exact its sum is not known: an infinite shift leaves it out
        choice.shift = rows(lse[low].masked_fill(bad, torch.inf)).masked_fill_(~valid, torch.inf)
        inputs = {
            **layout.inputs(),
            "G": rows(g[low].masked_fill(quiet, 0)).masked_fill_(~valid[..., None], 0),
            "O": rows(out[low].masked_fill(quiet, 0)),
            "D": torch.ones_like(layout.share_q),
        }
        made = run(layout.kernels(plan).backward(tuple(result)), inputs, plan, choice)
        for name, x in made.items():
            tiles, like = (layout.of_queries, q) if name == "dQ" else (layout.of_keys, result[name])
            result[name][low] = tiles.scatter(x, n if name == "dQ" else k.shape[1]).view(len(low), *like.shape[1:])
        exact.add_row_gradients(result, lse.isneginf() & (tau > 0)[:, None, None], tensors, g, plan, keep)
    if len(high) and result:
        some = q[high], k[high][:, None], v[high][:, None]
        kept = None if keep is None else keep[high]
        gone = lse[high].isposinf()[..., None]
        softmaxed = ExactSoftmax(plan.scale, NONE)
        clean = g[high].masked_fill(gone, 0), lse[high].masked_fill(gone[..., 0], 0)
        gradients = exact.backward(clean[0], some, out[high], clean[1], softmaxed, kept)
        for name, x in zip(("dQ", "dK", "dV"), gradients, strict=True):
            if name in result:
                result[name][high] = x if name == "dQ" else x[:, 0]
    return result


def near_pairs(tensors: Grouped, plan: SitePlan, tau: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Which pairs of tiles are near, bool [H, tiles of queries, tiles of keys]; all where a threshold is 0."""
    layout = Layout.of(tensors, plan, keep)
    near = torch.zeros(*layout.q.shape[:2], layout.k.shape[1], dtype=torch.bool, device=layout.q.device)
    approximate(tensors, layout, plan, tau, near)
    return near | (tau == 0)[:, None, None]


def for_values(
    tensors: Grouped, values: torch.Tensor, plan: SitePlan, tau: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """What the forward of a call makes of other values [H, n_k, c] with its own tiles and near pairs: it is linear in
    them, [H, groups, n_q, c]."""
    q, k, v = tensors
    out = q.new_empty(*q.shape[:3], values.shape[-1])
    low, high = (tau > 0).nonzero().squeeze(1), (tau == 0).nonzero().squeeze(1)
    if len(low):
        kept = None if keep is None else keep[low]
        layout = Layout.of((q[low], k[low], v[low]), plan, kept)
        choice = layout.choice(plan, tau[low].to(q.dtype))
        both = layout.of_keys.gather(torch.cat([v[low], values[low]], 2))
        made = run(layout.kernels(plan).forward, {**layout.inputs(), "V": both}, plan, choice)["O"]
        found = layout.of_queries.scatter(made[..., v.shape[-1] :].contiguous(), q.shape[1] * q.shape[2])
        out[low] = found.view(len(low), *q.shape[1:3], -1)
    if len(high):
        out[high] = _exact_heads((q, k, values), high, plan, keep)[0]
    return out
