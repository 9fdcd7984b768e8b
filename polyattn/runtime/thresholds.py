"""Thresholds of near pairs: each call checks its own on rows computed exactly, before its output is made (math.md §8).

Some rows of many tiles are run through the kernels of the call, with all keys, and beside exact attention. A head is
within its tolerances where few of its rows err by more than the additive one, and all of them together by less than the
relative one. A head that is not gets a lower threshold, at last 0, which is exact attention; one that has room gets a
higher one at the next call. The first call of a site searches from a value that is the same for all heads.

Rows are drawn by a generator of polyattn's own, seeded by ``Options.seed``, the site and the number of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from polyattn.rewriter.families.moments import mean_of
from polyattn.rewriter.masks.mask import NONE
from polyattn.rewriter.tiles.family import THRESHOLD
from polyattn.rewriter.tiles.near import Others
from polyattn.runtime import exact, tile_layout, tiled, tiled_block
from polyattn.runtime.exact import ExactSoftmax
from polyattn.runtime.tiled import Step
from polyattn.site_plan import SitePlan

TILES, ROWS, FEW = 16, 16, 4
"""Tiles of a head that are looked at, and rows of each; of few tiles at least so many, else half of them."""
OVER = 0.01
"""The part of the rows that may err by more than the additive tolerance."""
RELATIVE, GRADIENT = 0.8, 0.3
"""Parts of the relative tolerance, and of that of gradients, which a head's relative error must keep: gradients err up
to three times as much as outputs."""
ROOM = 0.6
"""A head whose errors are below this part of what it may has room for a higher threshold."""
AIM, STEP, LOOSEN = 0.85, 10.0, 1.25
"""The part of the tolerances that a search aims at, the largest factor between two thresholds that it tries, and the
factor from one call to the next where there is room."""
HOPELESS = 1.2
"""A head that would take so long, in seconds of exact attention, is left to exact attention for some calls."""
WORTH = 0.95
"""A site is exact where its heads together would take longer than this part of exact attention."""
SEARCH, RETRIES = 4, 3
"""How many thresholds a first call tries, and a later one whose own does not hold."""
NEAR_COST, FAR_COST, FIXED_COST = 2.0, 11.0, 1.2e7
"""Seconds of a near pair, in those of a pair of exact attention; of what tiles cost, in those of exact attention times
1/T_q + 1/T_k; and of what every head costs, in those of so many pairs. Measured with torch code on a CPU, d = 32."""


Numbers = TypeVar("Numbers", float, torch.Tensor)


def seconds(share: Numbers, plan: SitePlan, n_q: int, n_k: int) -> Numbers:
    """Predicted seconds of heads of these shares of near pairs, in those of exact attention."""
    family = tile_layout.family_of(plan)
    tiles = 1 / family.tile_width(n_q) + 1 / family.tile_width(n_k)
    return share * NEAR_COST + FAR_COST * tiles + FIXED_COST / (n_q * n_k)


def seconds_of_call(share: float, plan: SitePlan, n_q: int, n_k: int) -> float:
    """The same of a call whose blocks have this share of near pairs."""
    cut = tiled.blocks_of(plan, n_q, n_k)
    total = sum(min(1.0, seconds(share, plan, *block.shape)) * block.pairs for block in cut.blocks)
    return (cut.own_pairs + total) / cut.pairs


def worth(share: float, plan: SitePlan) -> int:
    """Tokens of the smallest block that is faster in tiles, a power of two."""
    tokens = 16
    while seconds(share, plan, tokens, tokens) >= 1:
        tokens *= 2
    return tokens


@dataclass(frozen=True)
class Errors:
    """What a check measures, for each head."""

    additive: torch.Tensor
    """The row error, in the additive unit, that no more than ``OVER`` of the rows exceed."""
    relative: torch.Tensor
    share: torch.Tensor
    """The share of near pairs."""

    def used(self, plan: SitePlan) -> torch.Tensor:
        """The part of its tolerances that a head uses: at most 1 where it keeps them."""
        family = tile_layout.family_of(plan)
        relative = RELATIVE * family.relative_tolerance
        if plan.differentiated:
            relative = min(relative, GRADIENT * family.gradient_tolerance)
        return torch.maximum(self.additive / family.tolerance, self.relative / relative)

    def within(self, plan: SitePlan, room: float = 1.0) -> torch.Tensor:
        """Which heads keep their tolerances, or a part of them."""
        return self.used(plan) <= room


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
        count = max(min(regular, FEW), min(TILES, regular // 2))
        device = layout.q.device
        order = torch.rand(h, tiles, generator=generator).to(device)[:, :regular]
        order = order.masked_fill(~held.any(2)[:, :regular], -1)  # empty tiles last
        self.tiles = order.argsort(1, descending=True)[:, :count]  # [H, S]
        rows = torch.rand(h, count, width, generator=generator).to(device)
        held = self._of_tiles(held)
        self._some = rows.masked_fill(~held, -1).argsort(2, descending=True)[:, :, : min(ROWS, width)]
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
        self.wanted = self._beside(out.reshape(*shape, v.shape[-1]), lse.reshape(shape))
        v, keep = step.seen, step.seen_keep
        centre = mean_of(v, keep)
        spread = (v - centre).norm(dim=-1)
        spread = spread if keep is None else spread.masked_fill(~keep, 0)
        self.radius = spread.amax(1).clamp_min(torch.finfo(v.dtype).tiny)
        self.around = (self.wanted - centre[:, None]).square().sum(-1)

    def _of_tiles(self, x: torch.Tensor) -> torch.Tensor:
        index = self.tiles.view(*self.tiles.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def _of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[H, A, T, ...] → [H, S, R, ...]"""
        index = self._some.view(*self._some.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
        return self._of_tiles(x).gather(2, index)

    def _beside(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Outputs of the rows over the keys of the block and those that had their turn."""
        return out if self.before is None else tiled_block.merged(*self.before, out, lse)[0]

    def errors(self, tau: torch.Tensor) -> Errors:
        """What thresholds [heads] yield."""
        layout, plan = self.layout, self.plan
        h, count = self.tiles.shape
        mean = self._of_tiles(self.means)[:, :, None]
        q = torch.cat([self.rows, mean], 2)
        share = torch.zeros_like(q[..., 0])
        share[..., -1] = 1  # the mean of a tile is that of all of its rows
        choice = layout.choice(plan, tau.to(q.dtype).repeat(h // self.heads))
        choice.q, choice.share_q, choice.sigma = q, share, self.sigma
        if layout.known is None:
            choice.means = self.means
        else:
            others = layout.known.others
            choice.others = Others(self._of_tiles(others.lse), self._of_tiles(others.out))
            choice.whole = self._of_tiles(layout.known.whole)
        choice.near = q.new_zeros(h, count, layout.k.shape[1], dtype=torch.bool)
        choice.shifts = torch.zeros_like(share)
        inputs = {**layout.inputs(), "Q": q, "W_Q": share}
        inputs["FLOOR"] = inputs["FLOOR"][:, :count]
        found = tile_layout.run(layout.kernels(plan).forward, inputs, plan, choice)
        made = self._beside(found["O"][:, :, :-1], (found["D"].log() + choice.shifts)[:, :, :-1])
        error2 = (made - self.wanted).square().sum(-1)
        row = (error2.sqrt() / self.radius[:, None, None]).masked_fill(~self.valid, 0)
        row = torch.where(torch.isfinite(row), row, torch.inf)
        by_head = self._by_head(row)
        total2, around2 = (self._by_head(x.masked_fill(~self.valid, 0)).sum(1) for x in (error2, self.around))
        seen = self._by_head(self.valid).sum(1)
        allowed = (OVER * seen).long().clamp_max(by_head.shape[1] - 1)
        ranked = by_head.sort(1, descending=True)[0]
        relative = (total2 / around2.clamp_min(torch.finfo(q.dtype).tiny)).sqrt()
        return Errors(
            ranked.gather(1, allowed[:, None])[:, 0],
            torch.where(torch.isfinite(relative), relative, torch.inf),
            self._by_head(choice.near.flatten(1).to(q.dtype)).mean(1),
        )

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """Values of batch elements of one key head together: [batch · heads, ...] → [heads, ...]."""
        return x.reshape(-1, self.heads, x[0].numel()).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Found:
    """Thresholds for a call and for the next one, by key head, and the errors that the call's were found to have."""

    tau: torch.Tensor
    following: torch.Tensor
    errors: Errors

    def exact_where(self, now: torch.Tensor, following: torch.Tensor) -> Found:
        """The same with heads that are exact in the call, and in the next one."""
        return Found(self.tau.masked_fill(now, 0), self.following.masked_fill(following, 0), self.errors)


def search(check: Check, tolerance: float) -> Found:
    """Thresholds of a first call: the largest that are found to hold, 0 where none is."""
    plan = check.plan
    tau = check.means.new_full((check.heads,), THRESHOLD * tolerance)
    low, high = torch.zeros_like(tau), torch.full_like(tau, torch.inf)
    best: Errors | None = None
    for _ in range(SEARCH):
        errors = check.errors(tau)
        used = errors.used(plan)
        good = used <= 1
        low, high = torch.where(good, tau, low), torch.where(good, high, tau)
        best = errors if best is None else _where(good | (low == 0), errors, best)
        guess = tau * (AIM / used.clamp_min(1e-6)).clamp(1 / STEP, STEP)  # errors grow about as thresholds do
        middle = (torch.where(low == 0, high / STEP, low) * torch.where(high.isinf(), low * STEP, high)).sqrt()
        tau = torch.where((guess > low) & (guess < high), guess, middle)
    assert best is not None
    return Found(low, low, best)


def again(check: Check, tau: torch.Tensor) -> Found:
    """Thresholds of a later call, from those of the calls before; heads that have none are exact."""
    plan = check.plan
    errors = check.errors(tau)
    good = errors.within(plan) | (tau == 0)
    room = errors.within(plan, ROOM) & (tau > 0)
    following = torch.where(room, tau * LOOSEN, tau)
    for _ in range(RETRIES):
        if bool(good.all()):
            break
        tau = torch.where(good, tau, tau / 2)
        once_more = check.errors(tau)
        errors = _where(good, errors, once_more)
        good = good | once_more.within(plan)
        following = torch.minimum(following, tau)
    tau = torch.where(good, tau, 0)
    return Found(tau, torch.where(good, following, following / 2), errors)


def _where(which: torch.Tensor, x: Errors, y: Errors) -> Errors:
    pairs = ((x.additive, y.additive), (x.relative, y.relative), (x.share, y.share))
    return Errors(*(torch.where(which, a, b) for a, b in pairs))
