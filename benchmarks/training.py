"""What a small language model learns when its attention is low rank while it trains, family by family.

python benchmarks/training.py [--steps 1000] [--threads 1] [--write docs/training.md]

The model is the byte-level GPT of ``examples/gpt_model.py`` with 2 layers, width 64 and 4 heads of 16; it reads one
window of 512 bytes of Python's standard library per step. AdamW, a linear warm-up of 50 steps to a learning rate of
2e-3 that is then kept, no dropout, no clipping of gradients. Every family starts from the same weights and sees the
same windows. Attention runs through ``torch.compile(model, backend="polyattn")`` with ``policy="low_rank"``, so that
no audit makes it exact, and ``causal_chunk=64``: the chunk that a query lies in, one eighth of the window, is exact in
every family, and only what lies before it is approximated. Coefficients and landmarks that are fitted (least squares,
nested, skeleton) are fitted at the first call, to the heads as they are initialised, and anew where an audit fails: one
call in 50 is audited, and after a fit that does not help the next one waits twice as long.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
LAYERS, WIDTH, HEADS, TOKENS, CHUNK = 2, 64, 4, 512, 64
RATE, WARM_UP, WINDOWS, SEED, LAST = 2e-3, 50, 32, 0, 50
EXACT = "exact softmax"
COMMON: dict[str, Any] = {"policy": "low_rank", "causal_chunk": CHUNK, "inner": "eager", "audit_every": 50}
FAMILIES: dict[str, dict[str, Any]] = {
    EXACT: {"policy": "exact"},
    "Taylor 2": {"degree": 2},
    "Taylor 2, substituted": {"degree": 2, "gradient": "substituted"},
    "least squares 2": {"degree": 2, "polynomial": "least_squares"},
    "nested 4, rank 153": {"degree": 4, "rank": 153, "polynomial": "least_squares"},
    "skeleton 64": {"features": "skeleton", "rank": 64},
    "skeleton 64, substituted": {"features": "skeleton", "rank": 64, "gradient": "substituted"},
}
COLOURS = ("black", "tab:blue", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:red")
Window = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class Run:
    """What one family did."""

    losses: list[float]
    seconds: list[float]
    fits: int = 0
    """How often the features of the layer that was fitted most were fitted."""
    errors: tuple[float | None, float | None] = (None, None)
    """Largest relative error of an attention at the first call and at the last audit of training."""
    same: float = math.nan
    """Validation loss through the attention it was trained with."""
    exact: float = math.nan
    """Validation loss of the same weights through exact attention."""
    ahead: float = math.nan
    """How much the loss of first halves of windows rises when their second halves are those of other windows."""

    @property
    def failed(self) -> bool:
        return not math.isfinite(self.losses[-1])

    @property
    def last(self) -> float:
        return statistics.fmean(self.losses[-LAST:])


@contextlib.contextmanager
def undisturbed(threads: int) -> Iterator[None]:
    """So many threads, no warnings of failed audits; torch's generator and all of that as before at the end."""
    log = logging.getLogger("polyattn")
    before, level = torch.get_num_threads(), log.level
    torch.set_num_threads(threads)
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        log.setLevel(level)


def windows(steps: int) -> tuple[list[Window], list[Window]]:
    """Windows to train on, and windows of the last tenth of the text, which is held out."""
    import stdlib_text

    text = stdlib_text.read()
    cut = len(text) * 9 // 10
    pieces = [*stdlib_text.batches(text[:cut], TOKENS, steps, SEED)]
    pieces += stdlib_text.batches(text[cut:], TOKENS, WINDOWS, SEED + 1)
    plain = [(x.flatten()[None], y.flatten()[None]) for x, y in pieces]  # one stride everywhere, hence one graph
    return plain[:steps], plain[steps:]


def byte_losses(call: Callable[[torch.Tensor], torch.Tensor], pieces: list[Window]) -> torch.Tensor:
    """Loss of every byte, [windows, tokens]. With gradients on: a compiled model keeps its graph, hence its fits."""
    return torch.cat([F.cross_entropy(call(x).mT, y, reduction="none").detach() for x, y in pieces])


def relative_error() -> float | None:
    import polyattn

    found = [site.relative_error for site in polyattn.reports()[-1].sites]
    known = [error for error in found if error is not None]
    return max(known, key=lambda error: math.inf if math.isnan(error) else error) if known else None


def train(name: str, training: list[Window], held_out: list[Window], tick: Callable[[float], None]) -> Run:
    """One family, from the weights of the seed; stops at a loss that is not finite."""
    import gpt_model

    import polyattn

    torch.compiler.reset()
    polyattn.reset()
    torch.manual_seed(SEED)
    model = gpt_model.GPT(gpt_model.Config(context=TOKENS, width=WIDTH, heads=HEADS, layers=LAYERS))
    compiled = torch.compile(model, backend="polyattn", options={**COMMON, **FAMILIES[name]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    run = Run([], [])
    for inputs, targets in training:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = gpt_model.loss_of(compiled(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - begin)
        tick(run.losses[-1])
        if run.failed:
            return run
        run.errors = (relative_error() if len(run.losses) == 1 else run.errors[0], None)
    run.errors = (run.errors[0], relative_error())
    run.fits = max((state.counters.fits for site in polyattn.reports()[-1].sites for state in site.states), default=0)
    half = TOKENS // 2
    others = held_out[1:] + held_out[:1]
    mixed = [(torch.cat([x[:, :half], z[:, half:]], 1), y) for (x, y), (z, _) in zip(held_out, others, strict=True)]
    same = byte_losses(compiled, held_out)
    run.same = same.mean().item()
    run.ahead = (byte_losses(compiled, mixed)[:, :half] - same[:, :half]).mean().item()
    if len(polyattn.reports()) != 1:
        raise RuntimeError(f"{name}: the model was compiled {len(polyattn.reports())} times; fits are of one graph")
    run.exact = byte_losses(model, held_out).mean().item()
    return run


def trailing(values: list[float], length: int) -> tuple[list[int], list[float]]:
    """Steps and the means of so many values up to each."""
    steps = list(range(length, len(values) + 1))
    return steps, [statistics.fmean(values[step - length : step]) for step in steps]


def plot(runs: dict[str, Run], path: Path) -> None:
    """Smoothed loss over steps, and its distance from that of exact softmax on the same windows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "polyattn", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        reference = runs.get(EXACT)
        length = max(1, min(LAST, max(len(run.losses) for run in runs.values()) // 4))
        for name, colour in zip(FAMILIES, COLOURS, strict=True):
            if name not in runs:
                continue
            style = {"color": colour, "linestyle": "--" if "substituted" in name else "-", "linewidth": 1.3}
            losses = [loss for loss in runs[name].losses if math.isfinite(loss)]
            left.plot(*trailing(losses, length), label=name, **style)
            if reference is not None:
                gaps = [a - b for a, b in zip(losses, reference.losses, strict=False)]
                right.plot(*trailing(gaps, length), **style)
        left.set(xlabel="step", ylabel="loss, nats per byte", title=f"training loss, mean of {length} steps")
        right.set(xlabel="step", ylabel="nats per byte", title=f"above {EXACT}, mean of {length} steps")
        left.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def listed(parts: list[str]) -> str:
    return "; ".join(parts) if parts else "none"


def shows(runs: dict[str, Run]) -> str:
    """What the table says, in words."""
    if EXACT not in runs or runs[EXACT].failed:
        return "There is no run with exact softmax to compare with."
    base = runs[EXACT].same
    good = {name: run for name, run in runs.items() if name != EXACT and not run.failed}
    failed = [f"{name} at step {len(run.losses)}" for name, run in runs.items() if run.failed]
    gaps = [f"{name} {signed(run.same - base)}" for name, run in good.items()]
    swaps = [f"{name} {signed(run.exact - run.same)}" for name, run in good.items()]
    ahead = [f"{name} {signed(run.ahead)}" for name, run in good.items() if run.ahead >= 0.005]
    return (
        f"Exact softmax reaches a validation loss of {base:.3f}. Validated through the attention that they were "
        f"trained with, the other families differ from that by: {listed(gaps)}. When the attention of the trained "
        f"weights is then made exact, the loss changes by: {listed(swaps)}; weights for which this is large have "
        "learned to use what their attention computes, which is no longer softmax. Later bytes are worth 0.005 or "
        f"more to: {listed(ahead)}; a validation loss of such a family is not that of predicting the next byte from "
        f"those before it alone. Not finite: {listed(failed)}. This is one small model, one seed and one learning "
        "rate: it does not say how large differences between seeds are, nor what other models would do."
    )


def page(runs: dict[str, Run], image: str, steps: int, threads: int, minutes: float) -> str:
    from machine import machine

    import polyattn

    lines = [
        "# Training with low-rank attention",
        "",
        "Written by `python benchmarks/training.py`; do not edit. "
        + " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
        "",
        f"{steps:,} steps. Validation loss is the mean over {WINDOWS} windows of the last tenth of the text, which is "
        "held out. Losses are in nats per byte. Seconds per step are medians, without the first step.",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, polyattn {polyattn.__version__}; "
        f"{minutes:.0f} minutes.",
        "",
        f"| attention in training | training loss, last {LAST} steps | validation, same attention "
        "| validation, exact attention | seconds per step |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        loss = f"not finite at step {len(run.losses)}" if run.failed else number(run.last)
        seconds = statistics.median(run.seconds[1:] or run.seconds)
        lines.append(f"| {name} | {loss} | {number(run.same)} | {number(run.exact)} | {seconds:.3f} |")
    lines += [
        "",
        f"![Training loss over steps, and its distance from that of exact softmax]({image})",
        "",
        shows(runs),
        "",
        "Two more measurements. The relative error of attention (of the part that is not mean pooling; the larger of "
        "the two layers, on sampled rows) at the first call and at the last audit in training, and how often features "
        "were fitted (the more often fitted layer). And what later bytes "
        "are worth: the rise of the loss of the first halves of the windows held out when each second half is "
        "replaced by that of another window. Exact causal attention has 0 there. The means that queries and keys are "
        'centred by are taken of the whole call (`causal_stats="call"`), so that an output depends on later tokens '
        "by as much as the approximation is off, and training can learn to use that.",
        "",
        "| attention in training | error, first call | error, last audit | fits | worth of later bytes |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        first, last = run.errors
        lines.append(f"| {name} | {scientific(first)} | {scientific(last)} | {run.fits or '–'} | {number(run.ahead)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument(
        "--write",
        type=Path,
        default=ROOT / "docs" / "training.md",
        help="the page; the plot goes into images/ beside it (default: docs/training.md)",
    )
    chosen = parser.parse_args()
    if chosen.steps < 1:
        parser.error("--steps must be 1 or more")
    sys.path.insert(0, str(ROOT / "examples"))
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    begin = time.monotonic()
    runs: dict[str, Run] = {}
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with undisturbed(chosen.threads), Progress(*columns, TextColumn("{task.fields[status]}")) as progress:
        training, held_out = windows(chosen.steps)
        for name in chosen.families:
            task = progress.add_task(name, total=chosen.steps, status="")

            def tick(loss: float, task: Any = task) -> None:
                progress.update(task, advance=1, status=f"loss {loss:.3f}")

            runs[name] = train(name, training, held_out, tick)
    image = Path("images") / f"{chosen.write.stem}.svg"
    plot(runs, chosen.write.parent / image)
    text = page(runs, image.as_posix(), chosen.steps, chosen.threads, (time.monotonic() - begin) / 60)
    chosen.write.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
