"""What samples of a low-rank call say: in numbers, in words, as a sketch in plain text, and as a figure.

The figure has two panels: approximate weights over exact ones, and errors of rows over their position. It is drawn with
matplotlib's own defaults, whatever the process has set, and leaves them as they are; the same samples yield the same
SVG. ``polyattn.report.sampling`` takes the samples.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyattn.errors import PolyattnError


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Some rows and weights of one low-rank call beside exact attention's: CPU tensors, s rows and p weights."""

    state: int
    """Number of the run-time state in ``SiteReport.states``."""
    rows: torch.Tensor
    """Batch element, head and position of each row, int64 [s, 3], in this order."""
    errors: torch.Tensor
    """Additive errors of the rows, float64 [s]."""
    left: torch.Tensor
    """True for rows that the low-rank form left to exact attention, bool [s]."""
    row: torch.Tensor
    """The row of each weight, as a number below s, int64 [p]."""
    key: torch.Tensor
    """The position of each weight's key, int64 [p]."""
    drawn: torch.Tensor
    """True for keys that were drawn at random, False for those of a row's largest weights, bool [p]."""
    exact: torch.Tensor
    """Exact weights P_ij, float64 [p]."""
    approximate: torch.Tensor
    """The weights that the low-rank kernels give these pairs, float64 [p]; rows that are left to exact attention have
    exact ones."""
    near: torch.Tensor | None = None
    """Where tokens are in tiles, of the key head of the first row: which pairs of tiles are near, bool [tiles of
    queries, tiles of keys]."""
    gradients: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Relative errors of dQ, dK and dV, as far as known; empty where no backward was seen."""
    gradients_of: str = ""
    """The rows and heads that those errors are taken over."""

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """The median of the rows' errors, what nine in ten of them are below, and the largest, in the additive unit."""
        median, most = torch.quantile(self.errors, torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
        return median, most, float(self.errors.max())

    @property
    def negative(self) -> float:
        """The part of weights at drawn keys that are negative where exact ones never are."""
        chosen = self.approximate[self.drawn]
        return float((chosen < 0).double().mean()) if len(chosen) else 0.0

    @property
    def log_ratios(self) -> torch.Tensor:
        """log10(P̃_ij / P_ij) where both are positive."""
        both = (self.exact > 0) & (self.approximate > 0)
        return (self.approximate[both] / self.exact[both]).log10()

    def to_dict(self) -> dict[str, Any]:
        """The samples as JSON-serialisable values: rows in full, weights in summary."""
        return {
            "state": self.state,
            "rows": self.rows.tolist(),
            "errors": self.errors.tolist(),
            "left": self.left.tolist(),
            "error_quantiles": dict(zip(("median", "90%", "largest"), self.quantiles, strict=True)),
            "weights": len(self.exact),
            "negative": self.negative,
            "gradients": dict(self.gradients),
            "gradients_of": self.gradients_of,
        }


def lines(samples: Samples) -> list[str]:
    """Write what a report says of samples: one line on rows and weights, one on gradients where there are any."""
    median, most, largest = samples.quantiles
    left = int(samples.left.sum())
    text = f"{len(samples.errors)} sampled rows" + (f" ({left} of them exact)" if left else "")
    text += f": error {median:.1e} in the median, 90 % below {most:.1e}, largest {largest:.1e}"
    text += f"; {_percent(samples.negative)} of sampled weights negative"
    found = [text]
    if samples.gradients:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in samples.gradients.items())
        found.append(f"relative error of gradients: {errors} ({samples.gradients_of})")
    return found


def sketch(all_samples: Sequence[Samples], tolerance: float) -> str:
    """Write histograms of each state's samples: errors of rows, and log10 of approximate over exact weights.

    Args:
        tolerance: bound on a row's error, in the additive unit.
    """
    parts = []
    for samples in all_samples:
        head = f"layer {samples.state}: " if len(all_samples) > 1 else ""
        logs = samples.errors[samples.errors != 0].log10()
        zero = int((samples.errors == 0).sum())
        parts.append(f"{head}log10 of the error of {len(samples.errors)} rows (tolerance {math.log10(tolerance):.1f})")
        parts += _histogram(logs, 0.5)
        parts += [f"{'no error':>16} {zero}"] if zero else []
        ratios = samples.log_ratios
        parts.append(
            f"{head}log10 of approximate over exact weights, {len(samples.exact)} of them (outer bins: and beyond)"
        )
        parts += _histogram(ratios.clamp(-3, 2.99), 0.25)
        parts += [f"{'not positive':>16} {len(samples.exact) - len(ratios)}"]
    return "\n".join(parts)


_BAR = 50


def _histogram(values: torch.Tensor, width: float) -> list[str]:
    """One line per bin between the smallest and the largest value; what is not finite has a line of its own."""
    finite = values[values.isfinite()]
    bins = (finite / width).floor().long()
    made = []
    if len(bins):
        counts = torch.bincount(bins - bins.min())
        for number, count in enumerate(counts.tolist(), start=int(bins.min())):
            bar = "#" * math.ceil(_BAR * count / int(counts.max()))
            made.append(f"{number * width:>7.2f}, {(number + 1) * width:>6.2f} {bar} {count}")
    lost = len(values) - len(finite)
    return made + ([f"{'not finite':>16} {lost}"] if lost else [])


def _percent(part: float) -> str:
    return "none" if part == 0 else f"{100 * part:.2g} %"


# -- figures ---------------------------------------------------------------------------------------------------------

EDGE = "#d1495b"
COLOUR = "#2e6f9e"
LEGEND: Mapping[str, Any] = {"framealpha": 0.85, "edgecolor": "none"}
LOWEST = 1e-10
"""Weights below this are drawn at the edge."""
VECTORS = 5000
"""Points that are drawn as vectors at most; more become one image inside the SVG."""


def _matplotlib() -> Any:
    """Import matplotlib.

    Raises:
        PolyattnError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise PolyattnError(
            "plots need matplotlib, which is not installed: pip install 'polyattn[plot]'; "
            "SiteReport.sketch() says the same in plain text"
        ) from error
    return matplotlib


def available() -> bool:
    """True where figures can be drawn, because matplotlib is installed."""
    try:
        _matplotlib()
    except PolyattnError:
        return False
    return True


def draw(
    all_samples: Sequence[Samples], title: str, tolerance: float, into: str | os.PathLike[str] | Any = None
) -> Any:
    """Draw the figure of one site, a matplotlib Figure; several states in several colours.

    Args:
        tolerance: bound on a row's error, in the additive unit.
        into: a path, whose ending is the format, or an open binary file, which gets SVG; None: nothing is written.
    Raises:
        PolyattnError: matplotlib is not installed, or there are no samples.
    """
    if not all_samples:
        raise PolyattnError(
            f"{title}: there are no samples to plot; polyattn.explain takes them of attention that is low rank"
        )
    mpl = _matplotlib()
    with mpl.style.context("default"), mpl.rc_context({"svg.hashsalt": "polyattn"}):
        mapped = next((samples for samples in all_samples if samples.near is not None), None)
        figure = mpl.figure.Figure(figsize=(11 if mapped is None else 16, 4.8), layout="constrained")
        left, right, *rest = figure.subplots(1, 2 if mapped is None else 3)
        figure.suptitle(title, fontsize=11)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        colours = [COLOUR]
        if len(all_samples) > 1:
            colours = [mpl.colormaps["viridis"](0.9 * i / (len(all_samples) - 1)) for i in range(len(all_samples))]
        _weights(left, all_samples, colours)
        _rows(right, all_samples, colours, tolerance)
        if mapped is not None:
            _near(rest[0], mapped)
        if isinstance(into, (str, os.PathLike)):
            path = Path(into)
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(figure, path, path.suffix.lstrip(".").lower() or "svg")
        elif into is not None:
            _save(figure, into, "svg")
    return figure


def _save(figure: Any, into: Any, kind: str) -> None:
    dated = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
    figure.savefig(into, format=kind, dpi=150, metadata={dated: None} if dated else None)


def _weights(axes: Any, all_samples: Sequence[Samples], colours: Sequence[Any]) -> None:
    """Draw approximate over exact weights, with the diagonal; what a logarithm cannot show lies on the lower edge."""
    exact = torch.cat([samples.exact for samples in all_samples])
    made = torch.cat([samples.approximate for samples in all_samples])
    positive = torch.cat([exact[exact > 0], made[made > 0]])
    low = max(LOWEST, float(positive.min())) if len(positive) else LOWEST
    floor = 10.0 ** (math.floor(math.log10(low)) - 0.3)
    top = 1.6 * float(positive.max()) if len(positive) else 1.0
    floor = min(floor, top / 100)  # fewer decades have crowded labels
    image = len(exact) > VECTORS
    axes.plot([floor, top], [floor, top], color="#888888", linewidth=1, zorder=1, label="equal")
    for samples, colour in zip(all_samples, colours, strict=True):
        several = len(all_samples) > 1
        good = samples.approximate > 0
        for drawn, size, what in ((True, 9, "at drawn keys"), (False, 20, "largest of a row")):
            chosen = good & (samples.drawn == drawn)
            label = f"layer {samples.state}" if several and drawn else None if several else what
            style = {"color": colour, "alpha": 0.5} if drawn else {"facecolors": "none", "edgecolors": colour}
            x, y = samples.exact[chosen].clamp_min(floor), samples.approximate[chosen].clamp_min(floor)
            if len(x):
                axes.scatter(
                    x.numpy(), y.numpy(), s=size, label=label, linewidths=0 if drawn else 0.8, rasterized=image, **style
                )
    rest = ~(made > 0)
    negative, zero = int((made < 0).sum()), int((made == 0).sum())
    lost = int(rest.sum()) - negative - zero
    if bool(rest.any()):
        label = f"{negative} negative, {zero} zero" + (f", {lost} not a number" if lost else "") + " (on the edge)"
        axes.scatter(
            exact[rest].clamp_min(floor).numpy(),
            [floor] * int(rest.sum()),
            s=16,
            marker="v",
            color=EDGE,
            linewidths=0,
            alpha=0.7,
            clip_on=False,
            zorder=3,
            label=label,
            rasterized=image,
        )
    axes.set(xscale="log", yscale="log", xlim=(floor, top), ylim=(floor, top))
    axes.set(xlabel="exact weight", ylabel="approximate weight", title=f"{len(exact):,} softmax weights")
    axes.legend(fontsize=8, loc="upper left", **LEGEND)


def _near(axes: Any, samples: Samples) -> None:
    """Draw which pairs of tiles are near."""
    near = samples.near
    assert near is not None
    axes.imshow(near.numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest", aspect="auto")
    share = float(near.double().mean())
    batch, head = samples.rows[0, :2].tolist()
    title = f"near pairs of tiles, {share:.1%}: head {head} of batch element {batch}"
    axes.set(xlabel="tile of keys", ylabel="tile of queries", title=title)


def _rows(axes: Any, all_samples: Sequence[Samples], colours: Sequence[Any], tolerance: float) -> None:
    """Draw errors of rows over their position, with the tolerance; what is zero or not finite lies on an edge."""
    errors = torch.cat([samples.errors for samples in all_samples])
    usual = errors[(errors > 0) & errors.isfinite()]
    low = min(tolerance, float(usual.min()) if len(usual) else tolerance)
    high = max(tolerance, float(usual.max()) if len(usual) else tolerance)
    floor, top = max(low, 1e-17) / 2, high * 2
    axes.axhline(tolerance, color=EDGE, linewidth=1, linestyle="--", label=f"tolerance {tolerance:g}")
    for samples, colour in zip(all_samples, colours, strict=True):
        label = f"layer {samples.state}" if len(all_samples) > 1 else f"{len(samples.errors)} sampled rows"
        shown = torch.nan_to_num(samples.errors, nan=top, posinf=top).clamp(floor, top)
        axes.scatter(samples.rows[:, 2].numpy(), shown.numpy(), s=14, color=colour, linewidths=0, label=label)
    above = int((~(errors <= tolerance)).sum())
    title = f"error of rows: {above} of {len(errors)} above the tolerance"
    axes.set(yscale="log", ylim=(floor, top), xlabel="position of the query", title=title)
    axes.set_ylabel("|õ − o| / max |v − mean(v)|")
    axes.legend(fontsize=8, loc="best", **LEGEND)
