"""A report as plain text: one block of lines for each attention site, and one for each refusal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from polyattn.report import plots
from polyattn.report.reading import outlier_keys_of, rank_of, tile_width_of
from polyattn.report.views import ReportView, SiteView
from polyattn.rewriter.masks.mask import LOCAL_WINDOW

if TYPE_CHECKING:
    from polyattn.rewriter.families.family import Fit
    from polyattn.runtime.state import Counters, SiteState

WIDTH = 110
"""Characters of a line, after which it is wrapped."""
CENTRED = {"none": [], "call": ["centred"], "first_chunk": ["centred on the first chunk"]}
"""What a line says of queries and keys, by the tokens that their means are taken of."""


def summary(report: ReportView) -> str:
    """Say in one line how many sites there are, what became of them, and in how many graphs they lie."""
    verdicts = [site.verdict for site in report.sites]
    counts = [f"{verdicts.count(v)} {v.replace('_', ' ')}" for v in ("low_rank", "exact", "undecided") if v in verdicts]
    graphs = "1 graph" if report.graphs == 1 else f"{report.graphs} graphs"
    sites = f"{len(report.sites)} attention site{'' if len(report.sites) == 1 else 's'}"
    refused = f", {len(report.refusals)} refused" if report.refusals else ""
    return f"polyattn: {sites}{' (' + ', '.join(counts) + ')' if counts else ''}{refused} in {graphs}"


def report_text(report: ReportView) -> str:
    """Write a whole report: the summary, a failure if there was one, then numbered sites and refusals."""
    parts = [summary(report)]
    if report.failure:
        parts.append(f"FAILED, the model runs unchanged: {report.failure}")
    for number, site in enumerate(report.sites, start=1):
        parts.append(textwrap.indent(site_text(site), "    ").replace("    ", f"{number:>3} ", 1))
    for refusal in report.refusals:
        parts.append(f"  - {refusal.where}\n      REFUSED, eager fallback: {refusal.reason}  [{refusal.node}]")
    if not report.sites and not report.refusals and not report.failure:
        parts.append("  no softmax here feeds a product: there is no attention to rewrite")
    return "\n".join(parts)


def shape_text(shape: Mapping[str, int | str]) -> str:
    """Write named sizes in one line, such as ``n_q=128 d=64``."""
    return " ".join(f"{name}={size}" for name, size in shape.items())


def site_text(site: SiteView) -> str:
    """Write one site: its line and spelling, its sizes, and for each of its states verdict, costs and errors."""
    scale = "of a dynamic size" if math.isnan(site.scale) and not site.exact else f"{site.scale:.6g}"
    states = site.states
    seen = [state.decision.seen for state in states if state.decision.seen != site.mask]
    mask = site.mask if site.exact or not seen else f"{site.mask}, seen: {', '.join(dict.fromkeys(seen))}"
    lines = [site.where, f"  {site.spelling}", f"  {shape_text(site.shape)}   scale={scale}   mask={mask}"]
    if site.exact:
        lines += _wrapped(f"EXACT: {site.exact}", 2)
    elif not states:
        lines.append(f"  undecided: {site.reason}")
    sampled = {samples.state: samples for samples in site.samples}
    for number, state in enumerate(states):
        lines.extend(_state_lines(state, site.tolerance, f"layer {number}: " if len(states) > 1 else ""))
        for line in plots.lines(sampled[number]) if number in sampled else []:
            lines += _wrapped(line, 4)
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))


def _state_lines(state: SiteState, tolerance: float, label: str) -> list[str]:
    decision, audit = state.decision, state.audit
    head = f"{label}{state.verdict.upper().replace('_', ' ')}"
    head += f", {_method(state)}" if state.low_rank else ""
    lines = _wrapped(f"{head}: {decision.reason}", 2)
    if decision.flops_before:
        lines.append(f"    FLOPs {_count(decision.flops_before)} → {_count(decision.flops_after)}{_ratio(state)}")
    if audit.error is not None:
        worst = f" (worst {audit.worst_error:.2e})" if state.counters.audits > 1 else ""
        relative = f", relative {audit.relative_error:.2e}" if audit.relative_error is not None else ""
        lines.append(f"    error of the last audit {audit.error:.2e}{worst} of {tolerance:g} allowed{relative}")
    if state.low_rank and state.heads:
        lines += _wrapped(_heads(state), 4)
    if state.low_rank and state.fit is not None and state.fit.error:
        lines.append(f"    {_fit(state.fit, state.counters)}")
    lines.append(f"    guarantee: {_guarantee(state)}")
    return lines


def _method(state: SiteState) -> str:
    """How a low-rank state computes, in words."""
    plan = state.plan
    size = f"tiles of about {tile_width_of(state)} tokens" if plan.tiled else f"rank {rank_of(state)}"
    parts = [plan.family.describe(state.fit), size, f"{plan.gradient} gradient"]
    parts += [f"values on {plan.projection.values} directions"] if plan.projection.values else []
    parts += [f"queries and keys on {plan.projection.keys} directions"] if plan.projection.keys else []
    parts += [] if plan.differentiated else ["for inference"]
    parts += CENTRED[plan.centring]
    parts += [f"local window (keys up to {plan.chunk} tokens away exact)"] if plan.mask == LOCAL_WINDOW else []
    parts += [f"{outlier_keys_of(state)} outlier keys exact"] if plan.outliers else []
    return ", ".join(parts)


def _heads(state: SiteState) -> str:
    """What the key heads of the last call have exactly, and how far they are off."""
    low = [head for head in state.heads if head.threshold]
    whole = len(state.heads) - len(low)
    text = f"{len(low)} of {len(state.heads)} key heads in tiles"
    if low:
        shares = [head.share for head in low]
        text += f"; exact pairs {sum(shares) / len(shares):.3f} of all ({min(shares):.3f} to {max(shares):.3f})"
        errors = [head.error for head in low if head.error is not None]
        if errors:
            text += f"; errors of heads {min(errors):.1e} to {max(errors):.1e}"
    text += f"; {whole} exact" if whole else ""
    return text + (f"; {state.counters.exact_rows} rows exact so far" if state.counters.exact_rows else "")


def _fit(fit: Fit, counters: Counters) -> str:
    """What is known of a fit: how far rows are off that it did not see, and to which queries it was made."""
    errors, radius = fit.error, fit.radius
    made = "loaded" if fit.call is None else f"fitted at call {fit.call}"
    made += f", {counters.fits} times in all" if counters.fits > 1 else ""
    text = f"{made}: a row's weights off by {sum(errors) / len(errors):.2g} in sum"
    text += f" (worst head {max(errors):.2g})" if len(errors) > 1 else ""
    if radius is not None:
        text += f"; queries to a norm of {float(radius.min()):.3g}"
        text += f" to {float(radius.max()):.3g}" if len(errors) > 1 else ""
    return text + (f"; {counters.exact_rows} rows exact so far" if counters.exact_rows else "")


def _guarantee(state: SiteState) -> str:
    if state.guarantee != "audited":
        return state.guarantee
    counters = state.counters
    times = "once" if counters.audits == 1 else f"{counters.audits} times"
    return f"audited {times}, last at call {counters.audited_call} of {counters.calls}; it does not bound every row"


def _ratio(state: SiteState) -> str:
    before, after = state.decision.flops_before, state.decision.flops_after
    if after <= 0 or not state.low_rank:
        return ""
    return f" ({before / after:.3g}x fewer)" if before >= after else f" ({after / before:.3g}x more)"


def _count(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g}{unit}"
        flops /= 1000
    return f"{flops:.4g}P"
