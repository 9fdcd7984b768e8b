"""03: reading what was done to one attention: report, derivation step by step, costs, kernels, graph.

    python examples/03_reading.py [--tokens 256] [--site 0] [--degree 2] [--lines 12]

A small GPT (``gpt_model.py``, which does not import polyattn) is explained. Then everything that a site's report holds
is read aloud, and at the end its rewritten forward runs, as the graph that it is, on the queries, keys and values of
the model, and is compared with dense attention in float64. Low rank is forced: at so few tokens exact attention is
cheaper, and the costs below say so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gpt_model
import stdlib_text
import sympy
import torch
from rich.console import Console
from rich.table import Table

import polyattn
from polyattn.passes.derive import inspection
from polyattn.rewriter.algebra.monomials import full, rank

RULES: Mapping[str, str] = {
    "lift": "the traced aten graph becomes index notation: sums over products of factors with shared indices",
    "split": "a causal mask is a block-diagonal near field, which stays exact, and a far field of whole earlier chunks",
    "approximate": "the only step that changes a value: exp becomes a polynomial, here of small logits",
    "differentiate": "torch differentiates the function that will really be computed; nobody writes a backward",
    "inline": "an n × n intermediate gets no name, so that no order of contraction has to form it",
    "power": "products of scores under one sum are collected into one polynomial",
    "kronecker": "a polynomial of q·k is an inner product of monomials: the two tokens come apart",
    "absorb": "a factor per token moves to where it costs one multiplication per token",
    "compress": "columns that repeat monomials of a higher degree are read from there, not made again",
    "stack": "sums that differ in one narrow factor become one wider matrix product",
}
"""What every rule is for, in one line; what it does stands beside its number in the derivation."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what it read: the site, its steps, costs and kernels, and the error of its forward graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--site", type=int, default=0, help="which attention (default: %(default)s)")
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--lines", type=int, default=12, help="of a step that are shown (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)

    def plain(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        model = gpt_model.GPT(gpt_model.Config(context=chosen.tokens, width=64, heads=4))
    ((tokens, _),) = stdlib_text.batches(stdlib_text.read(100_000), chosen.tokens, 1, chosen.seed)
    options = {"policy": "low_rank", "degree": chosen.degree, "causal_chunk": max(1, chosen.tokens // 4)}
    report = polyattn.explain(model, tokens, options=options)
    site = report.sites[chosen.site]

    console.rule("[bold]the report")
    plain(report.summary())
    plain(str(site))

    console.rule("[bold]the derivation")
    steps = split(site.derivation)
    for (number, rule, note), body in steps:
        plain(f"\n{number}. {rule}: {note}")
        plain(f"   ({RULES[rule]})" if rule in RULES else "")
        shown = body[: chosen.lines]
        plain("\n".join(shown))
        if len(body) > len(shown):
            plain(f"     … {len(body) - len(shown)} more lines (--lines)")

    console.rule("[bold]the costs, per head")
    costs = costs_of(site)
    table = Table("", "FLOPs", "here", show_lines=True)
    for name, (formula, value) in costs.items():
        table.add_row(name, str(formula), f"{value:,}")
    console.print(table)
    plain(
        "A backward is given here all that its forward computed. Kernels form some of it again, and the report's FLOPs"
    )
    plain("include that. Exact costs count all pairs of tokens, the masked ones too; the report counts half of them.")

    console.rule("[bold]the kernels")
    kernels = site.kernels
    plain("names: " + ", ".join(kernels))
    for name, text in kernels.items():
        if "forward" in name:
            lines = text.splitlines()
            plain(f"\n{name}: the first {min(40, len(lines))} of {len(lines)} lines")
            plain("\n".join(f"    {line}" for line in lines[:40]))

    console.rule("[bold]the forward graph on the model's own tensors")
    graph = site.forward_graph
    assert graph is not None, f"this site is {site.verdict}: {site.reason}"
    q, k, v = queries_keys_values(model, tokens, chosen.site)
    with torch.no_grad():
        out, denominators = graph(q.unsqueeze(1), k, v)  # [heads, groups of queries, tokens, head_dim]
    wanted = dense(q.double(), k.double(), v.double(), site.scale)
    error = float((out.squeeze(1) - wanted).norm() / wanted.norm())
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    plain(f"{len(calls)} aten calls, the loop over chunks unrolled; the first ones:")
    plain("\n".join(f"    {node.format_node()}" for node in calls[:6]))
    plain(f"smallest denominator {float(denominators.min()):.3g} (it must be positive)")
    plain(f"|graph - dense| / |dense| = {error:.1e}, dense softmax attention in float64")
    return {
        "report": report,
        "site": site,
        "steps": [(rule, len(body)) for (_, rule, _), body in steps],
        "costs": costs,
        "kernels": kernels,
        "error": error,
    }


_HEADING = re.compile(r"(\d+)\. (\w+): (.*)")


def split(derivation: str) -> list[tuple[tuple[str, str, str], list[str]]]:
    """The steps of a derivation: (number, rule, note) and the lines below it."""
    steps: list[tuple[tuple[str, str, str], list[str]]] = []
    for line in derivation.splitlines():
        heading = _HEADING.fullmatch(line)
        if heading:
            steps.append(((heading[1], heading[2], heading[3]), []))
        elif steps and line and not line.startswith(" "):
            break  # what follows the last step (the costs) begins at the margin
        elif steps and line:
            steps[-1][1].append(line)
    return steps


def costs_of(site: polyattn.SiteReport) -> dict[str, tuple[sympy.Expr, int]]:
    """FLOPs per head of exact attention and of both low-rank plans: the formula, and its value at this site's sizes."""
    assert site.degree is not None, f"this site is {site.verdict}: {site.reason}"
    assert site.worst is not None, "the site has run"
    used = site.worst.plan
    derivation = inspection.derivation(used.form, used.family.rule, used.gradient)
    shape = {name: int(size) for name, size in site.shape.items()}
    sizes = {name: shape[name] for name in ("n_q", "n_k", "d", "e")}
    sizes |= {
        "r": rank(full(shape["d"], site.degree)),
        "r'": rank(full(shape["d"], site.degree - 1)),
        "C": site.chunk or 0,
    }
    return {
        name: (formula, int(formula.subs({symbol: sizes[str(symbol)] for symbol in formula.free_symbols})))
        for name, formula in derivation.costs().items()
    }


def queries_keys_values(
    model: gpt_model.GPT, tokens: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model feeds this layer's attention: three of [heads, tokens, head_dim], caught on their way."""
    attention = model.blocks[layer].attention
    assert isinstance(attention, gpt_model.Attention)
    caught: list[torch.Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        hook.remove()
    (projected,) = caught  # [1, tokens, 3 * width]
    q, k, v = (
        part[0].reshape(len(part[0]), attention.heads, -1).transpose(0, 1) for part in projected.chunk(3, dim=-1)
    )
    return q.contiguous(), k.contiguous(), v.contiguous()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax attention with its n × n matrix."""
    scores = (scale * q @ k.transpose(-2, -1)).masked_fill(
        torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1), float("-inf")
    )
    return torch.softmax(scores, dim=-1) @ v


if __name__ == "__main__":
    main()
