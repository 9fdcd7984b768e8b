"""Run models in three ways from the same weights, and print a row for each: this is the process of one model.

Eager; ``torch.compile`` with polyattn (policy exact, inner compiler eager); stock ``torch.compile(backend="eager")``.
Attentions executed are counted in the eager run, from the outside (:mod:`count`). A site counts as often as its graph
runs: one compiled block may serve many layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch
from count import AttentionCounter
from rows import MARK, Row
from torch._dynamo.utils import counters

import polyattn
from polyattn.backend import polyattn as backend


def measure(name: str, implementation: str, mode: str) -> Row:
    """Run one model in the three ways; whatever goes wrong becomes the row's ``failure``."""
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
        observer = Observer()
        got, gradients = run(torch.compile(model, backend=observer), model, args, kwargs, mode)
        observer.fill(row)
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
    torch._dynamo.reset()
    counters.clear()
    polyattn.reset()
    model, args, kwargs = models.build(name, implementation)
    model.train(mode == "training")
    return model, args, kwargs


def run(call: Any, model: Any, args: Any, kwargs: Any, mode: str) -> tuple[list[Any], dict[str, Any]]:
    """Output tensors, and after training the gradients of all parameters by name."""
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
    return sum(counters["graph_break"].values())


def difference(got: list[Any], wanted: list[Any]) -> float:
    if len(got) != len(wanted) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(got, wanted)):  # noqa: B905
        raise AssertionError("the outputs differ in number, shape or dtype")
    return max((relative(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def relative(got: Any, wanted: Any, least: float = 1e-30) -> float:
    """Largest difference in units of the largest wanted value; NaN and infinities must stand at the same places."""
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


class Observer:
    """polyattn as a backend that counts how often each graph runs and keeps what stands around a refusal."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, list[int], list[dict[str, str]], dict[str, int]]] = []

    def __call__(self, gm: Any, inputs: Any) -> Any:
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


def main() -> int:
    """Measure the rows of the argument: a JSON list of (model, implementation, mode)."""
    for key in json.loads(sys.argv[1]):
        print(MARK + json.dumps(dataclasses.asdict(measure(*key))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
