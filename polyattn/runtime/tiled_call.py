"""A call of a site in tiles: tiles, thresholds checked before the output is made, exact attention where it is cheaper.

There is no verdict for a layer: every head has a threshold of its own in every block of the pairs, and where its near
pairs would take longer than exact attention it is exact. A site becomes exact where all of its heads are, or where they
are together no faster.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field

import torch

from polyattn.codegen import targets
from polyattn.options import Options
from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.tiles.blocks import MOST
from polyattn.rewriter.tiles.family import THRESHOLD
from polyattn.runtime import execute, policy, registry, thresholds, tiled
from polyattn.runtime.policy import AuditErrors
from polyattn.runtime.registry import CallRecord, Entry
from polyattn.runtime.state import HeadState
from polyattn.runtime.thresholds import Found
from polyattn.runtime.tile_check import Check
from polyattn.runtime.tiled import Forward, Step
from polyattn.site_plan import SitePlan

log = logging.getLogger("polyattn")
RECONSIDERED = 32
"""Heads that are exact in a site that is not are tried again every so many calls: a model that trains changes them."""
UNKNOWN = -1.0
"""In the place of a threshold that no call has looked for."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attempt(
    entry: Entry,
    record: CallRecord,
    plan: SitePlan,
    tensors: Tensors,
    options: Options,
    keep: torch.Tensor | None = None,
) -> tuple[Forward | None, SitePlan, Fit | None]:
    """The forward of a call in tiles, its plan and its thresholds; None where the call is exact.

    Args:
        keep: which keys take part, bool [batch, n_k]; None: all.
    """
    grouped, heads = execute.grouped(*tensors), tensors[1].shape[1]
    by_head = execute.grouped_keep(keep, heads)
    if plan.mask.hides and targets.fused_kernel(grouped[0]) is None:
        reason = "torch has no fused attention of these tensors, which causal tiles need beside them"
        registry.update(entry, functools.partial(policy.next_form, options=options, reason=reason))
        return None, plan, None
    call = Call(entry, record, plan, options, heads, grouped[0].new_zeros(heads, MOST))
    made = tiled.forward(grouped, plan, call, by_head, tensors[0].dtype)
    if record.fit is not None:  # a recomputation
        return made, plan, record.fit
    fit = call.kept()
    call.report(made)
    if options.policy == "auto" and call.seconds(tensors[0].shape[2], tensors[1].shape[2]) >= thresholds.WORTH:
        many = int((~call.tau.any(1)).sum())
        reason = f"{many} of {heads} heads have too many near pairs for tiles to be faster"
        registry.update(entry, functools.partial(policy.next_form, options=options, reason=reason))
    return made, plan, fit


@dataclass
class Call:
    """The thresholds of a call, which its checks find block by block, and what they find of its heads."""

    entry: Entry
    record: CallRecord
    plan: SitePlan
    options: Options
    heads: int
    tau: torch.Tensor
    """[heads, blocks]: the thresholds of the call, 0 where a head is exact, and where there is no block."""
    found: dict[int, Found] = field(default_factory=dict)
    """What checks have found, by block."""

    def __call__(self, step: Step) -> torch.Tensor:
        """The thresholds of a block [batch · heads]."""
        self.tau[:, step.number] = self._of(step)
        return self.tau[:, step.number].repeat(len(step.tensors[0]) // self.heads)

    def _of(self, step: Step) -> torch.Tensor:
        at = step.number
        if self.record.fit is not None:
            return self.record.fit.values[:, at].to(self.tau)
        known = self.entry.state.fit
        # a block that no call has had yet is searched as a first call is
        kept = None if known is None or bool((known.values[:, at] < 0).any()) else known.values[:, at].to(self.tau)
        first = THRESHOLD * self.options.tolerance
        if self.options.audit_rows == 0:
            return torch.full_like(self.tau[:, at], first) if kept is None else kept
        number = self.record.number
        if kept is not None and number is not None and number % RECONSIDERED == 0 and not bool(kept.all()):
            kept = None
        low = torch.arange(self.heads, device=self.tau.device) if kept is None else kept.nonzero().squeeze(1)
        if not len(low):  # every head is known to be exact
            return torch.zeros_like(self.tau[:, at])
        every = torch.arange(0, len(step.tensors[0]), self.heads, device=low.device)[:, None] + low
        check = Check(step.some(every.flatten()), len(low), self._generator(at))
        auto, most = self.options.policy == "auto", thresholds.MOST_SHARE
        if auto:
            most = thresholds.most(self.plan, *step.block.shape, self.tau.dtype)
        found = thresholds.search(check, most) if kept is None else thresholds.again(check, kept[low])
        if auto:  # a head that is nearly worth it is asked again by the next call
            seconds = thresholds.seconds(found.errors.share, self.plan, *step.block.shape, self.tau.dtype)
            found = found.exact_where(seconds >= 1, seconds >= thresholds.HOPELESS)
        self.found[at] = found.among(low, self.heads)
        return self.found[at].tau

    def _generator(self, block: int) -> torch.Generator:
        what = self.record.number if block == 0 else f"{self.record.number}, block {block}"
        return torch.Generator().manual_seed(registry.seed(self.options, self.entry.key.site, what))

    def kept(self) -> Fit:
        """The thresholds of the call, for its recomputation; those of the next call are kept in the state."""
        known = self.entry.state.fit
        following = torch.full_like(self.tau, UNKNOWN) if known is None else known.values.to(self.tau).clone()
        for at, found in self.found.items():
            following[:, at] = found.following
        fit = Fit(following, call=self.record.number)
        registry.update(self.entry, functools.partial(policy.thresholds_kept, fit=fit))
        return Fit(self.tau.clone(), call=self.record.number)

    def seconds(self, n_q: int, n_k: int) -> float:
        """Predicted seconds of the call, in those of exact attention."""
        cut = tiled.blocks_of(self.plan, n_q, n_k)
        total = torch.full_like(self.tau[:, 0], cut.own_pairs)
        for at, block in enumerate(cut.blocks):
            if at not in self.found:
                total += block.pairs
                continue
            each = thresholds.seconds(self.found[at].errors.share, self.plan, *block.shape, self.tau.dtype)
            total += torch.where(self.tau[:, at] > 0, each, 1.0) * block.pairs
        return float(total.mean()) / cut.pairs

    def report(self, made: Forward) -> None:
        """What reports say of the call."""
        share, largest = made.share.view(-1, self.heads).mean(0), self.tau.amax(1)
        states = [HeadState(s, t, None, None, None) for s, t in zip(share.tolist(), largest.tolist(), strict=True)]
        if self.found:
            errors = torch.zeros(3, self.heads).to(largest)
            for at, found in self.found.items():
                each = torch.stack([found.errors.additive, found.errors.relative, found.errors.gradient])
                errors = torch.maximum(errors, each.to(errors).masked_fill(self.tau[:, at] == 0, 0))
            numbers = (share.tolist(), largest.tolist(), *errors.tolist())
            states = [HeadState(*values) for values in zip(*numbers, strict=True)]
            if self.record.number is not None and bool(self.tau.any()):
                measured = AuditErrors(float(errors[0].max()), float(errors[1].max()))
                number = self.record.number
                registry.update(self.entry, functools.partial(policy.measured, number=number, errors=measured))
        registry.update(self.entry, functools.partial(policy.heads_seen, heads=tuple(states)))
        if self.record.number is not None and made.exact_rows:
            rows = made.exact_rows
            registry.update(self.entry, lambda state: state.counting(exact_rows=state.counters.exact_rows + rows))
