"""The tables of benchmarks/clustered/measure.py, and where they stand in docs/clustered.md."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from machine import processor

from clustered.causal import CausalSetting
from clustered.plan import Setting

PAIRS = ((2e-2, 0.1), (5e-2, 0.1), (1e-1, 0.2))
"""Additive and relative tolerances that are asked for together."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
"""What the tables stand between in the page."""


@dataclass
class Quality:
    """Errors of heads, and the shares of their pairs (causal: of half of n²) that are exact and that are executed."""

    additive: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)
    executed: list[float] = field(default_factory=list)

    def within(self) -> str:
        """Per cent of the heads within each pair of tolerances."""
        found = list(zip(self.additive, self.relative, strict=True))
        return " / ".join(f"{100 * sum(x <= a and y <= r for x, y in found) / len(found):.0f}" for a, r in PAIRS)

    def cells(self) -> list[str]:
        """Tolerances, the largest errors, exact pairs and executed pairs."""
        return [
            self.within(),
            f"{max(self.additive):.3f}, {max(self.relative):.3f}",
            f"{statistics.fmean(self.pairs):.3f} ({max(self.pairs):.2f})",
            f"{statistics.fmean(self.executed):.3f}",
        ]


@dataclass
class Accuracy:
    """One setting on the heads of a text: errors, and FLOPs over those of exact attention."""

    tokens: int
    text: int
    setting: Setting
    quality: Quality = field(default_factory=Quality)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


@dataclass
class Causal:
    """One setting of the causal form on the heads of a text."""

    tokens: int
    setting: CausalSetting
    quality: Quality = field(default_factory=Quality)


@dataclass
class Gradient:
    """One form of the gradient: relative errors of dQ, dK and dV of each head."""

    setting: Setting
    form: str
    cotangent: str
    errors: list[list[float]] = field(default_factory=list)


@dataclass
class Times:
    """Seconds of the stages of a call and the executed share of its pairs, of each head."""

    tokens: int
    setting: Setting | None
    """None: exact attention."""
    executed: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Measured:
    """All that is measured."""

    accuracy: list[Accuracy] = field(default_factory=list)
    causal: list[Causal] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)


def described(setting: Setting) -> list[str]:
    """Cells: grouping, widths, threshold, and what differs from the defaults."""
    more = [f"exponent {setting.exponent:g}"] if setting.exponent != Setting().exponent else []
    more += [f"ratio {setting.ratio:g}"] if setting.ratio is not None else []
    return [setting.grouping, f"{setting.width_q} × {setting.width_k}", number(setting.tau), ", ".join(more)]


def number(tau: float) -> str:
    return f"{tau:.1e}".replace("e-0", "e-")


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(*columns: str) -> list[str]:
    return [row(list(columns)), "|---" * len(columns) + "|"]


TOLERANCES = "% within " + " / ".join(f"({a:g}, {r:g})" for a, r in PAIRS)
SETTING = ("grouping", "T_q × T_k", "τ", "other")


def accuracy(rows: list[Accuracy]) -> list[str]:
    """Errors, pairs and FLOPs."""
    quality = (TOLERANCES, "largest errors", "exact pairs, mean (max)", "executed")
    lines = heading("tokens", "text", "heads", *SETTING, *quality, "forward FLOPs", "backward FLOPs")
    for one in rows:
        first = [f"{one.tokens:,}", str(one.text), str(len(one.forward)), *described(one.setting)]
        flops = [f"{statistics.fmean(x):.3f}" for x in (one.forward, one.backward)]
        lines.append(row([*first, *one.quality.cells(), *flops]))
    return lines


def causal(rows: list[Causal]) -> list[str]:
    """Errors and pairs of the causal form."""
    first = ("tokens", "heads", "segment", "T_q × T_k", "queries a cluster", "τ")
    lines = heading(*first, TOLERANCES, "largest errors", "exact pairs, mean (max)", "executed")
    for one in rows:
        s = one.setting
        cells = [f"{one.tokens:,}", str(len(one.quality.pairs)), str(s.segment), f"{s.width_q} × {s.width_k}"]
        lines.append(row([*cells, str(s.cluster), number(s.tau), *one.quality.cells()]))
    return lines


def gradients(rows: list[Gradient]) -> list[str]:
    """Medians and largest errors."""
    lines = heading(*SETTING, "gradient", "cotangent", "heads", "median dQ, dK, dV", "largest", "% with all within 0.1")
    for one in rows:
        errors = torch.tensor(one.errors)
        median, largest = (
            ", ".join(f"{x:.3f}" for x in found.tolist()) for found in (errors.median(0).values, errors.amax(0))
        )
        within = 100 * (errors.amax(1) <= 0.1).double().mean()
        cells = [one.form, one.cotangent, str(len(errors)), median, largest, f"{within:.0f}"]
        lines.append(row([*described(one.setting), *cells]))
    return lines


STAGES = ("tiles", "near pairs", "far field", "near field", "forward", "forward + backward")


def times(rows: list[Times]) -> list[str]:
    """Means over heads, in milliseconds."""
    lines = heading("tokens", "attention", "executed", *STAGES)
    for one in rows:
        if one.setting is None:
            first = [f"{one.tokens:,}", "exact, torch's fused kernel", ""]
        else:
            name = " ".join(x for x in described(one.setting) if x)
            first = [f"{one.tokens:,}", name, f"{statistics.fmean(one.executed):.3f}"]
        found = (one.seconds.get(stage) for stage in STAGES)
        lines.append(row([*first, *("" if x is None else f"{1e3 * statistics.fmean(x):.1f}" for x in found)]))
    return lines


def tables(found: Measured, command: str, minutes: float, load: float) -> str:
    """All tables as Markdown, with what they were measured on."""
    threads = torch.get_num_threads()
    lines = [
        f"Written by `{command}`.",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, "
        f"{threads} {'thread' if threads == 1 else 'threads'}, load average {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; Python {platform.python_version()}, torch {torch.__version__}, float32; "
        f"{minutes:.1f} minutes.",
        "",
        "### Accuracy and work",
        "",
        *accuracy(found.accuracy),
        "",
        "### Causal",
        "",
        *causal(found.causal),
        "",
        "### Gradients, 4,096 tokens",
        "",
        *gradients(found.gradients),
        "",
        "### Time, milliseconds a head",
        "",
        *times(found.times),
    ]
    return "\n".join(lines)


def update(path: Path, text: str) -> None:
    """Put the tables in place of those of the page.

    Raises:
        SystemExit: the page has no place for them.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no lines {BEGIN} and {END} to write the tables between")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
