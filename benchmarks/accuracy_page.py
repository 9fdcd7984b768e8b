"""The page and the plots of benchmarks/accuracy.py."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from machine import processor

TOLERANCES = (1e-2, 2e-2, 5e-2, 1e-1)
PAIRS = ((2e-2, 0.1), (5e-2, 0.1), (1e-1, 0.2))
"""Additive and relative tolerances that are asked for together."""
Rows = list[dict[str, Any]]


def share(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / max(1, len(flags)):.0f} %"


def shares(table: dict[str, Rows]) -> list[str]:
    columns = [f"{t:.0e}".replace("e-0", "e-") for t in TOLERANCES] + ["relative 0.1"]
    columns += [f"{a:g} and {r:g}" for a, r in PAIRS] + ["median relative", "seconds"]
    lines = [f"| features | heads | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, rows in table.items():
        cells = [share([row["additive"] <= t for row in rows]) for t in TOLERANCES]
        cells.append(share([row["relative"] <= 0.1 for row in rows]))
        cells += [share([row["additive"] <= a and row["relative"] <= r for row in rows]) for a, r in PAIRS]
        cells.append(f"{torch.tensor([row['relative'] for row in rows]).median():.3f}")
        cells.append(f"{sum(row['seconds'] for row in rows) / len(rows):.2f}")
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return lines


def gradients(table: dict[str, Rows]) -> list[str]:
    lines = [
        "| features | gradient, cotangent | heads | dQ | dK | dV | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in table.items():
        measured = [row for row in rows if row["gradients"]]
        good = [row for row in measured if row["additive"] <= 2e-2 and row["relative"] <= 0.1]
        for kind in measured[0]["gradients"] if measured else ():
            if not good:
                lines.append(f"| {name} | {kind} | 0 of {len(measured)} | | | | |")
                continue
            found = torch.tensor([row["gradients"][kind] for row in good])
            cells = [f"{x:.3f}" for x in (*found.median(0).values.tolist(), float(found.max()))]
            lines.append(f"| {name} | {kind} | {len(good)} of {len(measured)} | {' | '.join(cells)} |")
    return lines


def write(
    command: str,
    about: str,
    table: dict[str, dict[str, Rows]],
    moved: dict[str, list[tuple[float, float]]],
    isotropic: dict[str, tuple[float, float]],
    minutes: float,
    path: Path | None,
) -> str:
    """The page as Markdown; with a path it is written there, and the plots to ``images/`` beside it."""
    lines = [
        "# Accuracy on trained heads",
        "",
        f"Written by `{command}`; do not edit. {about}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {torch.get_num_threads()} threads, "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}; {minutes:.0f} minutes.",
        "",
        "## The encoder's heads",
        "",
        "Share of the heads within an additive tolerance, within a relative error of 0.1, and within both of a pair. "
        "Mean pooling has a relative error of 1 by definition. Seconds per head are those of a first forward, with the "
        "fit, which is kept; what takes long is measured on some of the 72 heads. *Nested* and *least squares* are "
        "polynomials fitted to a head, *near field* keeps keys exact that are at least and at most so many positions "
        "away in the window, in every window; *outlier keys* are those of largest norm, computed exactly. FAVOR+, "
        "Nyströmformer and tensor sketch are plain implementations of "
        "other methods (benchmarks/references.py) with centred keys and one seed; the truncated SVD of the softmax "
        "matrix is the limit of what any matrix of that rank can do in Frobenius norm.",
        "",
        *shares(table["encoder"]),
        "",
        "![Share of heads over the error](images/accuracy.svg)",
        "",
        "### Gradients",
        "",
        "Relative errors of dQ, dK, dV: medians over the heads within 2e-2 and 0.1, and the largest of all on them. "
        "On 16 × 16 directions the substituted gradient costs 3.9 times less at this head dim: (16 + 1) 16 over "
        "(32 + 1) 32.",
        "",
        *gradients(table["encoder"]),
        "",
        "### Fitted to one text, used on another",
        "",
        "Additive errors on a second text of the same length: features fitted to that text, and fitted to the first "
        "text and kept. Medians over every third head, and the median of the ratio.",
        "",
        "| features | heads | own fit | kept fit | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, pairs in moved.items():
        own, kept = torch.tensor(pairs).unbind(1)
        ratio = float((kept / own).median())
        lines.append(f"| {name} | {len(pairs)} | {own.median():.4f} | {kept.median():.4f} | {ratio:.2f} |")
    lines += [
        "",
        "## Independent normal inputs",
        "",
        "Logits of standard deviation 0.3, 4,096 tokens, d = 32: the worse of two heads.",
        "",
        "| features | additive | relative |",
        "|---|---|---|",
        *(f"| {name} | {a:.1e} | {r:.3f} |" for name, (a, r) in isotropic.items()),
        "",
        "## A small causal model's heads",
        "",
        *shares(table["causal"]),
        "",
        *gradients(table["causal"]),
        "",
        "## Training through the approximation",
        "",
        "[docs/training.md](training.md): the loss of a small causal model over 1,000 steps through each family.",
        "",
        "![Loss over 1,000 steps](images/training.svg)",
    ]
    text = "\n".join(lines) + "\n"
    if path is not None:
        path.parent.joinpath("images").mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        plot(table["encoder"], moved, path.parent / "images" / "accuracy.svg")
    return text


def plot(table: dict[str, Rows], moved: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Shares of heads over both errors, and errors with a kept fit over those with an own one."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = {
        "Taylor 2": "C7",
        "least squares 2": "C1",
        "nested 4, at most 561": "C3",
        "nested 4, at most 1,600": "C4",
        "skeleton 512": "C0",
        "skeleton 1,024": "C9",
        "skeleton 512, near field 16 to 31": "C2",
        "Nyströmformer 512": "C8",
    }
    with mpl.rc_context({"svg.hashsalt": "polyattn", "font.size": 9}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, key, mark in zip(figure.subplots(1, 3)[:2], ("additive", "relative"), (2e-2, 0.1), strict=True):
            for name, colour in shown.items():
                values = sorted(row[key] for row in table.get(name, ()))
                heights = [100 * (n + 1) / len(values) for n in range(len(values))]
                axes.step(values, heights, where="post", color=colour, label=name)
            axes.axvline(mark, color="0.7", linewidth=0.8, linestyle=":")
            axes.set(xscale="log", xlim=(1e-3, 2), ylim=(0, 100), xlabel=f"{key} error", ylabel="% of the heads within")
        figure.axes[1].legend(loc="upper left", frameon=False, fontsize=7.5)
        last = figure.axes[2]
        for name, pairs in moved.items():
            own, kept = zip(*pairs, strict=True)
            last.scatter(own, kept, s=10, label=name, color=shown.get(name, "C5"))
        last.axline((1e-2, 1e-2), slope=1, color="0.7", linewidth=0.8)
        last.set(xscale="log", yscale="log", xlabel="additive error, own fit", ylabel="additive error, kept fit")
        last.legend(frameon=False, fontsize=7.5)
        figure.savefig(path, metadata={"Date": None})
