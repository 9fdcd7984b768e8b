"""A low-rank call of a site: with the kept fit, audited where that is due, with a new fit where the kept one fails."""

from __future__ import annotations

import logging

import torch

from polyattn.options import Options
from polyattn.runtime import audit, execute, fitting, saved_fits
from polyattn.runtime.execute import Forward, Setting
from polyattn.runtime.fit import Fit
from polyattn.runtime.guard import Key, SiteState, Ticket

log = logging.getLogger("polyattn")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FAILED_ROWS, DEFAULT_WAIT = 1 / 8, 8
"""The part of a call's rows, computed exactly, from which on a fit is made anew; calls between two fits where no audit
repeats."""


def attempt(
    where: Key, state: SiteState, ticket: Ticket, tensors: Tensors, setting: Setting, options: Options
) -> tuple[Forward | None, Setting, Fit | None]:
    """The low-rank forward of a call, its setting and the fit in it; None for a forward whose audit makes the site
    exact."""
    site, grouped = where.site, execute.grouped(*tensors)
    fit = _kept(where, state, ticket, tensors, setting, options) if options.fits else None
    plain, setting = setting, setting if fit is None else fitting.with_fit(setting, fit)
    made = execute.forward(*grouped, setting)
    errors = _audited(site, ticket, ticket.number, grouped, made, setting, options)
    if fit is not None and _due(state, ticket, fit, options) and not _holds(made, errors, options):
        fit = _anew(site, state, ticket, tensors, plain, options)
        setting = fitting.with_fit(plain, fit)
        made = execute.forward(*grouped, setting)
        errors = _audited(site, ticket, f"{ticket.number}, fitted anew", grouped, made, setting, options)
        with state.lock:
            state.wait = 1 if _holds(made, errors, options) else 2 * state.wait
    if errors is not None and not audit.judge(site, state, ticket, errors, options):
        return None, setting, fit
    if ticket.number is not None:
        with state.lock:
            state.exact_rows += made.exact_rows
    return made, setting, fit


def _audited(
    site: str,
    ticket: Ticket,
    what: object,
    tensors: execute.Grouped,
    made: Forward,
    setting: Setting,
    options: Options,
) -> audit.Errors | None:
    if not ticket.audit:
        return None
    return audit.measure(tensors, made.out, setting, audit.rows(site, what, tensors[0], options))


def _holds(made: Forward, errors: audit.Errors | None, options: Options) -> bool:
    """Whether a fit served its call."""
    few = made.exact_rows <= FAILED_ROWS * made.denominators.numel()
    return few and (errors is None or audit.holds(errors, options))


def _kept(where: Key, state: SiteState, ticket: Ticket, tensors: Tensors, setting: Setting, options: Options) -> Fit:
    """The fit of the call that is run again, or the site's, which the first call makes or takes from a file."""
    if ticket.fit is not None:
        return ticket.fit
    with state.lock:
        if state.fit is None:
            state.fit = saved_fits.taken(where, tensors[1], options)
        if state.fit is None:
            state.fit = fitting.make(where.site, tensors, setting, options, ticket.number, state.fits)
            state.fits += 1
        return state.fit


def _due(state: SiteState, ticket: Ticket, fit: Fit, options: Options) -> bool:
    """Whether a fit that fails may be made anew by this call."""
    if not options.refit or ticket.number is None:
        return False
    return fit.call is None or ticket.number - fit.call >= state.wait * (options.audit_every or DEFAULT_WAIT)


def _anew(site: str, state: SiteState, ticket: Ticket, tensors: Tensors, setting: Setting, options: Options) -> Fit:
    with state.lock:
        state.fit = fitting.make(site, tensors, setting, options, ticket.number, state.fits)
        state.fits += 1
        log.info("polyattn: %s: fitted anew at call %s", site, ticket.number)
        return state.fit
