"""A report as one self-contained HTML page: no script, no link, figures with their data inside."""

from __future__ import annotations

import base64
import io
from html import escape

from polyattn.report import plots
from polyattn.report.text import site_text, summary
from polyattn.report.views import ReportView, SiteView

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { border: 1px solid #ddd; border-radius: 6px; padding: 0.5rem 1rem; margin: 1rem 0; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 13px; }
.low_rank h2 { color: #12662c; } .exact h2 { color: #174a8c; } .refused h2, .failed { color: #a02010; }
img { max-width: 100%; }
h2 { font-size: 1.05rem; margin: 0.4rem 0; } summary { cursor: pointer; }
"""


def page(report: ReportView) -> str:
    """Write the page: every site's text, with samples, derivation and kernels to unfold; then the refusals.

    Figures of samples are on it where matplotlib is installed.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>polyattn report</title>",
        f"<style>{STYLE}</style></head><body><h1>{escape(summary(report))}</h1>",
    ]
    if report.failure:
        parts.append(f"<p class='failed'>Failed, the model runs unchanged: {escape(report.failure)}</p>")
    parts.extend(_site(site) for site in report.sites)
    for refusal in report.refusals:
        parts.append(
            f"<section class='refused'><h2>{escape(refusal.where)}: refused, eager fallback</h2>"
            f"<p>{escape(refusal.reason)} <code>{escape(refusal.node)}</code></p></section>"
        )
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _site(site: SiteView) -> str:
    parts = [
        f"<section class='{escape(site.verdict)}'>"
        f"<h2>{escape(site.where)}: {escape(site.verdict.replace('_', ' '))}</h2>",
        f"<pre>{escape(site_text(site))}</pre>",
    ]
    if site.samples:
        if plots.available():
            parts.append(_figure(site))
        parts.append(_fold("samples as text", plots.sketch(site.samples, site.tolerance)))
    if site.derivation:
        parts.append(_fold("derivation", site.derivation))
    parts.extend(_fold(f"kernel {name}", source) for name, source in site.kernels.items())
    return "\n".join([*parts, "</section>"])


def _figure(site: SiteView) -> str:
    """An image with its data inside: names in several SVG of one page would clash."""
    buffer = io.BytesIO()
    plots.draw(site.samples, f"{site.where}: {site.spelling}", site.tolerance, buffer)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    about = "approximate over exact weights, and errors of sampled rows over their position"
    return f"<img alt='{escape(about)}' src='data:image/svg+xml;base64,{data}'>"


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(body)}</pre></details>"
