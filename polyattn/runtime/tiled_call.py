"""A call of a site in tiles: tiles, thresholds checked before the output is made, exact attention where it is cheaper.

There is no verdict for a layer: every head has a threshold of its own, and a head whose near pairs would take longer
than exact attention is exact. A site becomes exact where all of its heads are, or where they are together no faster.
"""

from __future__ import annotations

import functools
import logging

import torch

from polyattn.options import Options
from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.tiles.family import THRESHOLD
from polyattn.runtime import execute, policy, registry, thresholds, tiled
from polyattn.runtime.policy import AuditErrors
from polyattn.runtime.registry import CallRecord, Entry
from polyattn.runtime.state import HeadState
from polyattn.runtime.thresholds import Check, Found
from polyattn.runtime.tiled import Forward, Layout
from polyattn.site_plan import SitePlan

log = logging.getLogger("polyattn")
RECONSIDERED = 32
"""Heads that are exact in a site that is not are tried again every so many calls: a model that trains changes them."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attempt(
    entry: Entry,
    record: CallRecord,
    plan: SitePlan,
    tensors: Tensors,
    options: Options,
    keep: torch.Tensor | None = None,
) -> tuple[Forward | None, SitePlan, Fit | None]:
    """The forward of a call in tiles, its plan and its thresholds; None where the site becomes exact.

    Args:
        keep: which keys take part, bool [batch, n_k]; None: all.
    """
    grouped, heads = execute.grouped(*tensors), tensors[1].shape[1]
    batch = tensors[0].shape[0]
    by_head = execute.grouped_keep(keep, heads)
    if record.fit is not None:  # a recomputation
        tau = record.fit.values[:, 0].to(grouped[0])
        return tiled.forward(*grouped, plan, tau.repeat(batch), by_head), plan, record.fit
    known = entry.state.fit
    if options.audit_rows == 0:
        tau = grouped[0].new_full((heads,), THRESHOLD * options.tolerance) if known is None else known.values[:, 0]
        made = tiled.forward(*grouped, plan, tau.repeat(batch), by_head)
        _record(entry, record, made, None, tau, heads)
        return made, plan, _kept(entry, record, tau, tau, None)
    layout = Layout.of(grouped, plan, by_head)
    found = _thresholds(entry, record, Check(grouped, layout, plan, heads, by_head, _generator(entry, record, options)))
    tau, following = found.tau, found.following
    seconds = thresholds.seconds(found.errors.share, plan, tensors[0].shape[2], tensors[1].shape[2])
    if options.policy == "auto":  # a head that is nearly worth it is asked again by the next call
        tau = tau.masked_fill(seconds >= 1, 0)
        following = following.masked_fill(seconds >= thresholds.HOPELESS, 0)
    fit = _kept(entry, record, tau, following, found)
    if options.policy == "auto":
        whole = torch.where(tau > 0, found.errors.share, 1.0)
        total = thresholds.seconds(whole, plan, tensors[0].shape[2], tensors[1].shape[2])
        if float(torch.where(tau > 0, total, 1.0).mean()) >= thresholds.WORTH:
            many = int((tau == 0).sum())
            reason = f"{many} of {heads} heads have too many near pairs for tiles to be faster"
            registry.update(entry, functools.partial(policy.next_form, options=options, reason=reason))
            return None, plan, fit
    made = tiled.forward(*grouped, plan, tau.repeat(batch), by_head, layout)
    _record(entry, record, made, found, tau, heads)
    return made, plan, fit


def _generator(entry: Entry, record: CallRecord, options: Options) -> torch.Generator:
    return torch.Generator().manual_seed(registry.seed(options, entry.key.site, record.number))


def _thresholds(entry: Entry, record: CallRecord, check: Check) -> Found:
    """What the call's check finds; the first call of a site searches."""
    known = entry.state.fit
    if known is None:
        return thresholds.search(check, tiled.family_of(check.plan).tolerance)
    tau, family = known.values[:, 0].to(check.means), tiled.family_of(check.plan)
    if record.number is not None and record.number % RECONSIDERED == 0:
        tau = torch.where(tau == 0, THRESHOLD * family.tolerance, tau)
    return thresholds.again(check, tau)


def _kept(entry: Entry, record: CallRecord, tau: torch.Tensor, following: torch.Tensor, found: Found | None) -> Fit:
    """The thresholds of the call, for its recomputation; those of the next call are kept in the state."""
    registry.update(
        entry, functools.partial(policy.thresholds_kept, fit=Fit(following[:, None].clone(), call=record.number))
    )
    return Fit(tau[:, None].clone(), call=record.number)


def _record(
    entry: Entry, record: CallRecord, made: Forward, found: Found | None, tau: torch.Tensor, heads: int
) -> None:
    """What reports say of the call."""
    share = made.share.view(-1, heads).mean(0).tolist()
    if found is None:
        states = tuple(HeadState(s, t, None, None) for s, t in zip(share, tau.tolist(), strict=True))
    else:
        exact = tau == 0
        errors = found.errors.additive.masked_fill(exact, 0), found.errors.relative.masked_fill(exact, 0)
        numbers = (share, tau.tolist(), errors[0].tolist(), errors[1].tolist())
        states = tuple(HeadState(*values) for values in zip(*numbers, strict=True))
        if record.number is not None:
            measured = AuditErrors(float(errors[0].max()), float(errors[1].max()))
            registry.update(entry, functools.partial(policy.measured, number=record.number, errors=measured))
    registry.update(entry, functools.partial(policy.heads_seen, heads=states))
    if record.number is not None and made.exact_rows:
        rows = made.exact_rows
        registry.update(entry, lambda state: state.counting(exact_rows=state.counters.exact_rows + rows))
