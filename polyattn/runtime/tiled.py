"""Attention in tiles of a call's tensors, a block of its pairs after the other.

Without a mask all pairs are one block. Under a causal mask the pairs inside of segments are exact, and all earlier ones
come in blocks without a mask (:mod:`polyattn.rewriter.tiles.blocks`), whose tiles of queries are those of earlier
queries, so that nothing about a query depends on later tokens.

What a forward hands to its backward beside the output are logarithms of the rows' sums (−inf for rows computed exactly,
inf for rows that see no key) and the thresholds; tiles and near pairs are found again, from the same tensors. Tensors
are grouped as in :mod:`polyattn.runtime.tile_layout`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.tiles.blocks import MOST, Block, Blocks
from polyattn.runtime import exact, segments, tile_layout, tiled_block
from polyattn.runtime.exact import ExactSoftmax, Grouped
from polyattn.runtime.tile_layout import Layout, Past
from polyattn.site_plan import SitePlan


def blocks_of(plan: SitePlan, n_q: int, n_k: int) -> Blocks:
    """The blocks of a call; under a causal mask none where it is short, or where queries and keys are not the same."""
    if not plan.mask.hides:
        return Blocks.whole(n_q, n_k)
    return Blocks.of(n_q, plan.chunk if n_q == n_k else n_q)


@dataclass(frozen=True)
class Step:
    """A block of a call when its turn comes."""

    number: int
    block: Block
    tensors: Grouped
    """Those of the block."""
    keep: torch.Tensor | None
    plan: SitePlan
    seen: torch.Tensor
    """Values that all of its queries see, beside others: [H, n, e]."""
    seen_k: torch.Tensor
    """Their keys."""
    seen_keep: torch.Tensor | None
    past: Past | None = None
    """Queries before those of the block; None: there is no order of tokens."""
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    """Outputs and logarithms of sums of its queries over keys that had their turn; None: there are none."""

    _parts: list[tuple[torch.Tensor, Step]] = field(default_factory=list)
    """Steps of some of the heads, whose tiles serve this one too."""

    @functools.cached_property
    def layout(self) -> Layout:
        """Tiles of all heads."""
        if self.past is None:
            return Layout.of(self.tensors, self.plan, self.keep)
        return Layout.after(self.past, self.tensors, self.plan, self.keep)

    def some(self, heads: torch.Tensor) -> Step:
        """The same of some heads, in order."""
        if len(heads) == len(self.tensors[0]):
            return self
        found = next((step for known, step in self._parts if torch.equal(known, heads)), None)
        if found is not None:
            return found

        def of(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[heads]

        made = dataclasses.replace(
            self,
            tensors=(self.tensors[0][heads], self.tensors[1][heads], self.tensors[2][heads]),
            keep=of(self.keep),
            seen=self.seen[heads],
            seen_k=self.seen_k[heads],
            seen_keep=of(self.seen_keep),
            past=None if self.past is None else Past(*(x[heads] for x in self.past)),
            before=None if self.before is None else (self.before[0][heads], self.before[1][heads]),
            _parts=[],
        )
        self._parts.append((heads, made))
        return made

    def layouts(self, heads: torch.Tensor) -> Layout:
        """Tiles of some heads, in order: some of those that are there, where there are any."""
        if len(heads) == len(self.tensors[0]) or "layout" in self.__dict__:
            return self.layout if len(heads) == len(self.tensors[0]) else self.layout.some(heads)
        for known, step in self._parts:
            at = torch.searchsorted(known, heads).clamp_max(len(known) - 1)
            if torch.equal(known[at], heads):
                return step.layouts(at)
        return self.some(heads).layout


Thresholds = Callable[[Step], torch.Tensor]
"""The thresholds [H] of a block."""


def kept(tau: torch.Tensor) -> Thresholds:
    """Thresholds [H, blocks] that are known."""
    return lambda step: tau[:, step.number]


@dataclass(frozen=True)
class Forward:
    """The output of grouped tensors, what its backward reads, and what is known of its heads."""

    out: torch.Tensor
    denominators: torch.Tensor
    """Logarithms of the rows' sums: −inf for rows computed exactly, inf for rows that see no key."""
    exact_rows: int
    tau: torch.Tensor
    """[H, blocks]: the thresholds of each head, 0 where it was exact, and where there is no block."""
    share: torch.Tensor
    """[H]: the share of the visible pairs that was computed exactly."""

    def packed(self, fit: Fit) -> torch.Tensor:
        """What the operator hands to its backward: the thresholds of each batch element, 0 where it was exact."""
        return self.tau.clone()


def sound(tensors: Grouped) -> tuple[Grouped, torch.Tensor]:
    """The tensors with zeros in place of heads with numbers that are not finite, and which heads are others, [H]."""
    fine = torch.stack([torch.isfinite(x.flatten(1).sum(1)) for x in tensors]).all(0)
    if bool(fine.all()):
        return tensors, fine
    q, k, v = (x.masked_fill(~fine.view(-1, *[1] * (x.ndim - 1)), 0) for x in tensors)
    return (q, k, v), fine


def forward(
    tensors: Grouped,
    plan: SitePlan,
    thresholds: Thresholds,
    keep: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    values: torch.Tensor | None = None,
) -> Forward:
    """The form in tiles where a head's threshold is positive, exact attention elsewhere.

    Heads with numbers that are not finite are exact.

    Args:
        keep: which keys take part, bool [H, n_k]; None: all. A row that sees no key is 0.
        dtype: that in which the output will be kept for the backward; None: its own.
        values: the values whose outputs are wanted, the first columns of which are those of the tensors; None: those.
    """
    given, (tensors, fine) = tensors, sound(tensors)
    q, k, v = tensors
    n, e = q.shape[2], v.shape[-1]
    values = v if values is None else values.masked_fill(~fine[:, None, None], 0)
    cut = blocks_of(plan, n, k.shape[1])
    out, lse = q.new_empty(0), q.new_empty(0)
    if cut.segment:
        out, lse = _segments((q, k, values), plan, cut, keep)
    bad = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    taus = q.new_zeros(len(q), MOST)
    counted = torch.full_like(taus[:, 0], cut.own_pairs)
    for number, block in enumerate(cut.blocks):
        past = before = None
        if cut.segment:
            sums = lse.masked_fill(bad, -torch.inf)[:, :, block.keys]
            outputs = out[:, :, block.keys, :e]
            past = Past(q[:, :, block.keys], outputs if dtype is None else outputs.to(dtype).to(q.dtype), sums)
            before = out[:, :, block.queries], lse[:, :, block.queries]
        step = _step(number, block, tensors, plan, keep, past, before)
        tau = torch.where(fine, thresholds(step).to(q.dtype), 0)
        theirs = None if values is v else values[:, block.keys]
        made = tiled_block.forward(step.tensors, plan, tau, step.keep, step.layouts, theirs)
        taus[:, number] = made.tau
        counted = counted + made.share * block.pairs
        if before is None:
            out, lse, bad = made.out, made.lse, made.bad
            continue
        out[:, :, block.queries], lse[:, :, block.queries] = tiled_block.merged(*before, made.out, made.lse)
        bad[:, :, block.queries] |= made.bad
    rows = exact.write_rows(out, bad, (q, k, values), plan, keep)
    lse = lse.masked_fill(lse.isneginf(), torch.inf).masked_fill(bad, -torch.inf)
    if not bool(fine.all()):
        odd = (~fine).nonzero().squeeze(1)
        wide = torch.nn.functional.pad(given[2][odd], (0, values.shape[-1] - e))  # of other values nothing is known
        out[odd], lse[odd] = _exact((given[0][odd], given[1][odd], wide), plan, None if keep is None else keep[odd])
    return Forward(out, lse, rows, taus, counted / cut.pairs)


def _step(
    number: int,
    block: Block,
    tensors: Grouped,
    plan: SitePlan,
    keep: torch.Tensor | None,
    past: Past | None,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Step:
    q, k, v = tensors
    some, until = (q[:, :, block.queries], k[:, block.keys], v[:, block.keys]), block.keys.stop
    of_block, of_all = (None, None) if keep is None else (keep[:, block.keys], keep[:, :until])
    return Step(number, block, some, of_block, plan, v[:, :until], k[:, :until], of_all, past, before)


def _segments(
    tensors: Grouped, plan: SitePlan, cut: Blocks, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and logarithms of sums over keys of the rows' own segments, or over all of one that is not cut."""
    if cut.blocks:
        return segments.forward(tensors, plan.scale, cut.segment, keep)
    out, lse = _exact(tensors, plan, keep)
    return out, lse.masked_fill(lse.isposinf(), -torch.inf)


def _exact(tensors: Grouped, plan: SitePlan, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention under the plan's mask; the logarithms of sums are inf where a row sees no key."""
    q, k, v = tensors
    out, lse = exact.forward(q, k[:, None], v[:, None], ExactSoftmax(plan.scale, plan.mask.exact), keep)
    if keep is None:
        return out, lse
    lost = (plan.mask.sums_of(keep.to(q.dtype), q.shape[2]) == 0)[:, None].expand_as(lse)
    return out.masked_fill(lost[..., None], 0), lse.masked_fill(lost, torch.inf)


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
        tau: the thresholds that it used, [H, blocks].
    """
    names = [name for name in ("dQ", "dK", "dV") if name in wanted]
    low, high = tau.any(1).nonzero().squeeze(1), (~tau.any(1)).nonzero().squeeze(1)
    if not len(high):
        return _in_tiles(g, tensors, out, lse, plan, tau, names, keep)
    result = {name: torch.empty_like(x) for name, x in zip(("dQ", "dK", "dV"), tensors, strict=True) if name in names}
    for heads in (low, high):
        if not len(heads):
            continue
        some, theirs = (tensors[0][heads], tensors[1][heads], tensors[2][heads]), None if keep is None else keep[heads]
        rest = g[heads], some, out[heads], lse[heads]
        if heads is low:
            made = _in_tiles(*rest, plan, tau[heads], names, theirs)
        else:
            made = tiled_block.exact_gradients(*rest, ExactSoftmax(plan.scale, plan.mask.exact), theirs)
        for name, like in result.items():
            like[heads] = made[name]
    return result


def _in_tiles(
    g: torch.Tensor,
    tensors: Grouped,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: SitePlan,
    tau: torch.Tensor,
    names: Sequence[str],
    keep: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Gradients of heads of which some block is in tiles."""
    q, k, _ = tensors
    cut = blocks_of(plan, q.shape[2], k.shape[1])
    result: dict[str, torch.Tensor] = {}
    if cut.segment:
        inside = segments.gradients(g, tensors, out, lse, plan.scale, cut.segment, keep)
        result = {name: inside[name] for name in names}
    for number, block in enumerate(cut.blocks):
        past = Past(*(x[:, :, block.keys] for x in (q, out, lse))) if cut.segment else None
        step = _step(number, block, tensors, plan, keep, past)
        rows = g[:, :, block.queries], step.tensors, out[:, :, block.queries], lse[:, :, block.queries]
        made = tiled_block.gradients(*rows, plan, tau[:, number], names, step.keep, step.layouts)
        if not cut.segment:
            result = made
            continue
        for name, x in made.items():
            total = result[name][:, :, block.queries] if name == "dQ" else result[name][:, block.keys]
            total += x
    exact.add_row_gradients(result, lse.isneginf(), tensors, g, plan, keep)
    return result


def near_pairs(
    tensors: Grouped, plan: SitePlan, tau: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Which pairs of tiles of the largest block are near, bool [H, tiles of queries, tiles of keys]; all where a
    threshold is 0, None where there is no block."""
    blocks = blocks_of(plan, tensors[0].shape[2], tensors[1].shape[1]).blocks
    if not blocks:
        return None
    largest = max(range(len(blocks)), key=lambda at: blocks[at].pairs)
    found: list[torch.Tensor] = []

    def thresholds(step: Step) -> torch.Tensor:
        if step.number == largest:
            layout, mine = step.layout, tau[:, step.number]
            near = torch.zeros(*layout.q.shape[:2], layout.k.shape[1], dtype=torch.bool, device=mine.device)
            tile_layout.approximate(layout, plan, mine, step.tensors[0].shape[2], step.tensors[2], near)
            found.append(near | (mine == 0)[:, None, None])
        return tau[:, step.number]

    forward(tensors, plan, thresholds, keep)
    return found[0]


def for_values(
    tensors: Grouped, values: torch.Tensor, plan: SitePlan, tau: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """What the forward of a call makes of other values [H, n_k, c] with its own tiles and near pairs: it is linear in
    them, [H, groups, n_q, c]."""
    both = torch.cat([tensors[2], values], 2)
    return forward(tensors, plan, kept(tau), keep, values=both).out[..., tensors[2].shape[-1] :]
