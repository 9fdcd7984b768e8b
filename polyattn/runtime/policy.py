"""Policy: pure functions that decide, count and judge; each takes a state and returns a new one (math.md §5).

Under ``policy="auto"`` a failed audit makes a site exact from that call on, until :func:`polyattn.reset`: to try again
it would have to run the low-rank form beside the exact one, in vain as long as nothing has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import sympy

from polyattn.options import Options
from polyattn.passes.derive.forms import Form, softmax
from polyattn.passes.derive.kernels import exact_cost, kernels
from polyattn.passes.match.site import Site
from polyattn.rewriter.algebra.tensor import N_K, NEAR_SHARE
from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.masks.mask import NONE, Mask
from polyattn.rewriter.rules.rule import ApproximateRule
from polyattn.rewriter.tiles.family import TYPICAL_SHARE
from polyattn.runtime import thresholds, tile_layout
from polyattn.runtime.state import Audit, Decision, HeadState, SiteState, Verdict
from polyattn.site_plan import SitePlan

FAILED_ROWS, DEFAULT_WAIT = 1 / 8, 8
"""The part of a call's rows, computed exactly, from which on features are fitted anew; calls between two fits where no
audit repeats."""
SEGMENT = 8
"""Tiles of a segment under a causal mask, where a form in tiles is asked for whatever it costs."""


class AuditErrors(NamedTuple):
    """What an audit measures: the worst row's error in the additive unit, and the relative one."""

    additive: float
    relative: float


# -- the decision ----------------------------------------------------------------------------------------------------


def _exact_cost(mask: Mask) -> sympy.Expr:
    """FLOPs per head of exact attention under a mask, in symbols."""
    return sympy.expand(exact_cost(softmax(mask.exact)) * mask.share)


@functools.cache
def symbolic_costs(
    form: Form, rule: ApproximateRule, gradient: str, projected_values: bool = False
) -> tuple[sympy.Expr, sympy.Expr]:
    """FLOPs per head, forward and backward, of exact attention and of the low-rank plan, in the rule's symbols."""
    after = kernels(form, rule, gradient).cost(projected_values)
    return _exact_cost(form.mask), sympy.expand(after * form.mask.share) if form.mask.tiled else after


def costs(shape: Mapping[str, int], plan: SitePlan) -> tuple[int, int]:
    """The same as numbers, for all heads; outlier keys are counted as exact attention over so many keys."""
    values = plan.sizes(shape)
    heads = shape["batch"] * shape["kv_heads"]
    before, after = _symbolic(plan)
    outliers = min(plan.outliers.total, shape["n_k"])
    columns = exact_cost(softmax(NONE)).subs(values | {N_K: outliers}) if outliers else 0
    return int(before.subs(values)) * heads, int(after.subs(values) + columns) * heads


def _symbolic(plan: SitePlan) -> tuple[sympy.Expr, sympy.Expr]:
    return symbolic_costs(plan.form, plan.family.rule, plan.gradient, plan.projection.values > 0)


def decide(shape: Mapping[str, int], plan: SitePlan, options: Options, others: tuple[SitePlan, ...] = ()) -> SiteState:
    """The state of a site before its first call, by policy and cost; the audit comes after the first forward.

    Args:
        others: forms that are tried where this one costs too much.
    """
    first = _decide(shape, plan, options)
    if options.policy != "auto":
        return first
    state = first
    while not state.low_rank and others:
        (plan, *_), others = others, others[1:]
        state = _decide(shape, plan, options)
    if not state.low_rank:
        return first
    return dataclasses.replace(state, decision=dataclasses.replace(state.decision, others=others))


def _decide(shape: Mapping[str, int], plan: SitePlan, options: Options) -> SiteState:
    """The state of a site with one form; nothing is derived where sizes and device tell that it is exact."""
    verdict: Verdict = "low_rank"
    why = plan.refusal
    if not why and plan.tiled:
        plan, why = _in_tiles(shape, plan, options)
    if why:
        whole = _exact_cost(plan.mask)
        before = int(whole.subs(plan.sizes(shape))) * shape["batch"] * shape["kv_heads"]
        reason = "policy='exact'" if options.policy == "exact" else why
        decision = Decision("exact", reason, plan, dict(shape), before, before, whole, whole, seen=plan.seen)
        return SiteState(decision, guarantee="exact")
    before, after = costs(shape, plan)
    symbolic = _symbolic(plan)
    if options.policy == "exact":
        verdict, reason = "exact", "policy='exact'"
    elif options.policy == "low_rank":
        reason = "policy='low_rank'"
    elif options.audit_rows == 0:
        verdict, reason = "exact", "policy='auto' needs an audit, and audit_rows=0"
    elif after >= before:
        verdict, reason = "exact", f"low rank costs {after / before:.2f} times exact attention at this length"
    else:
        reason = f"low rank costs {after / before:.2f} times exact attention"
    decision = Decision(verdict, reason, plan, dict(shape), before, after, *symbolic, seen=plan.seen)
    state = SiteState(decision)
    return state if verdict == "low_rank" else become_exact(state, reason)


def _in_tiles(shape: Mapping[str, int], plan: SitePlan, options: Options) -> tuple[SitePlan, str]:
    """The plan of a site in tiles with the length of its segments, and why it is exact; empty where it is not."""
    n_q, n_k = shape["n_q"], shape["n_k"]
    if plan.mask.hides:
        if n_q != n_k:
            return plan, f"a causal mask on {n_q} queries and {n_k} keys has no form in tiles"
        if not plan.chunk:
            width = tile_layout.family_of(plan).tile_width(n_q)
            least = thresholds.worth(TYPICAL_SHARE, plan) if options.policy == "auto" else SEGMENT * width
            plan = dataclasses.replace(plan, chunk=least)
        if n_q < 2 * plan.chunk:
            return plan, f"under a causal mask tiles need two segments of {plan.chunk} tokens"
    if options.policy == "auto":
        seconds = thresholds.seconds_of_call(TYPICAL_SHARE, plan, n_q, n_k)
        if seconds >= (thresholds.WORTH if plan.mask.hides else thresholds.PROMISING):
            return plan, f"tiles would take {seconds:.2f} times as long as exact attention at this length"
    return plan, ""


OTHER = "neither causal nor key padding"
"""What is said of other masks."""


def next_form(state: SiteState, options: Options, reason: str) -> SiteState:
    """The state after a form was given up: with the next one that may be low rank, else exact."""
    decision = state.decision
    tried = (*decision.tried, f"{decision.plan.family.describe(state.fit)}: {reason}")
    for at, plan in enumerate(decision.others):
        made = _decide(decision.shape, plan, options)
        if made.low_rank:
            said = "; ".join([made.decision.reason, *tried])
            left = decision.others[at + 1 :]
            found = dataclasses.replace(made.decision, others=left, tried=tried, reason=said, seen=decision.seen)
            return dataclasses.replace(state, decision=found, fit=None, heads=())
    return become_exact(state, "; ".join([reason, *decision.tried]))


def other_mask(shape: Mapping[str, int], plan: SitePlan, options: Options) -> SiteState:
    """The state of a site under a mask that has no low-rank form, or that it was no use to look at."""
    reason = f"the mask of the call is {OTHER}"
    state = decide(shape, plan, options)
    state = dataclasses.replace(state, decision=dataclasses.replace(state.decision, seen=OTHER))
    return become_exact(state, reason) if state.low_rank else state


@functools.lru_cache(maxsize=4096)
def why_exact(sizes: tuple[tuple[str, int], ...], plans: tuple[SitePlan, ...], options: str) -> str:
    """Why a site of these sizes is exact whatever its mask shows; empty where it may be low rank.

    Args:
        options: ``Options.key``.
    """
    state = decide(dict(sizes), plans[0], Options.from_key(options), plans[1:])
    return "" if state.low_rank else state.decision.reason


def why_site_is_exact(site: Site, options: Options) -> str:
    """Why a site is exact in every call, whatever its masks show, as far as its sizes are known when compiling."""
    if options.policy == "exact":
        return "policy='exact'"
    sizes = {name: size for name, size in site.shape.items() if isinstance(size, int)}
    if len(sizes) < len(site.shape):
        return ""
    device = site.q.value.device.type
    plans = SitePlan.all_of(options, site.causal, 1.0, sizes["d"], device, True, site.differentiated)
    return why_exact(tuple(sizes.items()), plans, options.key())


def become_exact(state: SiteState, reason: str) -> SiteState:
    """Exact from now on; the plan and the fit stay known, because a checkpoint may run a low-rank call again."""
    old = state.decision
    decision = dataclasses.replace(
        old,
        verdict="exact",
        reason=reason,
        flops_after=old.flops_before,
        flops_after_symbolic=old.flops_before_symbolic,
    )
    return dataclasses.replace(state, decision=decision, guarantee="exact")


# -- calls -----------------------------------------------------------------------------------------------------------


def count(state: SiteState, options: Options) -> tuple[SiteState, bool]:
    """One more call, and whether it is audited: claimed at once, so that another thread need not audit as well."""
    counters = state.counters
    number = counters.calls + 1
    since = number - counters.audited_call
    due = counters.audits == 0 or (options.audit_every > 0 and since >= options.audit_every)
    audited = state.low_rank and options.audit_rows > 0 and due
    if audited:
        return state.counting(calls=number, audited_call=number), True
    return state.counting(calls=number), False


def measured(state: SiteState, number: int, errors: AuditErrors) -> SiteState:
    """Record the audit of a call."""
    old, counters = state.audit, state.counters
    audit = Audit(
        errors.additive,
        errors.relative,
        larger(old.worst_error, errors.additive),
        larger(old.worst_relative_error, errors.relative),
    )
    state = state.counting(audits=counters.audits + 1, audited_call=max(counters.audited_call, number))
    return dataclasses.replace(state, audit=audit, guarantee="audited" if state.low_rank else state.guarantee)


def holds(errors: AuditErrors, options: Options) -> bool:
    """Whether an audit is within both tolerances; NaN is not."""
    return errors.additive <= options.tolerance and errors.relative <= options.relative_tolerance


def larger(a: float | None, b: float) -> float:
    """The larger of two errors; NaN, which may be any error, is larger than every number."""
    return b if a is None or math.isnan(b) or b > a else a


# -- fits ------------------------------------------------------------------------------------------------------------


def fitted(state: SiteState, fit: Fit) -> SiteState:
    """The state with a fit that was just made."""
    return dataclasses.replace(state.counting(fits=state.counters.fits + 1), fit=fit)


def thresholds_kept(state: SiteState, fit: Fit) -> SiteState:
    """The state with the thresholds of near pairs that the next call begins with."""
    return dataclasses.replace(state, fit=fit)


def heads_seen(state: SiteState, heads: tuple[HeadState, ...]) -> SiteState:
    """The state with what a call has found of its heads; a layer costs the sum of its heads."""
    decision = state.decision
    values = decision.plan.sizes(decision.shape)
    before, after = _symbolic(decision.plan)
    exact = float(before.subs(values))
    each = [float(after.subs(values | {NEAR_SHARE: head.share})) if head.threshold else exact for head in heads]
    flops = int(sum(each) * decision.shape["batch"])
    return dataclasses.replace(state, heads=heads, decision=dataclasses.replace(decision, flops_after=flops))


def served(exact_rows: int, rows: int, errors: AuditErrors | None, options: Options) -> bool:
    """Whether a fit served its call: few of its rows had to be exact, and its audit, where there was one, held."""
    return exact_rows <= FAILED_ROWS * rows and (errors is None or holds(errors, options))


def refit_due(state: SiteState, number: int | None, fit: Fit, options: Options) -> bool:
    """Whether a fit that fails may be made anew by the call of this number; None is a recomputation."""
    if not options.refit or number is None:
        return False
    wait = state.counters.wait * (options.audit_every or DEFAULT_WAIT)
    return fit.call is None or number - fit.call >= wait


def refitted(state: SiteState, helped: bool) -> SiteState:
    """After a fit was made anew: the next one may come as soon, or after twice as many calls."""
    return state.counting(wait=1 if helped else 2 * state.counters.wait)
