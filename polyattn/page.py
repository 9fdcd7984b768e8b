"""A report as one self-contained HTML page."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyattn.report import Report, SiteReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { border: 1px solid #ddd; border-radius: 6px; padding: 0.5rem 1rem; margin: 1rem 0; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 13px; }
.low_rank h2 { color: #12662c; } .exact h2 { color: #174a8c; } .refused h2, .failed { color: #a02010; }
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
    if site.derivation:
        parts.append(_fold("derivation", site.derivation))
    parts.extend(_fold(f"kernel {name}", source) for name, source in site.kernels.items())
    return "\n".join([*parts, "</section>"])


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{_text(body)}</pre></details>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
