"""Compile the models of the zoo with polyattn, compare with eager, and count what was found.

    python tests/zoo/run.py bert gpt2            # some models (names may be prefixes), a table on the terminal
    python tests/zoo/run.py --write docs/zoo.md  # all of them, and the page
    python tests/zoo/run.py --details FILE ...   # appends every refusal and mismatch with code and graph around it

For each implementation of attention and for inference and training, a model runs three times from the same weights:
eager; ``torch.compile`` with polyattn (policy exact, inner compiler eager); stock ``torch.compile(backend="eager")``.
Attentions executed are counted in the eager run, from the outside (:mod:`count`). A site counts as often as its graph
runs: one compiled block may serve many layers. Each model has a process of its own and a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

MODES = ("inference", "training")
OUTPUT_TOLERANCE = 2e-5
"""Largest difference of an output, in units of its largest value: float32 rounding through a few layers."""
GRADIENT_TOLERANCE = 1e-4
"""Likewise for the gradient of a parameter; one much smaller than the others is measured in a hundredth of theirs."""
TIME_LIMIT = 300
PACKAGES = ("torch", "transformers", "diffusers", "x-transformers", "vit-pytorch", "timm", "einops")
COLUMNS = (
    *(
        "model",
        "attn_implementation",
        "mode",
        "attentions executed",
        "sites",
        "op / masked op / SDPA / as written",
        "refusals",
    ),
    *("outputs equal", "gradients equal", "graph breaks ours/stock"),
)
_MARK = "ZOO-ROW "


@dataclasses.dataclass
class Row:
    """One model, one implementation, one mode."""

    model: str
    implementation: str
    mode: str
    executed: int | None = None
    """Attentions that the eager forward pass executes."""
    captured: int | None = None
    """How many of them stock Dynamo puts into graphs (counted like ``executed``); the rest no backend sees."""
    sites: int | None = None
    """How many of them ran as sites of a compiled graph."""
    op: int = 0
    """Sites that became ``polyattn::attention``."""
    masked: int = 0
    """Sites that became ``polyattn::masked_attention``."""
    sdpa: int = 0
    """Sites that run as ``scaled_dot_product_attention``, put there or found there; the rest stays as written."""
    refused: int | None = None
    refusals: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """Reason, source line, node; code and graph around it."""
    spellings: list[str] = dataclasses.field(default_factory=list)
    output_error: float | None = None
    stock_error: float | None = None
    """By how much stock torch.compile itself differs from eager; it is what polyattn is compared with."""
    gradient_error: float | None = None
    worst_gradient: str = ""
    breaks: int | None = None
    stock_breaks: int | None = None
    graphs: int | None = None
    failure: str = ""
    seconds: float = 0.0

    @property
    def outputs_equal(self) -> bool | None:
        return None if self.output_error is None else self.output_error <= OUTPUT_TOLERANCE

    @property
    def gradients_equal(self) -> bool | None:
        return None if self.gradient_error is None else self.gradient_error <= GRADIENT_TOLERANCE

    @property
    def sound(self) -> bool:
        """Values and gradients are equal, no graph break is ours, every attention in a graph is found or refused."""
        return (
            not self.failure
            and bool(self.outputs_equal)
            and (self.mode == "inference" or bool(self.gradients_equal))
            and self.breaks == self.stock_breaks
            and self.captured == (self.sites or 0) + (self.refused or 0)
        )

    @property
    def complete(self) -> bool:
        """Sound, and every attention became a site."""
        return self.sound and self.sites == self.executed and not self.refusals


# ---------------------------------------------------------------------------------------------------------------------
# In the process of one model


def measure(name: str, implementation: str, mode: str) -> Row:
    """Run one model in the three ways; whatever goes wrong becomes the row's ``failure``."""
    import torch
    from count import AttentionCounter

    row = Row(name, implementation, mode)
    start = time.monotonic()
    step = "building"
    try:
        model, args, kwargs = fresh(name, implementation, mode)
        step = "the eager run"
        with AttentionCounter() as counter:
            eager, _ = run(model, model, args, kwargs, mode)
        row.executed = counter.count
        step = "the run compiled by stock torch.compile"
        model, args, kwargs = fresh(name, implementation, mode)
        counter = AttentionCounter()
        stock = torch.compile(model, backend=lambda gm, _: counted(gm, counter))
        wanted, wanted_gradients = run(stock, model, args, kwargs, mode)
        row.stock_error = difference(wanted, eager)
        row.captured, row.stock_breaks = counter.count, graph_breaks()
        step = "the run compiled by polyattn"
        model, args, kwargs = fresh(name, implementation, mode)
        watcher = Watcher()
        got, gradients = run(torch.compile(model, backend=watcher), model, args, kwargs, mode)
        watcher.fill(row)
        row.breaks = graph_breaks()
        row.output_error = difference(got, wanted)
        if mode == "training":
            row.gradient_error, row.worst_gradient = gradient_difference(gradients, wanted_gradients)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        row.failure = f"{row.failure} {step}: {type(error).__name__}: {lines[0][:200]}".strip()
    row.seconds = time.monotonic() - start
    return row


def fresh(name: str, implementation: str, mode: str) -> Any:
    """The model as if nothing had been compiled before."""
    import models
    import torch
    from torch._dynamo.utils import counters

    import polyattn

    torch._dynamo.reset()
    counters.clear()
    polyattn.reset()
    model, args, kwargs = models.build(name, implementation)
    model.train(mode == "training")
    return model, args, kwargs


def run(call: Any, model: Any, args: Any, kwargs: Any, mode: str) -> tuple[list[Any], dict[str, Any]]:
    """Output tensors, and after training the gradients of all parameters by name."""
    import torch

    with torch.set_grad_enabled(mode == "training"):
        outputs = [
            leaf for leaf in torch.utils._pytree.tree_leaves(call(*args, **kwargs)) if isinstance(leaf, torch.Tensor)
        ]
        gradients = {}
        if mode == "training":
            generator = torch.Generator().manual_seed(4)
            loss = sum(
                (out * torch.randn(out.shape, generator=generator)).sum() for out in outputs if out.requires_grad
            )
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [out.detach() for out in outputs], gradients


def counted(gm: Any, counter: Any) -> Any:
    """Stock ``backend="eager"``, each run of a graph under the counter."""

    def call(*args: Any) -> Any:
        with counter:
            return gm.forward(*args)

    return call


def graph_breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def difference(got: list[Any], wanted: list[Any]) -> float:
    if len(got) != len(wanted) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(got, wanted)):  # noqa: B905
        raise AssertionError("the outputs differ in number, shape or dtype")
    return max((relative(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def relative(got: Any, wanted: Any, least: float = 1e-30) -> float:
    """Largest difference in units of the largest wanted value; NaN and infinities must stand at the same places."""
    import torch

    got, wanted = got.double(), wanted.double()
    finite = wanted.isfinite()
    same = torch.equal(got.isfinite(), finite) and torch.equal(got.isnan(), wanted.isnan())
    if not same:
        return float("inf")
    if not finite.any():
        return 0.0
    error = (got[finite] - wanted[finite]).abs().max().item()
    return error / max(wanted[finite].abs().max().item(), least)


def gradient_difference(got: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, str]:
    largest = max((float(g.abs().max()) for g in wanted.values() if g is not None), default=0.0)
    worst = (0.0, "")
    for name, gradient in wanted.items():
        other = got[name]
        if (gradient is None) != (other is None):
            # what eager does not reach may be reached with zeros, and the other way round
            present = gradient if other is None else other
            error = float("inf") if present.abs().max() > 0 else 0.0
        elif gradient is None:
            error = 0.0
        else:
            error = relative(other, gradient, least=max(largest / 100, 1e-30))
        worst = max(worst, (error, name))
    return worst


class Watcher:
    """polyattn as a backend that counts how often each graph runs and keeps what stands around a refusal."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, list[int], list[dict[str, str]], dict[str, int]]] = []

    def __call__(self, gm: Any, inputs: Any) -> Any:
        import polyattn
        from polyattn.backend import polyattn as backend

        compiled = backend(gm, inputs, options={"policy": "exact", "inner": "eager"})
        report = polyattn.reports()[-1]
        runs = [0]
        self.seen.append((report, runs, surroundings(gm, inputs, report), calls(compiled)))

        def running(*args: Any) -> Any:
            runs[0] += 1
            return compiled(*args)

        return running

    def fill(self, row: Row) -> None:
        row.graphs = len(self.seen)
        row.sites = row.refused = 0
        for report, (runs,), refusals, found in self.seen:
            row.sites += runs * len(report.sites)
            row.refused += runs * len(report.refusals)
            row.op += runs * found["op"]
            row.masked += runs * found["masked"]
            row.sdpa += runs * found["sdpa"]
            row.refusals += refusals
            row.spellings += [f"{site.spelling} [{site.mask}]" for site in report.sites]
        row.failure = "; ".join(report.failure for report, *_ in self.seen if report.failure)


def calls(compiled: Any) -> dict[str, int]:
    """How often the compiled graph (inner compiler eager: the ``forward`` of a graph module) calls each attention."""
    import torch

    found = {"op": 0, "masked": 0, "sdpa": 0}
    module = getattr(compiled, "__self__", None)
    if isinstance(module, torch.nn.Module):
        graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
        nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function" and node.users]
        targets = [str(node.target) for node in nodes]
        found["op"] = targets.count("polyattn.attention.default")
        found["masked"] = targets.count("polyattn.masked_attention.default")
        found["sdpa"] = sum("scaled_dot_product_attention" in target for target in targets)
    return found


def surroundings(gm: Any, inputs: Any, report: Any) -> list[dict[str, str]]:
    """The refusals of a report, each with the lines of code and of the normalised graph around its node."""
    found = [{"reason": r.reason, "where": r.where, "node": r.node} for r in report.refusals]
    if not found:
        return []
    try:
        from polyattn.passes.match.anchors import SOFTMAX
        from polyattn.passes.match.scores import FLOWS
        from polyattn.passes.prepare.normalize import normalize
        from polyattn.passes.prepare.products import unify_products

        normal = normalize(gm, inputs)
        unify_products(normal.graph, FLOWS, SOFTMAX)
        nodes = list(normal.graph.nodes)
        names = [node.name for node in nodes]
        for entry in found:
            if entry["node"] in names:
                at = names.index(entry["node"])
                lines = [described(node, number == at) for number, node in enumerate(nodes)]
                entry["graph"] = "\n".join(lines[max(at - 16, 0) : at + 9])
                entry["code"] = code(nodes[at])
    except Exception as error:  # the row must not be lost for a missing excerpt
        found[0]["graph"] = f"no excerpt: {type(error).__name__}: {error}"
    return found


def described(node: Any, marked: bool) -> str:
    value = node.meta.get("val")
    shape = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "dtype") else str(value)
    return f"{'>>' if marked else '  '} {node.name}: {shape} = {node.target}{node.args}{node.kwargs or ''}"


def code(node: Any) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if f"{os.sep}torch{os.sep}" not in f[0]] or frames
    if not frames:
        return ""
    path, line = frames[-1][0], int(frames[-1][1])
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return f"# {path}:{line}\n" + "\n".join(lines[max(line - 12, 0) : line + 6])


def child(wanted: list[tuple[str, str, str]]) -> None:
    for key in wanted:
        print(_MARK + json.dumps(dataclasses.asdict(measure(*key))), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The process that starts them


def start(wanted: list[tuple[str, str, str]], time_limit: float = TIME_LIMIT) -> list[Row]:
    """Rows (model, implementation, mode) measured in one process; those that do not come back say why."""
    command = [sys.executable, str(HERE / "run.py"), "--child", json.dumps(wanted)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=time_limit, cwd=ROOT, env=environment, check=False
        )
        text, problem = done.stdout, "" if done.returncode == 0 else f"exit {done.returncode}: {last(done.stderr)}"
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        problem = f"stopped after {time_limit:g} s"
    rows = [Row(**json.loads(line.removeprefix(_MARK))) for line in text.splitlines() if line.startswith(_MARK)]
    have = {(row.model, row.implementation, row.mode) for row in rows}
    return rows + [Row(*key, failure=problem or "no result") for key in wanted if tuple(key) not in have]


def every_row(entry: Any) -> list[tuple[str, str, str]]:
    """All rows of an entry of the zoo."""
    return [(entry.name, implementation, mode) for implementation in entry.implementations for mode in MODES]


def last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def start_all(names: list[str], jobs: int, time_limit: float, details: Path | None) -> list[Row]:
    import models
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    by_name: dict[str, list[Row]] = {}
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("models", total=len(names))
        waiting = {pool.submit(start, every_row(models.ZOO[name]), time_limit): name for name in names}
        for future in as_completed(waiting):
            name = waiting[future]
            by_name[name] = future.result()
            if details is not None:
                with details.open("a", encoding="utf-8") as file:
                    file.write(explained(by_name[name]))
            progress.update(task, advance=1, description=name)
    return [row for name in names for row in by_name[name]]


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


# ---------------------------------------------------------------------------------------------------------------------
# The page


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


def chosen(wanted: list[str]) -> list[str]:
    import models

    if not wanted:
        return list(models.ZOO)
    names = [name for name in models.ZOO if any(name == w or name.startswith(w + ",") for w in wanted)]
    return names or [name for name in models.ZOO if any(name.startswith(w) for w in wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the models of the zoo with polyattn and compare with eager.")
    parser.add_argument("names", nargs="*", help="models (all); `llama` also means `llama, padded`")
    parser.add_argument("--write", type=Path, help="write the page here")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--details", type=Path, help="append refusals and differences with code and graphs here")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds for one model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child([(name, implementation, mode) for name, implementation, mode in json.loads(options.child)])
        return 0
    begin = time.monotonic()
    rows = start_all(chosen(options.names), options.jobs, options.time_limit, options.details)
    minutes = (time.monotonic() - begin) / 60
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1), encoding="utf-8")
    if options.write:
        options.write.write_text(page(rows, minutes), encoding="utf-8")
    for row in rows:
        print(table_row(row))
    complete = sum(row.complete for row in rows)
    sound = sum(row.sound for row in rows)
    print(f"{complete} of {len(rows)} rows complete, {sound} sound, in {minutes:.1f} minutes")
    return 0 if sound == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
