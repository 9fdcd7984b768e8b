"""A report as plain text: one block of lines for each attention site, and one for each refusal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from polyattn.report import plots
from polyattn.report.views import ReportView, SiteView

if TYPE_CHECKING:
    from polyattn.runtime.guard import SiteState

WIDTH = 110
"""Characters of a line, after which it is wrapped."""
CENTRED = {"none": "", "call": ", centred", "first_chunk": ", centred on the first chunk"}
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
    lines = [site.where, f"  {site.spelling}", f"  {shape_text(site.shape)}   scale={scale}   mask={site.mask}"]
    states = site.states
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
    head = f"{label}{state.verdict.upper().replace('_', ' ')}"
    if state.verdict == "low_rank":
        family = "skeleton (CUR) features" if state.degree is None else f"degree {state.degree}"
        family += f", coefficients by {state.polynomial.replace('_', ' ')}" if state.polynomial != "taylor" else ""
        family += f", nested {state.widths}" if state.widths else ""
        head += f", {family}, rank {state.rank}, {state.gradient} gradient"
        head += f", values on {state.few.values} directions" if state.few.values else ""
        head += f", queries and keys on {state.few.keys} directions" if state.few.keys else ""
        head += CENTRED[state.shift]
        head += f", local window (keys up to {state.chunk} tokens away exact)" if state.band else ""
        head += f", {state.heavy} outlier keys exact" if state.heavy else ""
    lines = _wrapped(f"{head}: {state.reason}", 2)
    if state.flops_before:
        lines.append(f"    FLOPs {_count(state.flops_before)} → {_count(state.flops_after)}{_ratio(state)}")
    if state.error is not None:
        worst = f" (worst {state.worst_error:.2e})" if state.audits > 1 else ""
        relative = f", relative {state.relative_error:.2e}" if state.relative_error is not None else ""
        lines.append(f"    error of the last audit {state.error:.2e}{worst} of {tolerance:g} allowed{relative}")
    if state.fit_error and state.verdict == "low_rank":
        lines.append(f"    {_fit(state)}")
    lines.append(f"    guarantee: {_guarantee(state)}")
    return lines


def _fit(state: SiteState) -> str:
    """What is known of a fit: how far rows are off that it did not see, and to which queries it was made."""
    errors = state.fit_error
    assert state.fit is not None
    made = "loaded" if state.fit.call is None else f"fitted at call {state.fit.call}"
    made += f", {state.fits} times in all" if state.fits > 1 else ""
    text = f"{made}: a row's weights off by {sum(errors) / len(errors):.2g} in sum"
    text += f" (worst head {max(errors):.2g})" if len(errors) > 1 else ""
    if state.radius is not None:
        text += f"; queries to a norm of {float(state.radius.min()):.3g}"
        text += f" to {float(state.radius.max()):.3g}" if len(errors) > 1 else ""
    return text + (f"; {state.exact_rows} rows exact so far" if state.exact_rows else "")


def _guarantee(state: SiteState) -> str:
    if state.guarantee == "audited":
        times = "once" if state.audits == 1 else f"{state.audits} times"
        return f"audited {times}, last at call {state.audited_call} of {state.calls}; it does not bound every row"
    return str(state.guarantee)


def _ratio(state: SiteState) -> str:
    if state.flops_after <= 0 or state.verdict == "exact":
        return ""
    ratio = state.flops_before / state.flops_after
    return f" ({ratio:.3g}x fewer)" if ratio >= 1 else f" ({1 / ratio:.3g}x more)"


def _count(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g}{unit}"
        flops /= 1000
    return f"{flops:.4g}P"
