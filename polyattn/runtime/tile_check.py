"""The check of a block in tiles: some rows exactly, beside which thresholds of near pairs are tried (math.md §8).

Some rows of many tiles are run through the kernels of the call, with all keys of the block, and beside exact attention:
their outputs, and where gradients may be asked for dQ of a linear function of them, whose error is the largest of the
three gradients of smooth losses. Rows are drawn by a generator of polyattn's own, seeded by ``Options.seed``, the site
and the number of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyattn.rewriter.families.moments import mean_of
from polyattn.rewriter.masks.mask import NONE
from polyattn.rewriter.tiles.near import NearPairs, Others
from polyattn.runtime import exact, tile_layout, tiled_block
from polyattn.runtime.exact import ExactSoftmax
from polyattn.runtime.tiled import Step
from polyattn.site_plan import SitePlan

ROWS, MOST_TILES, FEWEST_TILES = 256, 32, 4
"""Rows of a head that are looked at, and tiles that they are of: an eighth of all, but no more and no fewer than so
many."""
NORM = 4
"""Tiles whose rows say how large dQ is over all keys that had their turn, where a block has only some of them."""
OVER = 0.01
"""The part of the rows that may err by more than the additive tolerance."""
ABOVE = 1.5
"""The threshold of heads that need no near pairs, in the largest score that was seen."""
PART, GRADIENT_PART = 0.9, 0.8
"""Parts of the relative tolerance and of that of gradients that a head may use in its check."""


@dataclass(frozen=True)
class Errors:
    """What a check measures, for each head."""

    additive: torch.Tensor
    """The row error, in the additive unit, that no more than ``OVER`` of the rows exceed."""
    relative: torch.Tensor
    """The relative error, a standard error over the tiles above what its square is found to be."""
    gradient: torch.Tensor
    """The same of dQ; 0 where gradients are not asked for."""
    share: torch.Tensor
    """The share of near pairs."""

    def used(self, plan: SitePlan) -> torch.Tensor:
        """The part of its tolerances that a head uses: at most 1 where it keeps them."""
        family = tile_layout.family_of(plan)
        relative = self.relative / (PART * family.relative_tolerance)
        gradient = self.gradient / (GRADIENT_PART * family.gradient_tolerance)
        return torch.maximum(self.additive / family.tolerance, torch.maximum(relative, gradient))

    def where(self, which: torch.Tensor, other: Errors) -> Errors:
        """These errors of some heads, and others of the rest."""
        mine = (self.additive, self.relative, self.gradient, self.share)
        rest = (other.additive, other.relative, other.gradient, other.share)
        return Errors(*(torch.where(which, x, y) for x, y in zip(mine, rest, strict=True)))


class Check:
    """Some rows of a block, exactly, beside which thresholds are tried.

    Args:
        step: the block, with what its queries attend to beside it as far as that is known.
        heads: the number of key heads; batch elements of one are judged together.
    """

    def __init__(self, step: Step, heads: int, generator: torch.Generator) -> None:
        self.layout, self.plan, self.heads = step.layout, step.plan, heads
        layout, keep = step.layout, step.keep
        h, tiles, width, d = layout.q.shape
        known, held = layout.known, layout.of_queries.valid
        regular = tiles if known is None else known.count  # pairs of the others are all near
        count = min(regular, max(FEWEST_TILES, min(MOST_TILES, regular // 8)))
        device = layout.q.device
        order = torch.rand(h, tiles, generator=generator).to(device)[:, :regular]
        order = order.masked_fill(~held.any(2)[:, :regular], -1)  # empty tiles last
        self.tiles = order.argsort(1, descending=True)[:, :count]  # [H, S]
        rows = torch.rand(h, count, width, generator=generator).to(device)
        held = self._of_tiles(held)
        self._some = rows.masked_fill(~held, -1).argsort(2, descending=True)[:, :, : min(ROWS // count, width)]
        self.valid = held.gather(2, self._some)
        if keep is not None:
            self.valid &= keep.any(1)[:, None, None]
        self.rows = self._of_rows(layout.q)  # [H, S, R, d]
        if known is None:
            self.means = (layout.share_q[..., None] * layout.q).sum(2)
            delta = self._of_tiles((layout.q - self.means[:, :, None]) * layout.share_q[..., None].sqrt())
            self.sigma = step.plan.scale**2 * (delta.mT @ delta)
        else:
            self.means, self.sigma = known.means, self._of_tiles(known.sigma)
        self.before = None
        if step.before is not None:
            known_out, known_lse = (self._of_rows(layout.rows(x)) for x in step.before)
            self.before = known_out, known_lse
        _, k, v = step.tensors
        out, lse = exact.forward(
            self.rows.reshape(h, 1, -1, d), k[:, None], v[:, None], ExactSoftmax(step.plan.scale, NONE), keep
        )
        shape = self.rows.shape[:3]
        self.wanted, sums = self._beside(out.reshape(*shape, v.shape[-1]), lse.reshape(shape))
        v, keep = step.seen, step.seen_keep
        centre = mean_of(v, keep)
        spread = (v - centre).norm(dim=-1)
        spread = spread if keep is None else spread.masked_fill(~keep, 0)
        self.radius = spread.amax(1).clamp_min(torch.finfo(v.dtype).tiny)
        away = self.wanted - centre[:, None]
        self.around = away.square().sum(-1)
        self.scores = torch.zeros(h, count, layout.k.shape[1], dtype=layout.q.dtype, device=device)
        self._differentiated = step.plan.differentiated
        if self._differentiated:
            mix = torch.randn(v.shape[-1], v.shape[-1], generator=generator, dtype=torch.float64).to(away)
            self.g = (away @ mix).masked_fill(~self.valid[..., None], 0)
            self.dq = self._exact_dq(step.tensors[1], step.tensors[2], sums, step.keep)
            self.size2 = self.dq.square().sum(-1)
            if step.before is not None:
                self.size2 = self._over_all(step, sums)

    def _exact_dq(
        self, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, keep: torch.Tensor | None, tiles: int | None = None
    ) -> torch.Tensor:
        """What keys add to dQ of the rows of some tiles, all or the first, [H, ·, R, d]."""
        some = slice(None, tiles)
        q, g, out, lse = (x[:, some].flatten(1, 2)[:, None] for x in (self.rows, self.g, self.wanted, sums))
        softmax = ExactSoftmax(self.plan.scale, NONE)
        made = tiled_block.exact_gradients(g, (q, k, v), out, lse, softmax, keep)["dQ"]
        return made.reshape(len(made), -1, *self.rows.shape[2:])

    def _over_all(self, step: Step, sums: torch.Tensor) -> torch.Tensor:
        """How large dQ is over all keys that all queries of the block see, ‖dQ‖² in the mean of some rows."""
        k, v, keep = step.seen_k, step.seen, step.seen_keep
        few = self._exact_dq(k, v, sums, keep, NORM).square().sum(-1)
        some = self.valid[:, :NORM]
        mean = few.masked_fill(~some, 0).sum((1, 2)) / some.sum((1, 2)).clamp_min(1)
        return mean[:, None, None].expand_as(self.valid)

    def _of_tiles(self, x: torch.Tensor) -> torch.Tensor:
        index = self.tiles.view(*self.tiles.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def _of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[H, A, T, ...] → [H, S, R, ...]"""
        index = self._some.view(*self._some.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
        return self._of_tiles(x).gather(2, index)

    def _beside(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the rows and logarithms of their sums, over keys of the block and those that had their turn."""
        return (out, lse) if self.before is None else tiled_block.merged(*self.before, out, lse)

    def errors(self, tau: torch.Tensor) -> Errors:
        """What thresholds [heads] yield; leaves ``scores`` of the pairs of tiles that were looked at."""
        layout, plan = self.layout, self.plan
        count = self.tiles.shape[1]
        mean = self._of_tiles(self.means)[:, :, None]
        q = torch.cat([self.rows, mean], 2)
        share = torch.zeros_like(q[..., 0])
        share[..., -1] = 1  # the mean of a tile is that of all of its rows
        choice = self._choice(q, share, tau)
        choice.near = torch.zeros_like(self.scores, dtype=torch.bool)
        choice.scores, choice.shifts = self.scores, torch.zeros_like(share)
        inputs = {**layout.inputs(), "Q": q, "W_Q": share}
        inputs["FLOOR"] = inputs["FLOOR"][:, :count]
        found = tile_layout.run(layout.kernels(plan).forward, inputs, plan, choice)
        block, lse = found["O"][:, :, :-1], (found["D"].log() + choice.shifts)[:, :, :-1]
        made, sums = self._beside(block, lse)
        error2 = (made - self.wanted).square().sum(-1)
        row = (error2.sqrt() / self.radius[:, None, None]).masked_fill(~self.valid, 0)
        row = torch.where(torch.isfinite(row), row, torch.inf)
        by_head = self._by_head(row)
        seen = self._by_head(self.valid).sum(1)
        allowed = (OVER * seen).long().clamp_max(by_head.shape[1] - 1)
        ranked = by_head.sort(1, descending=True)[0]
        gradient = torch.zeros_like(ranked[:, 0])
        if self._differentiated:
            again = self._choice(q, share, tau)
            again.shift = torch.nn.functional.pad(
                sums.masked_fill(~(self.valid & torch.isfinite(sums)), torch.inf), (0, 1), value=torch.inf
            )
            rows = {"G": self.g, "O": made.masked_fill(~torch.isfinite(made), 0)}
            inputs |= {name: torch.nn.functional.pad(x, (0, 0, 0, 1)) for name, x in rows.items()}
            inputs["D"] = torch.ones_like(share)
            dq = tile_layout.run(layout.kernels(plan).backward(("dQ",)), inputs, plan, again)["dQ"][:, :, :-1]
            gradient = self._relative((dq - self.dq).square().sum(-1), self.size2)
        near = self._by_head(choice.near.flatten(1).to(q.dtype)).mean(1)
        return Errors(ranked.gather(1, allowed[:, None])[:, 0], self._relative(error2, self.around), gradient, near)

    def _choice(self, q: torch.Tensor, share: torch.Tensor, tau: torch.Tensor) -> NearPairs:
        """The choice of near pairs of the rows [H, S, R + 1, d]."""
        layout = self.layout
        made = layout.choice(self.plan, tau.to(q.dtype).repeat(len(q) // self.heads))
        made.q, made.share_q, made.sigma = q, share, self.sigma
        if layout.known is None:
            made.means = self.means
        else:
            others = layout.known.others
            made.others = Others(self._of_tiles(others.lse), self._of_tiles(others.out))
            made.whole = self._of_tiles(layout.known.whole)
        return made

    def _relative(self, error2: torch.Tensor, size2: torch.Tensor) -> torch.Tensor:
        """Errors relative to sizes, from squares [H, S, R] of both: [heads]; inf where they are not finite."""
        error, size = (self._by_head(x.masked_fill(~self.valid, 0).sum(2)) for x in (error2, size2))  # [heads, tiles]
        whole, tiles = size.sum(1).clamp_min(torch.finfo(size.dtype).tiny), error.shape[1]
        ratio = error.sum(1) / whole
        spread = (error - ratio[:, None] * size).square().sum(1) * (tiles / max(tiles - 1, 1))
        made = (ratio + spread.sqrt() / whole).sqrt()
        return torch.where(torch.isfinite(made), made, torch.inf)

    def thresholds(self, share: torch.Tensor) -> torch.Tensor:
        """The thresholds at which so large a share of the pairs that were looked at is near, [heads]; where it is 0,
        one that is above all of them, so that pairs that are like none of them are near."""
        ranked = self._by_head(self.scores).sort(1, descending=True)[0]
        last = ranked.shape[1] - 1
        at = (share * ranked.shape[1]).long().clamp(0, last)
        made = ranked.gather(1, at[:, None])[:, 0]
        made = torch.where(share > 0, made, ABOVE * made)
        return made.clamp(torch.finfo(made.dtype).tiny, 1 / torch.finfo(made.dtype).tiny)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """Values of batch elements of one key head together: [batch · heads, ...] → [heads, ...]."""
        return x.reshape(-1, self.heads, x[0].numel()).transpose(0, 1).flatten(1)
