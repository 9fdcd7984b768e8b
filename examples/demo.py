"""The demo: one small transformer, trained twice on real text, with inductor alone and with polyattn.

    make demo                                   # or: make demo DEMO="--context 4096 --steps 20"

An ordinary byte-level GPT (``gpt_model.py``, which does not import polyattn) learns the source text of Python's own
standard library. Both runs start from the same weights and see the same batches, each in a process of its own, so that
their memory can be told apart. Shown are the report of what became of the attention, both loss curves, the time per
step, the memory, and how far the low-rank attention is from exact attention, before and after training. The numbers
are what this machine measured, whatever they are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    import torch

BACKENDS = ("inductor", "polyattn")
WARM_UP = 2
"""Steps that hold the compilation; they are timed apart."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what both runs measured, by backend; see :func:`work`."""
    chosen = arguments().parse_args(argv)
    if chosen.worker:
        return work(chosen, lambda event: print(json.dumps(event), flush=True))
    console = Console()
    console.rule("[bold]polyattn: one model, the same text, two backends")
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), console=console) as progress:
        results = {backend: run_worker(backend, chosen, progress) for backend in BACKENDS}
    show(console, chosen, results)
    plot(results, Path(chosen.out))
    console.print(f"\nloss curves: {chosen.out}")
    return results


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help=f"more than {WARM_UP} (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", choices=["auto", "low_rank", "exact"], default="auto", help="of polyattn")
    parser.add_argument("--degree", type=int, default=None, help="of polyattn's polynomial")
    parser.add_argument("--out", default="out/demo.png", help="the plot (default: %(default)s)")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser


# ── one run, in a process of its own ──────────────────────────────────────────────────────────────────────────────────


def work(chosen: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train with one backend; ``tell`` receives an event per step and the results at the end.

    Returns:
        loss and seconds of every step, the growth of memory in bytes, versions; with polyattn also the report and the
        measured errors of low-rank attention before and after training.
    """
    import time

    import gpt_model
    import stdlib_text
    import torch

    torch.manual_seed(chosen.seed)
    model = gpt_model.GPT(gpt_model.Config(context=chosen.context))
    text = stdlib_text.read()
    batches = list(stdlib_text.batches(text, chosen.context, chosen.steps, chosen.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.learning_rate)
    options = {"policy": chosen.policy, "degree": chosen.degree, "seed": chosen.seed}
    ours = chosen.worker == "polyattn"
    errors = {}
    if ours:
        tell({"status": "measuring the error at the start"})
        errors["start"] = attention_errors(model, batches[0][0], chosen)
    compiled = torch.compile(model, backend=chosen.worker, **({"options": options} if ours else {}))
    before = resident()
    losses, seconds, whole_run = [], [], None
    for step, (inputs, targets) in enumerate(batches):
        if step == WARM_UP:
            whole_run = peak()
            forget_peak()
        tell({"status": "compiling" if step < WARM_UP else f"loss {losses[-1]:.3f}"})
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = gpt_model.loss_of(compiled(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        tell({"step": step + 1, "status": f"loss {losses[-1]:.3f}"})
    memory = {"compiling": whole_run - before, "training": peak() - before} if whole_run is not None else {}
    results: dict[str, Any] = {
        "losses": losses,
        "seconds": seconds,
        "memory": memory,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text bytes": len(text),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    if ours:
        import polyattn

        report = polyattn.reports()[-1]
        tell({"status": "measuring the error at the end"})
        errors["end"] = attention_errors(model, batches[-1][0], chosen)
        results |= {"report": str(report), "sites": report.to_dict()["sites"], "errors": errors}
        results["polyattn"] = polyattn.__version__
    tell({"results": results})
    return results


def attention_errors(model: torch.nn.Module, tokens: torch.Tensor, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measured error of low-rank attention at every site of the model as it is now, whatever a verdict would be."""
    import polyattn

    options = {"policy": "low_rank", "degree": chosen.degree, "seed": chosen.seed}
    report = polyattn.explain(model, tokens, options=options, backward=False)
    return [{"error": site.error, "relative_error": site.relative_error} for site in report.sites]


def resident() -> int:
    """Bytes of this process in memory now."""
    return status("VmRSS") or highest()


def peak() -> int:
    """The most bytes this process had in memory, since the start or since :func:`forget_peak`."""
    return status("VmHWM") or highest()


def forget_peak() -> None:
    """Start a new peak, where the system can (Linux); elsewhere the peak stays that of the whole process."""
    if os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def status(name: str) -> int | None:
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as file:
        found = [line.split()[1] for line in file if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def highest() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# ── both runs, side by side ───────────────────────────────────────────────────────────────────────────────────────────


def run_worker(backend: str, chosen: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Start a run and follow it.

    Raises:
        SystemExit: the run failed; its own words are above.
    """
    task = progress.add_task(backend, total=chosen.steps, status="starting")
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", backend]
    for name in ("context", "steps", "learning_rate", "seed", "policy", "degree"):
        if (value := getattr(chosen, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    results: dict[str, Any] | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line) if line.startswith("{") else {"status": line.strip()}
            results = event.get("results", results)
            if "step" in event:
                progress.update(task, completed=event["step"])
            progress.update(task, status=event.get("status", "done"))
    if process.returncode or results is None:
        raise SystemExit(f"the run with {backend} failed (exit status {process.returncode})")
    return results


def show(console: Console, chosen: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Everything but the plot."""
    inductor, ours = results["inductor"], results["polyattn"]
    console.rule("what became of the attention")
    console.print(ours["report"], highlight=False, markup=False, soft_wrap=True)

    console.rule("loss, nats per byte")
    curves = Table("step", *BACKENDS, "difference")
    for step in sampled(chosen.steps):
        left, right = inductor["losses"][step], ours["losses"][step]
        curves.add_row(str(step + 1), f"{left:.4f}", f"{right:.4f}", f"{right - left:+.4f}")
    console.print(curves)

    console.rule("time and memory")
    table = Table("", *BACKENDS, "inductor / polyattn")
    for label, of, form in measures():
        left, right = of(inductor), of(ours)
        if left is not None and right is not None:
            table.add_row(label, form(left), form(right), f"{left / right:.2f}" if right > 0 else "")
    console.print(table)

    console.rule("low-rank attention against exact attention, measured on sampled rows of one batch")
    errors = Table("site", "where", "error, start", "error, end", "relative, start", "relative, end")
    for number, (site, start, end) in enumerate(
        zip(ours["sites"], ours["errors"]["start"], ours["errors"]["end"], strict=True), start=1
    ):
        cells = [scientific(of[name]) for name in ("error", "relative_error") for of in (start, end)]
        errors.add_row(str(number), site["where"], *cells)
    console.print(errors)
    console.print(
        f"verdicts: {', '.join(site['verdict'] for site in ours['sites'])} (policy {chosen.policy}); allowed are an error "
        f"of {ours['sites'][0]['tolerance']:g}, in units of the largest distance of a value from the mean value.\n"
        if ours["sites"]
        else "no attention was found.\n",
        highlight=False,
    )
    console.print(
        f"{inductor['parameters']:,} parameters, context {chosen.context:,}, {inductor['text bytes']:,} bytes of Python's "
        f"standard library, seed {chosen.seed}.\n{machine()}, {inductor['threads']} threads, Python "
        f"{platform.python_version()}, torch {inductor['torch']}, polyattn {ours['polyattn']}, "
        f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.",
        highlight=False,
    )
    ratio = median_step(inductor) / median_step(ours)
    words = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times slower than"
    console.print(
        f"\n[bold]At {chosen.context:,} tokens a training step with polyattn is {words} one with inductor alone."
    )


def measures() -> list[tuple[str, Callable[[dict[str, Any]], float | None], Callable[[float], str]]]:
    """Rows of the table: label, what it is of the results of a run, how it is written."""

    def seconds(value: float) -> str:
        return f"{value:.2f} s"

    def mebibytes(value: float) -> str:
        return f"{value / 2**20:.0f} MiB"

    return [
        ("median step", median_step, seconds),
        ("fastest step", lambda run: min(run["seconds"][WARM_UP:]), seconds),
        (f"first {WARM_UP} steps, with compilation", lambda run: sum(run["seconds"][:WARM_UP]), seconds),
        ("all steps", lambda run: sum(run["seconds"]), seconds),
        ("peak memory of training, above the model", lambda run: run["memory"].get("training"), mebibytes),
        ("peak memory with compilation", lambda run: run["memory"].get("compiling"), mebibytes),
    ]


def median_step(run: dict[str, Any]) -> float:
    return statistics.median(run["seconds"][WARM_UP:])


def sampled(steps: int, rows: int = 12) -> list[int]:
    """About ``rows`` steps, evenly, with the first and the last."""
    return sorted({round(index * (steps - 1) / (rows - 1)) for index in range(rows)})


def scientific(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"


def machine() -> str:
    """Processor and cores, as the system names them."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{platform.system()} {platform.machine()}, {name}, {os.cpu_count()} cores"


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss over steps, and loss over seconds without the compilation."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for backend, style in zip(BACKENDS, ("-", "--"), strict=True):
            losses, seconds = results[backend]["losses"], results[backend]["seconds"]
            by_step.plot(range(1, len(losses) + 1), losses, style, label=backend)
            clock = [sum(seconds[WARM_UP : step + 1]) for step in range(WARM_UP, len(seconds))]
            by_time.plot(clock, losses[WARM_UP:], style, label=backend)
        by_step.set(xlabel="step", ylabel="loss, nats per byte", title="the same steps")
        by_time.set(xlabel="seconds of training, without compilation", title="the same time")
        by_step.legend(frameon=False)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
