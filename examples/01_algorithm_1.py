"""01: Algorithm 1 of arXiv 2408.13233 on an ordinary model: every layer's gradient through low-rank attention.

    python examples/01_algorithm_1.py            # minutes; the plot goes to out/algorithm_1.png
    python examples/01_algorithm_1.py --quick    # the same in small, seconds

A model that knows nothing of polyattn (``paper_model.py``) has layers softmax(X W Xᵀ) X W_V. Compiled with polyattn,
the gradients of X, W and W_V in every layer, under three losses, are compared with float64 autograd through exact
attention; then the algebra's own five terms of dX; several heads, a causal mask, prompt tuning; and Theorem 4.2 as an
experiment: error over layers and degree, time over tokens. Every number is what this machine computed.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paper_extensions
import paper_model
import paper_terms
import theorem_4_2
import torch
from machine import machine
from paper_gradients import COMPONENTS, DEGREES, GRADIENTS, compiled, errors, gradients, largest_logits
from paper_model import Config, Model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import polyattn

Errors = dict[tuple[str, str, int], dict[tuple[int, str], float]]
"""(loss, gradient, degree) → (layer, component) → relative error."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what it prints, by section."""
    chosen = arguments().parse_args(argv)
    tokens, config = chosen.tokens, Config(layers=chosen.layers)
    console = Console(width=None if sys.stdout.isatty() else 120)

    console.rule("[bold]1. what became of the attention")
    report = explain(console, config, tokens)
    console.rule("[bold]2. gradients of every layer against float64 autograd through exact attention")
    found = every_gradient(config, tokens)
    exceptions = show_errors(console, config, found)
    console.rule("[bold]3. the algebra's own gradients of one layer")
    terms = paper_terms.five_terms()
    show_terms(console, terms)
    console.rule("[bold]4. several heads, a causal mask, prompt tuning")
    names = list(paper_extensions.VARIANTS)
    names, degrees = (names[-2:], (2,)) if chosen.quick else (names, (2, 4))
    variants = paper_extensions.variants(config, tokens, names, degrees)
    show_variants(console, variants)
    tuned = paper_extensions.prompt_tuning(config, tokens)
    show_prompt_tuning(console, config, tokens, tuned)
    console.rule("[bold]5. Theorem 4.2 as an experiment")
    grown, measured = experiment(console, config, tokens, chosen.quick)
    show_experiment(console, config, grown, measured)
    theorem_4_2.plot(grown, measured, config.layers, Path(chosen.out))
    console.print(f"\nplot: {chosen.out}")
    return {
        "report": report,
        "errors": found,
        "exceptions": exceptions,
        "terms": terms,
        "variants": variants,
        "prompt": tuned,
        "growth": grown,
        "times": measured,
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=96, help="of the models of 1, 2, 4 and 5ab (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer degrees, layers, seeds, and short sequences")
    parser.add_argument("--out", default="out/algorithm_1.png", help="the plot (default: %(default)s)")
    return parser


# ── 1 and 2 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def explain(console: Console, config: Config, tokens: int) -> polyattn.Report:
    model, x = Model(config).double(), paper_model.inputs(config, tokens).double()
    offsets = [torch.zeros_like(x)] * config.layers
    report = polyattn.explain(model, x, offsets, options={"policy": "low_rank", "degree": 2})
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    logits = ", ".join(f"{value:.2f}" for value in largest_logits(model, x))
    console.print(f"largest logit of every layer (the bounded-entries regime): {logits}", highlight=False)
    return report


def every_gradient(config: Config, tokens: int) -> Errors:
    """Both gradients, all degrees, all losses; a compiled model is used for all losses."""
    model, x = Model(config).double(), paper_model.inputs(config, tokens).double()
    losses = paper_model.losses(config, tokens)
    exact = {name: gradients(model, model, x, loss) for name, loss in losses.items()}
    found = {}
    for gradient in GRADIENTS:
        for degree in DEGREES:
            run = compiled(model, degree, gradient)
            for name, loss in losses.items():
                found[name, gradient, degree] = errors(gradients(run, model, x, loss), exact[name])
    return {key: found[key] for key in sorted(found, key=lambda key: list(losses).index(key[0]))}


def show_errors(console: Console, config: Config, found: Errors) -> list[str]:
    """A table per loss; returns where a higher degree has no smaller error."""
    for loss in dict.fromkeys(loss for loss, _, _ in found):
        table = Table("layer", "")
        for gradient in GRADIENTS:
            for degree in DEGREES:
                table.add_column(f"{gradient}\ndegree {degree}" if degree == DEGREES[0] else f"\n{degree}")
        for layer in range(config.layers):
            for component in COMPONENTS:
                cells = [
                    found[loss, gradient, degree][layer, component] for gradient in GRADIENTS for degree in DEGREES
                ]
                last = component == COMPONENTS[-1]
                table.add_row(str(layer + 1), component, *(f"{cell:.1e}" for cell in cells), end_section=last)
        titled(console, f"{loss}: relative errors", table)
    exceptions = [
        f"{loss}, {gradient}, layer {layer + 1}, {component}: degree {degree}"
        for (loss, gradient, degree), cells in found.items()
        for (layer, component), error in cells.items()
        if degree > 1 and not error < found[loss, gradient, degree - 1][layer, component]
    ]
    if exceptions:
        console.print("A higher degree has no smaller error here: " + "; ".join(exceptions), highlight=False)
    else:
        console.print(
            "[bold]Every error decreases with the degree[/bold], in every layer, for X, W and W_V, for every loss, for "
            "both gradients.",
            highlight=False,
        )
    console.print(
        "consistent: the gradient of the function that is computed. substituted (the paper's): the low-rank form in "
        "the exact gradient.",
        highlight=False,
    )
    return exceptions


# ── 3 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def show_terms(console: Console, terms: paper_terms.Terms) -> None:
    def plain(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    plain("softmax(X W Xᵀ) X W_V, derived in these steps:")
    for number, step in enumerate(terms.steps, start=1):
        plain(f"  {number}. {step.rule}: {step.note}")
    plain("\nthe last program, in index notation (a repeated index that is not on the left is summed over):")
    for name, expression in terms.steps[-1].program.expressions():
        plain(f"  {name:<5} {expression}")
    plain("\nthe five terms of dX: as the paper writes them; as traced; after the rewrite, with no pair of tokens left")
    for number, name in enumerate(paper_terms.TERMS, start=1):
        plain(f"  {number}. {name}")
        plain(f"       traced    {terms.exact[name]}   (off the formula by {terms.exact_errors[name]:.0e})")
        plain(f"       low rank  {terms.low_rank[name]}   (by {terms.low_rank_errors[name]:.1e})")
    off = ", ".join(f"{name} {error:.1e}" for name, error in terms.gradient_errors.items())
    plain(f"evaluated, against float64 autograd through exact attention: {off}")


# ── 4 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def show_variants(console: Console, variants: dict[tuple[str, str, int], dict[str, float]]) -> None:
    table = Table("model", "gradient", "degree", *COMPONENTS)
    for (name, gradient, degree), worst in variants.items():
        table.add_row(name, gradient, str(degree), *(f"{worst[component]:.1e}" for component in COMPONENTS))
    titled(console, "relative errors of the worst layer, cross-entropy", table)


def show_prompt_tuning(
    console: Console, config: Config, tokens: int, tuned: dict[str, paper_extensions.Trained]
) -> None:
    table = Table("trained", "asked of the attentions", "FLOPs around them", "of them", "all", "no gradient", "error")
    for name, one in tuned.items():
        asked = [" ".join(w for w, need in zip(("dQ", "dK", "dV"), needs, strict=True) if need) for needs in one.needs]
        error = "" if one.prompt_error is None else f"{one.prompt_error:.1e}"
        numbers = [f"{value:,}" for value in (one.around, one.attention, one.total, one.weights_without)]
        table.add_row(name, "\n".join(asked), *numbers, error, end_section=True)
    titled(
        console,
        "one backward, degree 2, substituted: what each layer's attention is asked for, floating point operations, how "
        "many\nparameters get no gradient, relative error of the prompt's gradient",
        table,
    )
    every, alone = paper_extensions.algebra_flops(tokens, config.width)
    console.print(
        f"In the algebra, dX alone costs {alone:,} FLOPs of a layer's backward, dX, dW and dW_V {every:,}. X feeds "
        "queries, keys and values, so that prompt tuning needs all of dQ, dK and dV: what it saves is dW, dW_V and the "
        "gradients of the MLP's weights, half of the products around the attentions.",
        highlight=False,
    )
    sizes = (tokens, tokens, config.width, config.width, 2)
    for gradient in GRADIENTS:
        every, alone = (paper_extensions.backward_flops(w, *sizes, gradient) for w in (("dQ", "dK", "dV"), ("dQ",)))
        console.print(
            f"Where the trained input feeds the queries alone (keys and values are a frozen text's), the {gradient} "
            f"backward computes dQ only: {alone:,} FLOPs in place of {every:,}.",
            highlight=False,
        )


# ── 5 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def experiment(
    console: Console, config: Config, tokens: int, quick: bool
) -> tuple[theorem_4_2.Errors, theorem_4_2.Times]:
    layers = sorted({1, config.layers}) if quick else sorted({*range(1, 9), config.layers})
    degrees, seeds = (1, 2) if quick else DEGREES, range(1 if quick else 3)
    sizes = [256, 512, 1024] if quick else [2**k for k in range(10, 17)]
    exact_up_to, repeats = (1024, 3) if quick else (2**14, 9)
    plans = sum(3 if size <= exact_up_to else 2 for size in sizes)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), console=console) as progress:
        grow = progress.add_task("error", total=len(layers) * len(GRADIENTS) * len(degrees), status="")
        clock = progress.add_task("time", total=plans * (repeats + 1), status="")
        grown = theorem_4_2.error_growth(
            config, tokens, layers, degrees, seeds, lambda word: progress.update(grow, advance=1, status=word)
        )
        measured = theorem_4_2.times(
            sizes, exact_up_to, repeats, lambda word: progress.update(clock, advance=1, status=word)
        )
    return grown, measured


def show_experiment(console: Console, config: Config, grown: theorem_4_2.Errors, measured: theorem_4_2.Times) -> None:
    layers = sorted({depth for _, _, depth in grown})
    seeds = len(next(iter(grown.values())))
    table = Table("gradient", "degree", *(f"L={depth}" for depth in layers))
    for gradient, degree in dict.fromkeys((gradient, degree) for gradient, degree, _ in grown):
        runs = [sorted(grown[gradient, degree, depth]) for depth in layers]
        table.add_row(gradient, str(degree), *(f"{run[len(run) // 2]:.1e}" for run in runs))
    titled(console, f"(a), (b): worst relative error over all gradients of L layers, median of {seeds} seeds", table)

    table = Table("tokens", "width", "bound B", "largest entry", "largest logit")
    for tokens, width, bound, entry, logit in measured.regime:
        table.add_row(f"{tokens:,}", str(width), f"{bound:.2f}", f"{entry:.2f}", f"{logit:.2f}")
    titled(console, "(c): width log₂ n, entries of X and X W at most B = (ln n)^¼ = o(√log n)", table)

    repeats = min(len(timing.seconds) for timing in measured.timings)
    table = Table("plan", "tokens", "seconds", "GFLOP", "GFLOP/s", "busy cores", "worst error")
    for timing in measured.timings:
        work = timing.flops / 1e9
        error = "" if timing.error is None else f"{timing.error:.1e}"
        cells = (f"{timing.median:.4f}", f"{work:.3g}", f"{work / timing.median:.3g}", f"{timing.busy:.2f}", error)
        table.add_row(timing.plan, f"{timing.tokens:,}", *cells)
    words = f"forward and backward of one layer, float32, degree {measured.degree}, medians of {repeats} repeats"
    titled(console, f"{words}; error: worst of dX, dW and dW_V", table)

    table = Table("plan", "sizes", "measured exponent of n", "expected from the FLOPs")
    for one in (*measured.fits, *measured.upper):
        slope = f"{one.slope:.2f} ± {one.error:.2f}"
        table.add_row(one.plan, f"{one.first:,} to {one.last:,}", slope, f"{one.expected:.2f}")
    titled(console, "time ~ n^exponent", table)
    console.print(
        "The FLOPs of low rank are n times powers of the width, hence n^(1+o(1)); at these sizes the logarithms still "
        "weigh. A measured exponent below the expected one means that larger matrices run at a higher rate (GFLOP/s). "
        "± is the standard error of the fit.",
        highlight=False,
    )
    threads = torch.get_num_threads()
    console.print(f"{machine()}, {threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
                  f"polyattn {polyattn.__version__}", highlight=False)  # fmt: skip
    disturbed = [timing for timing in measured.timings if timing.median > 0.02 and timing.busy < 0.8 * threads]
    if disturbed:
        console.print(
            f"[bold]These times are not to be trusted:[/bold] {len(disturbed)} of {len(measured.timings)} rows got "
            f"less than {threads} cores, so something else was using this machine. Run this again when it is idle.",
            highlight=False,
        )


def titled(console: Console, title: str, table: Table) -> None:
    console.print(f"\n{title}", highlight=False, markup=False)
    console.print(table)


if __name__ == "__main__":
    main()
