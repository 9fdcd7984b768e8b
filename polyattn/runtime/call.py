"""A low-rank call of a site: with the kept fit, audited where that is due, refitted where the kept fit fails."""

from __future__ import annotations

import functools
import logging

import torch

from polyattn.options import Options
from polyattn.rewriter.families.family import Fit
from polyattn.runtime import audit, execute, fits, policy, registry, tiled, tiled_call
from polyattn.runtime.exact import Grouped
from polyattn.runtime.execute import Forward
from polyattn.runtime.registry import CallRecord, Entry
from polyattn.site_plan import SitePlan

log = logging.getLogger("polyattn")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attempt(
    entry: Entry, record: CallRecord, tensors: Tensors, options: Options, keep: torch.Tensor | None = None
) -> tuple[Forward | tiled.Forward | None, SitePlan, Fit | None]:
    """The low-rank forward of a call, its plan and the fit in it; None for a forward whose audit makes the site
    exact.

    Args:
        keep: which keys take part, bool [batch, n_k]; None: all.
    """
    plain = record.plan or entry.state.decision.plan
    if plain.tiled:
        return tiled_call.attempt(entry, record, plain, tensors, options, keep)
    grouped = execute.grouped(*tensors)
    by_head = execute.grouped_keep(keep, tensors[1].shape[1])
    fit = fits.kept(entry, record, tensors, plain, options, keep) if plain.family.fitted else None
    made, plan = _forward(grouped, plain, fit, by_head)
    errors = _audited(entry, record, record.number, grouped, made, plan, options, by_head)
    due = fit is not None and policy.refit_due(entry.state, record.number, fit, options)
    if due and not policy.served(made.exact_rows, made.denominators.numel(), errors, options):
        with entry.fitting:
            fit = fits.anew(entry, record, tensors, plain, options, keep)
        log.info("polyattn: %s: fitted anew at call %s", entry.key.site, record.number)
        made, plan = _forward(grouped, plain, fit, by_head)
        errors = _audited(entry, record, f"{record.number}, fitted anew", grouped, made, plan, options, by_head)
        helped = policy.served(made.exact_rows, made.denominators.numel(), errors, options)
        registry.update(entry, functools.partial(policy.refitted, helped=helped))
    if errors is not None and not audit.judge(entry, record, errors, options):
        if entry.state.low_rank:  # another form
            return attempt(entry, record, tensors, options, keep)
        return None, plan, fit
    if record.number is not None and made.exact_rows:
        rows = made.exact_rows
        registry.update(entry, lambda state: state.counting(exact_rows=state.counters.exact_rows + rows))
    return made, plan, fit


def _forward(tensors: Grouped, plain: SitePlan, fit: Fit | None, keep: torch.Tensor | None) -> tuple[Forward, SitePlan]:
    if fit is None:
        return execute.forward(*tensors, plain, keep=keep), plain
    plan = plain.with_fit(fit)
    return execute.forward(*tensors, plan, fit.values, fit.radius, keep), plan


def _audited(
    entry: Entry,
    record: CallRecord,
    what: object,
    tensors: Grouped,
    made: Forward,
    plan: SitePlan,
    options: Options,
    keep: torch.Tensor | None,
) -> policy.AuditErrors | None:
    if not record.audit:
        return None
    return audit.measure(tensors, made.out, plan, audit.rows(entry.key.site, what, tensors[0], options), keep)
