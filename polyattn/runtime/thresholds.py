"""Thresholds of near pairs: each call checks its own on rows computed exactly, before its output is made (math.md §8).

A head is within its tolerances where few rows of its check err by more than the additive one, and all of them together
by less than the relative one, outputs and, where gradients may be asked for, dQ. A head that is not gets a lower
threshold, at last 0, which is exact attention; one that has room gets a higher one at the next call. The first call of
a site searches: many heads need no near pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from polyattn.codegen import targets
from polyattn.runtime import tile_layout, tiled
from polyattn.runtime.tile_check import Check, Errors
from polyattn.site_plan import SitePlan

ROOM = 0.6
"""A head whose errors are below this part of what it may has room for a higher threshold."""
FIRST_SHARE, LEAST_SHARE, MOST_SHARE = 0.06, 0.01, 0.5
"""Shares of near pairs: what is tried where none are too few, what it is no use to go below, what is too much."""
AIM, STEP, CLOSE, LOOSEN = 0.8, 2.0, 1.5, 0.7
"""The part of the tolerances that a search aims at, the least factor between two shares that are too small, the factor
between a share that holds and one that does not at which a search ends, and the factor of the share from one call to
the next where there is room."""
HOPELESS = 1.2
"""A head that would take so long, in seconds of exact attention, is left to exact attention for some calls."""
PROMISING = 0.7
"""A site, or a block of a causal one, is tried in tiles where it is predicted to take less than this part of it."""
WORTH = 0.95
"""A site is exact where its heads together would take longer than this part of exact attention."""
SEARCH, RETRIES = 5, 3
"""How many thresholds a first call tries, and a later one whose own does not hold."""


Numbers = TypeVar("Numbers", float, torch.Tensor)


def seconds(share: Numbers, plan: SitePlan, n_q: int, n_k: int, dtype: torch.dtype = torch.float32) -> Numbers:
    """Predicted seconds of heads of these shares of near pairs, in those of exact attention.

    Args:
        dtype: in which they are computed.
    """
    costs = targets.of_device(torch.device(plan.device)).tile_costs(plan.differentiated, dtype)
    family = tile_layout.family_of(plan)
    tiles = 1 / family.tile_width(n_q) + 1 / family.tile_width(n_k)
    return share * costs.near + costs.far * tiles + costs.fixed / (n_q * n_k)


def seconds_of_call(share: float, plan: SitePlan, n_q: int, n_k: int) -> float:
    """The same of a call whose blocks have this share of near pairs."""
    cut = tiled.blocks_of(plan, n_q, n_k)
    total = sum(min(1.0, seconds(share, plan, *block.shape)) * block.pairs for block in cut.blocks)
    return (cut.own_pairs + total) / cut.pairs


def worth(share: float, plan: SitePlan) -> int:
    """Tokens of the smallest block that promises to be faster in tiles, a power of two."""
    tokens = 16
    while seconds(share, plan, tokens, tokens) >= PROMISING:
        tokens *= 2
    return tokens


def most(plan: SitePlan, n_q: int, n_k: int, dtype: torch.dtype) -> float:
    """The largest share of near pairs with which a head is faster than exact attention."""
    alone = seconds(0.0, plan, n_q, n_k, dtype)
    return max(LEAST_SHARE, min(MOST_SHARE, (1 - alone) / (seconds(1.0, plan, n_q, n_k, dtype) - alone)))


@dataclass(frozen=True)
class Found:
    """Thresholds for a call and for the next one, by key head, and the errors that the call's were found to have."""

    tau: torch.Tensor
    following: torch.Tensor
    errors: Errors

    def exact_where(self, now: torch.Tensor, following: torch.Tensor) -> Found:
        """The same with heads that are exact in the call, and in the next one."""
        return Found(self.tau.masked_fill(now, 0), self.following.masked_fill(following, 0), self.errors)

    def among(self, heads: torch.Tensor, count: int) -> Found:
        """The same of these heads of so many, the others of which are exact."""
        if len(heads) == count:
            return self
        zero = self.tau.new_zeros(count)

        def wide(x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
            return (zero + fill).index_put((heads,), x.to(zero))

        errors = self.errors
        none = Errors(wide(errors.additive), wide(errors.relative), wide(errors.gradient), wide(errors.share, 1.0))
        return Found(wide(self.tau), wide(self.following), none)


def search(check: Check, most: float) -> Found:
    """Thresholds of a first call: without near pairs where that holds, else with few; 0 where that is not found.

    Errors do not grow as thresholds do, but as the share of the pairs that is far: the search is over shares.

    Args:
        most: the largest share of near pairs that is looked for.
    """
    plan = check.plan
    good, bad = check.means.new_ones(check.heads), check.means.new_zeros(check.heads)
    share, tau = torch.zeros_like(good), torch.full_like(good, torch.inf)
    kept, best = torch.zeros_like(good), check.errors(tau)
    errors, without = best, best.used(plan)
    for left in reversed(range(SEARCH)):
        used = errors.used(plan)
        holds = used <= 1
        if not share.any():
            tau = check.thresholds(share)
        better = holds & (share < good)
        kept, best = torch.where(better, tau, kept), errors.where(better | (kept == 0), best)
        good, bad = torch.where(better, share, good), torch.where(holds, bad, torch.maximum(bad, share))
        settled = (good == 0) | (better & (used > ROOM)) | (good < CLOSE * bad) | (bad >= most)
        if not left or bool(settled.all()):
            break
        needed = bad * (without - AIM) / (without - used).clamp_min(1e-6)  # as if errors fell in a line
        more = torch.maximum(needed, STEP * bad).clamp_max(most)
        more = torch.where(bad > 0, more, min(FIRST_SHARE, most))
        share = torch.where(good == 1, more, (bad.clamp_min(LEAST_SHARE) * good).sqrt())
        tau = torch.where(settled & (kept > 0), kept, check.thresholds(share))
        share = torch.where(settled, good, share)
        errors = check.errors(tau)
    return Found(kept, kept, best)


def again(check: Check, tau: torch.Tensor) -> Found:
    """Thresholds of a later call, from those of the calls before; heads that have none are exact."""
    plan = check.plan
    errors = check.errors(tau)
    used = errors.used(plan)
    good = (used <= 1) | (tau == 0)
    room = (used <= ROOM) & (tau > 0) & (errors.share > LEAST_SHARE)
    following = torch.where(room, torch.maximum(tau, check.thresholds(LOOSEN * errors.share)), tau)
    for _ in range(RETRIES):
        if bool(good.all()):
            break
        more = check.thresholds((1.5 * errors.share + FIRST_SHARE / 2).clamp_max(0.9))
        tau = torch.where(good, tau, torch.minimum(tau, more))
        once_more = check.errors(tau)
        errors = errors.where(good, once_more)
        good = good | (once_more.used(plan) <= 1)
        following = torch.minimum(following, tau)
    return Found(torch.where(good, tau, 0), following, errors)
