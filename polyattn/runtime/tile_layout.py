"""Tokens of a call's heads in tiles, and what the emitted kernels make of them.

Tensors are grouped by key head: queries [H, groups, n_q, d], keys [H, n_k, d], values [H, n_k, e]; queries of all
groups share the tiles of their key head, and are told by their positions first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from polyattn.codegen import targets
from polyattn.codegen.spec import KernelSpec
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import Kernels, kernels
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.tiles.family import TiledFamily
from polyattn.rewriter.tiles.near import Moments, NearPairs, Others
from polyattn.rewriter.tiles.tree import MULTIPLE, Cut, Seats, Shape, Tiles, descend, features, seat, tree
from polyattn.runtime.exact import Grouped
from polyattn.site_plan import SitePlan

BLOCK_ELEMENTS = 1 << 19
"""Elements of the values that a block of tiles of queries has for every key: they are to stay in the cache."""
NOTHING = -85.0
"""The logarithm of the factor of a place without a key, whose exponential is no number but 0 for all purposes."""
ROOM = 5 / 4
"""Places of a tile for queries that were told their tile, in those that it would have if all had as many."""
REACH = 1.25
"""How far a query may be from the mean of its tile, in the largest distance of earlier ones."""


def family_of(plan: SitePlan) -> TiledFamily:
    """The family of a plan in tiles."""
    assert isinstance(plan.family, TiledFamily)
    return plan.family


def by_position(x: torch.Tensor) -> torch.Tensor:
    """What queries of all groups have, in the order of their positions: [H, groups, n, ...] → [H, n · groups, ...]."""
    return x.transpose(1, 2).flatten(1, 2)


def by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The inverse of :func:`by_position`."""
    return x.reshape(len(x), -1, groups, *x.shape[2:]).transpose(1, 2)


class Past(NamedTuple):
    """Queries before those of a layout, and what they attended to; rows whose sums are not finite do not count."""

    q: torch.Tensor
    """[H, groups, m, d]"""
    out: torch.Tensor
    """Their outputs, [H, groups, m, e]."""
    lse: torch.Tensor
    """Logarithms of the sums of their rows, [H, groups, m]."""


@dataclass(frozen=True)
class Known:
    """What is known of tiles of queries before their own queries come: from earlier ones of the same tiles."""

    means: torch.Tensor
    """[H, A, d]"""
    sigma: torch.Tensor
    """Covariances of their logits, [H, A, d, d]."""
    others: Others
    whole: torch.Tensor
    """[H, A], bool: further tiles, of queries that found theirs full, all of whose pairs are near."""
    count: int
    """Tiles that are none of those."""

    def some(self, heads: torch.Tensor) -> Known:
        """The same of some of the heads."""
        others = Others(self.others.lse[heads], self.others.out[heads])
        return Known(self.means[heads], self.sigma[heads], others, self.whole[heads], self.count)


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
    groups: int
    known: Known | None = None
    """Where the tiles of queries are those of earlier ones: then the last place of each holds their mean."""
    moments: dict[int, Moments] = field(default_factory=dict)
    """What choices of near pairs have found of the tiles of keys, by head."""

    @classmethod
    def of(cls, tensors: Grouped, plan: SitePlan, keep: torch.Tensor | None) -> Layout:
        """Tiles of grouped tensors; keys that are not kept [H, n_k] are in none."""
        (q, k, v), family = (by_position(tensors[0]), *tensors[1:]), family_of(plan)
        projection, of_k = features(q, k, v, keep)
        queries = tree(projection(q), Shape.of(q.shape[1], family.tile_width(tensors[0].shape[2])))
        keys = tree(of_k, Shape.of(k.shape[1], family.tile_width(k.shape[1])), keep)
        del of_k  # as large as half of k
        of_q, of_k = (_shares(tiles, q.dtype) for tiles in (queries, keys))
        in_tiles = queries.gather(q), keys.gather(k), keys.gather(v)
        return cls(queries, keys, *in_tiles, of_q, of_k, tensors[0].shape[1])

    @classmethod
    def after(cls, past: Past, tensors: Grouped, plan: SitePlan, keep: torch.Tensor | None) -> Layout:
        """Tiles of grouped tensors whose queries come after ``past``: nothing about a query depends on later ones.

        Tiles of queries are those of the past ones, whose means, covariances and outputs stand for them too.
        """
        (q, k, v), groups = (by_position(tensors[0]), *tensors[1:]), tensors[0].shape[1]
        old = by_position(past.q)
        projection, of_k = features(old, k, v, keep)
        keys = tree(of_k, Shape.of(k.shape[1], family_of(plan).tile_width(k.shape[1])), keep)
        tiles = Shape.of(old.shape[1], family_of(plan).tile_width(past.q.shape[2])).tiles
        shape, cuts = Shape(tiles, old.shape[1] // tiles), list[Cut]()
        old, out, lse = (x[:, -shape.places :] for x in (old, by_position(past.out), by_position(past.lse)))
        of_old = tree(projection(old), shape, None, cuts)
        width = int(-(-q.shape[1] // tiles) * ROOM) + 1
        told = _told(projection(q), cuts, of_old.gather(projection(old)))
        seats = seat(told, tiles, -(-width // MULTIPLE) * MULTIPLE, 1)
        known = _known(of_old, seats, old, out, lse, plan.scale)
        queries = seats.tiles
        in_tiles, share = queries.gather(q), torch.zeros_like(queries.valid, dtype=q.dtype)
        in_tiles[:, :, -1] = known.means
        share[:, :, -1] = queries.valid.any(2)
        return cls(
            queries, keys, in_tiles, keys.gather(k), keys.gather(v), share, _shares(keys, q.dtype), groups, known
        )

    @property
    def weighted(self) -> bool:
        """Whether places of tiles of keys are empty."""
        return not self.of_keys.full

    def kernels(self, plan: SitePlan) -> Kernels:
        """The specifications for this layout."""
        return kernels(softmax(plan.mask, self.weighted), family_of(plan).rule, plan.gradient)

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
        made = NearPairs(self.q, self.k, self.v, self.share_q, self.share_k, plan.scale, tau)
        made.moments = self.moments
        if self.known is not None:
            made.means, made.sigma = self.known.means[:, : self.known.count], self.known.sigma
            made.others, made.whole = self.known.others, self.known.whole
        return made

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """What queries have [H, groups, n_q, ...], in tiles."""
        return self.of_queries.gather(by_position(x))

    def ordered(self, tiles: torch.Tensor, n_q: int) -> torch.Tensor:
        """The inverse of :meth:`rows`."""
        return by_group(self.of_queries.scatter(tiles, n_q * self.groups), self.groups)

    def some(self, heads: torch.Tensor) -> Layout:
        """The layout of some of the heads."""
        q, k = (Tiles(tiles.index[heads], tiles.valid[heads], tiles.full) for tiles in (self.of_queries, self.of_keys))
        of_q, of_k, known = self.share_q[heads], self.share_k[heads], self.known
        known = None if known is None else known.some(heads)
        moments = {at: self.moments[head] for at, head in enumerate(heads.tolist()) if head in self.moments}
        return Layout(q, k, self.q[heads], self.k[heads], self.v[heads], of_q, of_k, self.groups, known, moments)


def _shares(tiles: Tiles, dtype: torch.dtype) -> torch.Tensor:
    valid = tiles.valid.to(dtype)
    return valid / valid.sum(2, keepdim=True).clamp_min(1)


def _told(x: torch.Tensor, cuts: Sequence[Cut], old: torch.Tensor) -> torch.Tensor:
    """The tiles [H, n] of queries with features x [H, n, f]; none (their number) for those further away from the mean
    of their tile than ``REACH`` times all of the earlier ones in it, with features old [H, A, T, f]."""
    tile, means = descend(x, cuts), old.mean(2)
    reach = REACH**2 * (old - means[:, :, None]).square().sum(3).amax(2)
    away = (x - means.gather(1, tile[..., None].expand_as(x))).square().sum(2)
    return tile.masked_fill(away > reach.gather(1, tile), old.shape[1])


def _known(tiles: Tiles, seats: Seats, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float) -> Known:
    """What is known of the tiles of queries, from earlier ones [H, m, ·]; further tiles have what the whole has."""
    in_tiles = tiles.gather(q)
    means = in_tiles.mean(2)
    delta = in_tiles - means[:, :, None]
    sigma = scale**2 * (delta.mT @ delta) / in_tiles.shape[2]
    sound = torch.isfinite(tiles.gather(lse))
    share = sound.to(q.dtype) / sound.sum(2, keepdim=True).clamp_min(1)
    sums = (tiles.gather(lse).masked_fill(~sound, 0) * share).sum(2).masked_fill(~sound.any(2), -torch.inf)
    outputs = (tiles.gather(out).masked_fill(~sound[..., None], 0) * share[..., None]).sum(2)
    further = seats.further.shape[1] - means.shape[1]
    whole = means.mean(1, keepdim=True)

    def wider(x: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, fill.expand(-1, further, *x.shape[2:])], 1) if further else x

    others = Others(
        wider(sums, sums.new_full((len(sums), 1), -torch.inf)), wider(outputs, torch.zeros_like(outputs[:, :1]))
    )
    return Known(wider(means, whole), wider(sigma, sigma.mean(1, keepdim=True)), others, seats.further, means.shape[1])


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
    """The share of the pairs that were near, [H]."""


def approximate(
    layout: Layout,
    plan: SitePlan,
    tau: torch.Tensor,
    n_q: int,
    values: torch.Tensor,
    near: torch.Tensor | None = None,
) -> TiledForward:
    """The form of a family in tiles in all heads of a layout, with thresholds [H].

    Args:
        values: [H, n_k, ·], the first columns of which are those of the layout.
        near: [H, A, B] bool, which is filled with what is near; None: it is not kept.
    """
    choice, inputs = layout.choice(plan, tau), layout.inputs()
    if values.shape[-1] > layout.v.shape[-1]:
        inputs["V"] = layout.of_keys.gather(values)
    sizes = *layout.q.shape[:2], layout.k.shape[1]
    choice.near = torch.zeros(sizes, dtype=torch.bool, device=layout.q.device) if near is None else near
    choice.shifts = torch.zeros_like(layout.share_q)
    made = run(layout.kernels(plan).forward, inputs, plan, choice)
    lse = made["D"].log() + choice.shifts
    share = choice.near.flatten(1).to(torch.float32).mean(1)
    return TiledForward(layout.ordered(made["O"], n_q), layout.ordered(lse, n_q), share)


def gradients(
    layout: Layout,
    g: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: SitePlan,
    tau: torch.Tensor,
    wanted: Sequence[str],
    n_k: int,
) -> dict[str, torch.Tensor]:
    """Gradients of the heads of a layout by name, grouped: what its pairs add to them.

    Args:
        g: gradient of the output, [H, groups, n_q, e]; out: the output.
        lse: logarithms of the rows' sums, over the keys of other layouts too; where they are not finite a row has no
            gradient.
        tau: thresholds [H].
    """
    n_q = g.shape[2]
    quiet = ~torch.isfinite(lse)
    valid = layout.of_queries.valid
    choice = layout.choice(plan, tau)
    # where a row's sum is not known, an infinite shift leaves it out
    choice.shift = layout.rows(lse.masked_fill(quiet, torch.inf)).masked_fill_(~valid, torch.inf)
    silent = quiet[..., None]
    inputs = {
        **layout.inputs(),
        "G": layout.rows(g.masked_fill(silent, 0)).masked_fill_(~valid[..., None], 0),
        "O": layout.rows(out.masked_fill(silent, 0)),
        "D": torch.ones_like(layout.share_q),
    }
    made = run(layout.kernels(plan).backward(tuple(wanted)), inputs, plan, choice)
    return {
        name: layout.ordered(x, n_q) if name == "dQ" else layout.of_keys.scatter(x, n_k) for name, x in made.items()
    }
