"""The demo: one small transformer, trained twice on real text, with inductor alone and with polyattn.

    make demo                                   # or: make demo DEMO="--context 4096 --steps 20"

An ordinary byte-level GPT (``gpt_model.py``, which does not import polyattn) learns the source text of Python's own
standard library. Both runs start from the same weights and see the same batches, each in a process of its own, so that
their memory can be told apart, and take their steps in turn, so that whatever else this machine does slows both. Shown
are the report of what became of the attention, both loss curves, the time per step, the memory, and how far low-rank
attention is from exact attention, before and after training. The numbers are what this machine measured, whatever they
are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import machine
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
    parser = arguments()
    chosen = parser.parse_args(argv)
    if chosen.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}: the first {WARM_UP} hold the compilation")
    if chosen.worker:
        return work(chosen)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.rule("[bold]polyattn: one model, the same text, two backends")
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), console=console) as progress:
        results = run(chosen, progress)
    show(console, chosen, results)
    plot(results, Path(chosen.out))
    console.print(f"\nloss curves: {chosen.out}")
    return results


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help=f"more than {WARM_UP} (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", choices=["auto", "low_rank", "exact"], default="auto", help="of polyattn")
    parser.add_argument("--degree", type=int, default=None, help="of polyattn's polynomial")
    parser.add_argument("--out", default="out/demo.png", help="the plot (default: %(default)s)")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser


# ── one run, in a process of its own ──────────────────────────────────────────────────────────────────────────────────


def work(chosen: argparse.Namespace) -> dict[str, Any]:
    """Train with one backend: a step for every line of standard input, an event for every step on standard output.

    Returns:
        loss, seconds and busy cores of every step, the growth of memory in bytes, versions; with polyattn also the
        report and the measured errors of low-rank attention before and after training.
    """
    import gpt_model
    import stdlib_text
    import torch
    import torch._inductor.compile_fx  # both runs need it: the memory of libraries is not the memory of training

    torch.manual_seed(chosen.seed)
    model = gpt_model.GPT(gpt_model.Config(context=chosen.context))
    untrained = copy.deepcopy(model)
    text = stdlib_text.read()
    batches = list(stdlib_text.batches(text, chosen.context, chosen.steps, chosen.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.learning_rate)
    ours = chosen.worker == "polyattn"
    options = {"policy": chosen.policy, "degree": chosen.degree, "seed": chosen.seed}
    compiled = torch.compile(model, backend=chosen.worker, options=options if ours else None)
    before = resident()
    memory: dict[str, int] = {}
    losses, seconds, cores = [], [], []
    for step, (inputs, targets) in enumerate(batches):
        if step == WARM_UP:
            memory["compiling"] = peak() - before
            forget_peak()
        sys.stdin.readline()
        start, busy = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = gpt_model.loss_of(compiled(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        cores.append((time.process_time() - busy) / seconds[-1])
        memory["training"] = peak() - before
        tell({"step": step + 1, "loss": losses[-1]})
    results: dict[str, Any] = {
        "losses": losses,
        "seconds": seconds,
        "cores": cores,
        "memory": memory,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text bytes": len(text),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    if ours:
        import polyattn

        report = polyattn.reports()[-1]
        results |= {"report": str(report), "sites": report.to_dict()["sites"], "polyattn": polyattn.__version__}
        errors = {"start": attention_errors(untrained, batches[0][0], chosen)}
        results["errors"] = errors | {"end": attention_errors(model, batches[-1][0], chosen)}
    tell({"results": results})
    return results


def tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


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


class Worker:
    """A run in another process that takes a step when it is told to."""

    def __init__(self, backend: str, chosen: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", backend]
        for name in ("context", "steps", "learning_rate", "seed", "policy", "degree"):
            if (value := getattr(chosen, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        # threads that spin long at every barrier make steps 20 times slower when another process takes one of the cores
        environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
        self.backend = backend
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> float:
        """The loss of one more step. Raises SystemExit when the run has failed."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the run has ended: `listen` says so
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return float(self.listen("loss"))

    def results(self) -> dict[str, Any]:
        """What :func:`work` returned. Raises SystemExit when the run has failed."""
        found: dict[str, Any] = self.listen("results")
        self.process.communicate()
        return found

    def listen(self, wanted: str) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and wanted in (event := json.loads(line)):
                return event[wanted]
        raise SystemExit(f"the run with {self.backend} failed (exit status {self.process.wait()}); see above")


def run(chosen: argparse.Namespace, progress: Progress) -> dict[str, dict[str, Any]]:
    """The results of both runs, which take their steps in turn."""
    workers = [Worker(backend, chosen) for backend in BACKENDS]
    tasks = [progress.add_task(worker.backend, total=chosen.steps, status="compiling") for worker in workers]
    try:
        for _ in range(chosen.steps):
            for worker, task in zip(workers, tasks, strict=True):
                progress.update(task, advance=1, status=f"loss {worker.step():.3f}")
        results = {}
        for worker, task in zip(workers, tasks, strict=True):
            progress.update(task, status="measuring the errors" if worker.backend == "polyattn" else "")
            results[worker.backend] = worker.results()
            progress.update(task, status=f"loss {results[worker.backend]['losses'][-1]:.3f}")
        return results
    finally:
        for worker in workers:
            worker.process.kill()


def show(console: Console, chosen: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Everything but the plot."""
    inductor, ours = results["inductor"], results["polyattn"]
    console.rule("what became of the attention")
    console.print(ours["report"], highlight=False, markup=False, soft_wrap=True)

    console.rule("loss, nats per byte")
    curves = Table("step", *BACKENDS, "difference")
    differences = [right - left for left, right in zip(inductor["losses"], ours["losses"], strict=True)]
    largest = max(range(chosen.steps), key=lambda step: abs(differences[step]))
    for step in sorted({*sampled(chosen.steps), largest}):  # the step where they differ most is never left out
        left, right = inductor["losses"][step], ours["losses"][step]
        curves.add_row(str(step + 1), f"{left:.4f}", f"{right:.4f}", f"{differences[step]:+.4f}")
    console.print(curves)

    console.rule("time and memory")
    table = Table("", *BACKENDS, "inductor / polyattn")
    for label, of, form in measures():
        left, right = of(inductor), of(ours)
        table.add_row(label, form(left), form(right), f"{left / right:.2f}" if right > 0 else "")
    console.print(table)
    if busy_cores(inductor) < 0.75 * inductor["threads"]:  # exact attention keeps every core busy that it gets
        console.print(
            f"[bold]These times are not to be trusted:[/bold] inductor got less than {inductor['threads']} cores, so "
            "something else was using this machine. Run the demo again when it is idle.",
            highlight=False,
        )

    console.rule("low-rank against exact attention")
    show_errors(console, chosen, ours)

    console.rule("this run")
    console.print(
        f"{inductor['parameters']:,} parameters, context {chosen.context:,}, {chosen.steps} steps, "
        f"{inductor['text bytes']:,} bytes of Python's standard library, seed {chosen.seed}\n"
        f"{machine()}, {inductor['threads']} threads, Python {platform.python_version()}, torch {inductor['torch']}, "
        f"polyattn {ours['polyattn']}, {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}\n",
        highlight=False,
    )
    ratio = median_step(inductor) / median_step(ours)
    words = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times as long as"
    verb = "is" if ratio >= 1 else "takes"
    console.print(
        f"[bold]At {chosen.context:,} tokens a training step with polyattn {verb} {words} one with inductor alone;"
        f"[/bold] the losses differ by {differences[-1]:+.4f} at the last step, and by {differences[largest]:+.4f} at "
        f"step {largest + 1}, the most.",
        highlight=False,
    )


def show_errors(console: Console, chosen: argparse.Namespace, ours: dict[str, Any]) -> None:
    """The measured errors per site, beside what the options allow."""
    table = Table("site", "verdict", "error: start", "end", "relative: start", "end")
    above = []
    start, end = ours["errors"]["start"], ours["errors"]["end"]
    for number, (site, first, last) in enumerate(zip(ours["sites"], start, end, strict=True), start=1):
        cells = [scientific(of[name]) for name in ("error", "relative_error") for of in (first, last)]
        table.add_row(str(number), site["verdict"], *cells)
        if site["verdict"] == "low_rank" and (last["error"] or 0.0) > site["tolerance"]:
            above.append(str(number))
    console.print(table)
    allowed = ours["sites"][0]["tolerance"] if ours["sites"] else None
    console.print(
        "Worst of the sampled rows of one batch; error in units of the largest distance of a value from the mean "
        f"value, relative to what is not mean pooling. {allowed} is allowed; the first call and every few after it are "
        "audited.",
        highlight=False,
    )
    if above:
        console.print(
            f"[bold]Low rank at the end, but above that: site {', '.join(above)}.[/bold] It no longer follows exact "
            "attention there, which no audit has seen yet.",
            highlight=False,
        )


def measures() -> list[tuple[str, Callable[[dict[str, Any]], float], Callable[[float], str]]]:
    """Rows of the table: label, what it is of the results of a run, how it is written."""

    def seconds(value: float) -> str:
        return f"{value:.2f} s"

    def mebibytes(value: float) -> str:
        return f"{value / 2**20:.0f} MiB"

    return [
        ("median step", median_step, seconds),
        ("fastest step", lambda run: min(run["seconds"][WARM_UP:]), seconds),
        ("median CPU time of a step, all cores", cpu_step, seconds),
        ("busy cores, median", busy_cores, "{:.2f}".format),
        (f"first {WARM_UP} steps, with compilation", lambda run: sum(run["seconds"][:WARM_UP]), seconds),
        ("peak memory of a step, above the model", lambda run: run["memory"]["training"], mebibytes),
        ("peak memory while compiling", lambda run: run["memory"]["compiling"], mebibytes),
    ]


def median_step(run: dict[str, Any]) -> float:
    return float(statistics.median(run["seconds"][WARM_UP:]))


def cpu_step(run: dict[str, Any]) -> float:
    """What a step costs whoever else uses the machine: seconds times busy cores."""
    steps = zip(run["seconds"][WARM_UP:], run["cores"][WARM_UP:], strict=True)
    return float(statistics.median(wall * cores for wall, cores in steps))


def busy_cores(run: dict[str, Any]) -> float:
    return float(statistics.median(run["cores"][WARM_UP:]))


def sampled(steps: int, rows: int = 12) -> list[int]:
    """About ``rows`` steps, evenly, with the first and the last."""
    return sorted({round(index * (steps - 1) / (rows - 1)) for index in range(rows)})


def scientific(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"


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
