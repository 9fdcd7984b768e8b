"""Rows as docs/zoo.md shows them, and as text with code and graph around what is not as it should be."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import sys
from pathlib import Path

from rows import COLUMNS, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Row

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "diffusers", "x-transformers", "vit-pytorch", "timm", "einops")


def page(rows: list[Row], minutes: float) -> str:
    sys.path.insert(0, str(ROOT / "examples"))
    from machine import processor

    known = [row for row in rows if row.executed is not None]
    executed = sum(row.executed or 0 for row in known)
    sites = sum(row.sites or 0 for row in known)
    complete = sum(row.complete for row in rows)
    lines = [
        "# Models and what polyattn finds in them",
        "",
        "Written by `make zoo`; do not edit. Models of public packages, built from their own configuration classes "
        "with few layers and random weights, run in eager mode, with stock `torch.compile` (backend `eager`) and with "
        'polyattn (`policy="exact"`, inner compiler eager). The attentions that a model executes are counted in the '
        "eager run from the outside: torch's fused attention calls, and softmax calls whose result enters a matrix "
        "product.",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, "
        f"Python {sys.version.split()[0]}, {versions()}; {minutes:.0f} minutes.",
        "",
        f"**{sites} of {executed} executed attentions became sites; {complete} of {len(rows)} rows have no refusal, "
        "no difference, no failure and no graph break that stock torch.compile does not have.**",
        "",
        "Of the sites, *op* became `polyattn::attention` (which can be low rank), *masked op* became "
        "`polyattn::masked_attention` (masks that are added, in training), *SDPA* run as torch's "
        "`scaled_dot_product_attention`, put there or left there, and the rest stays as the model wrote it.",
        "",
        f"*Equal*: with the same run of stock `torch.compile`, outputs to {OUTPUT_TOLERANCE:g} of their largest value, "
        f"gradients of all parameters to {GRADIENT_TOLERANCE:g}. *Sites* count executions: one compiled block may "
        "serve many layers.",
        "",
    ]
    reasons: dict[str, list[Row]] = {}
    for row in rows:
        for reason in dict.fromkeys(refusal["reason"] for refusal in row.refusals):
            reasons.setdefault(reason, []).append(row)
    if reasons:
        lines += ["## Refusals", "", "| reason | rows | models |", "|---|---|---|"]
        for reason, where in sorted(reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"| {cell(reason)} | {len(where)} | {', '.join(dict.fromkeys(row.model for row in where))} |")
        lines.append("")
    lines += [
        "## All rows",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [table_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def table_row(row: Row) -> str:
    refusals = [f"{r['reason']} ({r['where']})" for r in row.refusals]
    told = "; ".join(f"{refusals.count(r)} × {r}" if refusals.count(r) > 1 else r for r in dict.fromkeys(refusals))
    if row.failure:
        told = f"**FAILED** {row.failure}" + (f"; {told}" if told else "")
    if row.captured is not None and row.executed is not None and row.captured < row.executed:
        lost = f"{row.executed - row.captured} in code that Dynamo puts into no graph"
        told = lost + (f"; {told}" if told else "")
    if row.stock_error is not None and row.stock_error > OUTPUT_TOLERANCE:
        told = f"stock torch.compile differs from eager by {row.stock_error:.0e}" + (f"; {told}" if told else "")
    missing = (row.captured or 0) - (row.sites or 0) - (row.refused or 0)
    if row.captured is not None and row.sites is not None and missing:
        told = f"**{missing} neither found nor refused**" + (f"; {told}" if told else "")
    gradients = "" if row.mode == "inference" else equality(row.gradients_equal, row.gradient_error)
    cells = [
        row.model,
        row.implementation,
        row.mode,
        number(row.executed),
        number(row.sites),
        run_as(row),
        cell(told) or "none",
        equality(row.outputs_equal, row.output_error),
        gradients,
        f"{number(row.breaks)}/{number(row.stock_breaks)}",
    ]
    return f"| {' | '.join(cells)} |"


def run_as(row: Row) -> str:
    if row.sites is None:
        return "—"
    rest = row.sites - row.op - row.masked - row.sdpa
    return f"{row.op} / {row.masked} / {row.sdpa} / {max(rest, 0)}"


def number(value: int | None) -> str:
    return "—" if value is None else str(value)


def equality(equal: bool | None, error: float | None) -> str:
    if equal is None:
        return "—"
    return f"yes ({error:.0e})" if equal else f"**no ({error:.1e})**"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def explained(rows: list[Row]) -> str:
    """What is not as it should be, in full; identical refusals once."""
    parts, shown = [], set()
    for row in rows:
        head = f"{row.model} | {row.implementation} | {row.mode}"
        numbers = f"executed {row.executed}, sites {row.sites}, refused {row.refused}"
        parts.append(f"\n## {head}: {numbers}{'' if row.complete else '   <-- NOT COMPLETE'}  [{row.seconds:.0f} s]\n")
        if row.failure:
            parts.append(f"FAILURE: {row.failure}\n")
        if row.outputs_equal is False:
            parts.append(f"OUTPUTS DIFFER by {row.output_error:.2e}\n")
        if row.gradients_equal is False:
            parts.append(f"GRADIENTS DIFFER by {row.gradient_error:.2e} at {row.worst_gradient}\n")
        for refusal in row.refusals:
            key = (refusal["reason"], refusal["where"])
            parts.append(f"REFUSED {refusal['where']}: {refusal['reason']} [{refusal['node']}]\n")
            if key not in shown:
                shown.add(key)
                parts.append(f"```python\n{refusal.get('code', '')}\n```\n```\n{refusal.get('graph', '')}\n```\n")
    return "".join(parts)
