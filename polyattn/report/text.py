"""A report for people to read: as text, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from typing import TYPE_CHECKING

from polyattn.report import plots
from polyattn.report.model import UNDECIDED, Report, SiteReport

if TYPE_CHECKING:
    from polyattn.runtime.guard import SiteState


def site_text(site: SiteReport) -> str:
    """What ``str`` of a site says."""
    scale = "of a dynamic size" if math.isnan(site.scale) and not site.exact else f"{site.scale:.6g}"
    lines = [site.where, f"  {site.spelling}", f"  {site.shape_text}   scale={scale}   mask={site.mask}"]
    states = site.states
    if site.exact:
        lines += textwrap.wrap(f"EXACT: {site.exact}", 110, initial_indent="  ", subsequent_indent="    ")
    elif not states:
        lines.append(f"  undecided: {UNDECIDED}")
    sampled = {samples.state: samples for samples in site.samples}
    for number, state in enumerate(states):
        lines.extend(_state_lines(state, site.tolerance, f"layer {number}: " if len(states) > 1 else ""))
        for line in plots.lines(sampled[number]) if number in sampled else []:
            lines += textwrap.wrap(line, 110, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)


def _state_lines(state: SiteState, tolerance: float, label: str) -> list[str]:
    head = f"{label}{state.verdict.upper().replace('_', ' ')}"
    if state.verdict == "low_rank":
        family = "skeleton features" if state.degree is None else f"degree {state.degree}"
        family += f", coefficients by {state.polynomial.replace('_', ' ')}" if state.polynomial != "taylor" else ""
        family += f", nested {state.widths}" if state.widths else ""
        head += f", {family}, rank {state.rank}, {state.gradient} gradient"
        head += f", values on {state.few.values} directions" if state.few.values else ""
        head += f", queries and keys on {state.few.keys} directions" if state.few.keys else ""
        head += {"none": "", "call": ", shifted", "first_chunk": ", shifted by the first chunk"}[state.shift]
        head += f", keys up to {state.chunk} tokens away exact" if state.band else ""
        head += f", {state.heavy} heavy keys exact" if state.heavy else ""
    lines = textwrap.wrap(f"{head}: {state.reason}", 110, initial_indent="  ", subsequent_indent="    ")
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
    """What is known of a fit: how far rows are off that it could see, and to which queries it was made."""
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


# -- the page --------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { border: 1px solid #ddd; border-radius: 6px; padding: 0.5rem 1rem; margin: 1rem 0; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 13px; }
.low_rank h2 { color: #12662c; } .exact h2 { color: #174a8c; } .refused h2, .failed { color: #a02010; }
img { max-width: 100%; }
h2 { font-size: 1.05rem; margin: 0.4rem 0; } summary { cursor: pointer; }
"""


def render(report: Report) -> str:
    """The page as text."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>polyattn report</title>",
        f"<style>{_STYLE}</style></head><body><h1>{_text(report.summary())}</h1>",
    ]
    if report.failure:
        parts.append(f"<p class='failed'>Failed, the model runs unchanged: {_text(report.failure)}</p>")
    parts.extend(_site(site) for site in report.sites)
    for refusal in report.refusals:
        parts.append(
            f"<section class='refused'><h2>{_text(refusal.where)}: refused</h2>"
            f"<p>{_text(refusal.reason)} <code>{_text(refusal.node)}</code></p></section>"
        )
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _site(site: SiteReport) -> str:
    parts = [
        f"<section class='{_text(site.verdict)}'><h2>{_text(site.where)}: {_text(site.verdict.replace('_', ' '))}</h2>",
        f"<pre>{_text(str(site))}</pre>",
    ]
    if site.samples:
        if plots.available():
            parts.append(_figure(site))
        parts.append(_fold("samples as text", site.sketch()))
    if site.derivation:
        parts.append(_fold("derivation", site.derivation))
    parts.extend(_fold(f"kernel {name}", source) for name, source in site.kernels.items())
    return "\n".join([*parts, "</section>"])


def _figure(site: SiteReport) -> str:
    """As an image with its data inside: names in several SVG of one page would clash."""
    buffer = io.BytesIO()
    plots.draw(site.samples, f"{site.where}: {site.spelling}", site.tolerance, buffer)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    about = "approximate over exact weights, and errors of sampled rows over their position"
    return f"<img alt='{_text(about)}' src='data:image/svg+xml;base64,{data}'>"


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{_text(body)}</pre></details>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
