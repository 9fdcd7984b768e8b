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
from polyattn.runtime import exact, tiled
from polyattn.runtime.exact import ExactSoftmax, Grouped
from polyattn.runtime.tiled import Layout
from polyattn.site_plan import SitePlan

TILES, ROWS = 16, 16
"""Tiles of a head that are looked at, and rows of each."""
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
    family = tiled.family_of(plan)
    tiles = 1 / family.tile_width(n_q) + 1 / family.tile_width(n_k)
    return share * NEAR_COST + FAR_COST * tiles + FIXED_COST / (n_q * n_k)


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
        family = tiled.family_of(plan)
        relative = min(RELATIVE * family.relative_tolerance, GRADIENT * family.gradient_tolerance)
        return torch.maximum(self.additive / family.tolerance, self.relative / relative)

    def within(self, plan: SitePlan, room: float = 1.0) -> torch.Tensor:
        """Which heads keep their tolerances, or a part of them."""
        return self.used(plan) <= room


class Check:
    """Some rows of a call, exactly, beside which thresholds are tried.

    Args:
        layout: the tiles of the call's heads.
        heads: the number of key heads; batch elements of one are judged together.
    """

    def __init__(
        self,
        tensors: Grouped,
        layout: Layout,
        plan: SitePlan,
        heads: int,
        keep: torch.Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.layout, self.plan, self.heads = layout, plan, heads
        h, tiles, width, d = layout.q.shape
        count = max(1, min(TILES, tiles // 2))
        device = layout.q.device
        order = torch.rand(h, tiles, generator=generator).to(device)
        order = order.masked_fill(~layout.of_queries.valid.any(2), -1)  # empty tiles last
        self.tiles = order.argsort(1, descending=True)[:, :count]  # [H, S]
        rows = torch.rand(h, count, width, generator=generator).to(device)
        held = self._of_tiles(layout.of_queries.valid)
        rows = rows.masked_fill(~held, -1).argsort(2, descending=True)[:, :, : min(ROWS, width)]
        self.valid = held.gather(2, rows)
        if keep is not None:
            self.valid &= keep.any(1)[:, None, None]
        q = self._of_tiles(layout.q)
        self.rows = q.gather(2, rows[..., None].expand(-1, -1, -1, d))  # [H, S, R, d]
        means = (layout.share_q[..., None] * layout.q).sum(2)
        delta = (layout.q - means[:, :, None]) * layout.share_q[..., None].sqrt()
        self.means = means
        of_tiles = self._of_tiles(delta)
        self.sigma = plan.scale**2 * (of_tiles.mT @ of_tiles)
        _, k, v = tensors
        kernel = exact.forward(
            self.rows.reshape(h, 1, -1, d), k[:, None], v[:, None], ExactSoftmax(plan.scale, NONE), keep
        )
        self.wanted = kernel[0].reshape(*self.rows.shape[:3], v.shape[-1])
        centre = mean_of(v, keep)
        spread = (v - centre).norm(dim=-1)
        spread = spread if keep is None else spread.masked_fill(~keep, 0)
        self.radius = spread.amax(1).clamp_min(torch.finfo(v.dtype).tiny)
        self.around = (self.wanted - centre[:, None]).square().sum(-1)

    def _of_tiles(self, x: torch.Tensor) -> torch.Tensor:
        index = self.tiles.view(*self.tiles.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def errors(self, tau: torch.Tensor) -> Errors:
        """What thresholds [heads] yield."""
        layout, plan = self.layout, self.plan
        h, count = self.tiles.shape
        mean = self._of_tiles(self.means)[:, :, None]
        q = torch.cat([self.rows, mean], 2)
        share = torch.zeros_like(q[..., 0])
        share[..., -1] = 1  # the mean of a tile is that of all of its rows
        choice = layout.choice(plan, tau.to(q.dtype).repeat(h // self.heads))
        choice.q, choice.share_q, choice.means, choice.sigma = q, share, self.means, self.sigma
        choice.near = q.new_zeros(h, count, layout.k.shape[1], dtype=torch.bool)
        inputs = {**layout.inputs(), "Q": q, "W_Q": share}
        inputs["FLOOR"] = inputs["FLOOR"][:, :count]
        made = tiled.run(layout.kernels(plan).forward, inputs, plan, choice)["O"][:, :, :-1]
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
