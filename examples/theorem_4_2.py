"""Theorem 4.2 as an experiment: how the gradient's error grows with layers and falls with the degree, and how the time
of forward and backward grows with the number of tokens when the width is log₂ n and entries are bounded.

The theorem promises an error below 1/poly(n) in time n^(1+o(1)) for entries o(√log n), with a degree that grows
slowly with n. Here the degree is fixed: its error is measured, and beside the measured exponent of the time stands the
one that the count of floating point operations predicts for these very sizes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import paper_model
import torch
import torch.nn.functional as F
from paper_gradients import GRADIENTS, Gradients, compiled, errors, gradients, relative
from paper_model import Config, Model

import polyattn
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import exact_cost, kernels
from polyattn.rewriter.algebra.expr import N_K, N_Q, R1, D, E, R
from polyattn.rewriter.algebra.monomials import full, rank
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.masks.mask import NONE

Tick = Callable[[str], None]
"""Called after every piece of work, with a word about it."""
Errors = dict[tuple[str, int, int], list[float]]
"""(gradient, degree, layers) → the worst relative error over all gradients of the model, one per seed."""
EXACT = "exact"


# ── (a), (b): error against layers and degree ─────────────────────────────────────────────────────────────────────────


def error_growth(
    base: Config, tokens: int, layers: Sequence[int], degrees: Sequence[int], seeds: Sequence[int], tick: Tick
) -> Errors:
    """The worst relative error over dX, dW and dW_V of every layer, under the cross-entropy."""
    found: Errors = {}
    for depth in layers:
        config = dataclasses.replace(base, layers=depth)
        model = Model(config).double()
        exact = [seeded_gradients(model, model, config, tokens, seed) for seed in seeds]
        for gradient in GRADIENTS:
            for degree in degrees:
                run = compiled(model, degree, gradient)
                low_rank = [seeded_gradients(run, model, config, tokens, seed) for seed in seeds]
                worst = [max(errors(*pair).values()) for pair in zip(low_rank, exact, strict=True)]
                found[gradient, degree, depth] = worst
                tick(f"{depth} layers, degree {degree}")
    return found


def seeded_gradients(run: Any, model: Model, config: Config, tokens: int, seed: int) -> Gradients:
    """With the weights, the input and the labels of a seed; the weights go into the model, compiled or not."""
    model.load_state_dict(Model(config, seed).state_dict())
    x = paper_model.inputs(config, tokens, seed).double()
    return gradients(run, model, x, paper_model.losses(config, tokens, seed)["cross-entropy"])


# ── (c): time against tokens ──────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer of the theorem's regime: n tokens, width ⌈c log₂ n⌉, entries of X and X W at most B = (ln n)^¼."""

    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """X, W and W_V; gradients are taken with respect to all three."""
    target: torch.Tensor
    bound: float

    @property
    def tokens(self) -> int:
        return self.weights[0].shape[0]

    @property
    def width(self) -> int:
        return self.weights[0].shape[1]

    def step(self, attention: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Forward and backward of softmax(X W Xᵀ / √d) X W_V under the L2 loss."""
        x, w, w_v = self.weights
        q, k, v = (y[None, None] for y in (x @ w, x, x @ w_v))  # [1, 1, tokens, width]
        out = attention(q, k, v, scale=self.width**-0.5)[0, 0]
        return torch.autograd.grad((out - self.target).square().sum() / 2, self.weights)

    def largest(self, rows: int = 256) -> tuple[float, float]:
        """The largest entry of X and X W, and the largest logit of the first rows."""
        x, w, _ = (y.detach() for y in self.weights)
        entries = max(float(x.abs().max()), float((x @ w).abs().max()))
        return entries, float((x[:rows] @ w @ x.T).abs().max()) * self.width**-0.5


def problem(tokens: int, c: float, seed: int) -> Problem:
    width = math.ceil(c * math.log2(tokens))
    bound = math.log(tokens) ** 0.25  # o(√log n), as the theorem asks
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, size: float) -> torch.Tensor:
        return size * (2 * torch.rand(shape, generator=generator) - 1)

    x = uniform(tokens, width, size=bound).requires_grad_()
    w = uniform(width, width, size=0.5 * width**-0.5).requires_grad_()
    w_v = uniform(width, width, size=width**-0.5).requires_grad_()
    return Problem((x, w, w_v), x.detach() @ uniform(width, width, size=width**-0.5), bound)


def attention_of(plan: str, degree: int) -> Callable[..., torch.Tensor]:
    if plan == EXACT:
        return F.scaled_dot_product_attention
    options = {"policy": "low_rank", "degree": degree, "gradient": plan, "audit_rows": 0}
    return lambda q, k, v, scale: polyattn.attention(q, k, v, scale=scale, options=options)


def flops(plan: str, tokens: int, width: int, degree: int) -> int:
    """Floating point operations of the attention's forward and backward."""
    cost = exact_cost(softmax(NONE)) if plan == EXACT else kernels(softmax(NONE), PolynomialRule(degree), plan).cost()
    sizes = {
        N_Q: tokens,
        N_K: tokens,
        D: width,
        E: width,
        R: rank(full(width, degree)),
        R1: rank(full(width, degree - 1)),
    }
    return int(cost.subs(sizes))


@dataclasses.dataclass
class Timing:
    """One plan at one size: seconds and busy cores of every repeat."""

    plan: str
    tokens: int
    width: int
    flops: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    cores: list[float] = dataclasses.field(default_factory=list)
    error: float | None = None
    """Worst relative error of dX, dW and dW_V against exact attention, where that ran."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def busy(self) -> float:
        """Busy cores, median."""
        return statistics.median(self.cores)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Exponents of n: measured (with its standard error), and expected from the FLOPs at the same sizes."""

    plan: str
    slope: float
    error: float
    expected: float
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Times:
    timings: list[Timing]
    fits: list[Fit]
    """One per plan, over all its sizes."""
    upper: list[Fit]
    """The same over the larger half of its sizes, where fixed costs weigh less."""
    regime: list[tuple[int, int, float, float, float]]
    """Per size: tokens, width, bound B, largest entry, largest logit seen."""
    degree: int

    def of(self, plan: str) -> list[Timing]:
        return [timing for timing in self.timings if timing.plan == plan]


def times(
    sizes: Sequence[int],
    exact_up_to: int,
    repeats: int,
    tick: Tick,
    *,
    c: float = 1.0,
    degree: int = 2,
    seed: int = 0,
    budget: float = 60.0,
) -> Times:
    """Every plan at every size, in turn, so that whatever else the machine does slows all of them.

    After ``budget`` seconds there are no further repeats, but there are three at least.
    """
    begun = time.perf_counter()
    problems = {tokens: problem(tokens, c, seed) for tokens in sizes}
    timings = []
    for tokens, one in problems.items():
        found = {}
        for plan in (EXACT, *GRADIENTS):
            if plan == EXACT and tokens > exact_up_to:
                continue
            found[plan] = one.step(attention_of(plan, degree))  # warms up, and gives the error
            timing = Timing(plan, tokens, one.width, flops(plan, tokens, one.width, degree))
            if plan != EXACT and EXACT in found:
                timing.error = max(map(relative, found[plan], found[EXACT]))
            timings.append(timing)
            tick(f"{tokens:,} tokens, {plan}")
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() - begun > budget:
            break
        for timing in timings if repeat % 2 == 0 else reversed(timings):
            one, attention = problems[timing.tokens], attention_of(timing.plan, degree)
            start, busy = time.perf_counter(), time.process_time()
            one.step(attention)
            timing.seconds.append(time.perf_counter() - start)
            timing.cores.append((time.process_time() - busy) / timing.seconds[-1])
            tick(f"{timing.tokens:,} tokens, {timing.plan}")
    regime = [(tokens, one.width, one.bound, *one.largest()) for tokens, one in problems.items()]
    by_plan = [[timing for timing in timings if timing.plan == plan] for plan in (EXACT, *GRADIENTS)]
    upper = [fit(some[len(some) // 2 :]) for some in by_plan if len(some) >= 5]  # three points or more
    return Times(timings, [fit(some) for some in by_plan], upper, regime, degree)


def fit(timings: Sequence[Timing]) -> Fit:
    """Least squares on logarithms: of the median seconds, and of the FLOPs."""
    n = [math.log(timing.tokens) for timing in timings]
    slope, error = line([math.log(timing.median) for timing in timings], n)
    expected, _ = line([math.log(timing.flops) for timing in timings], n)
    return Fit(timings[0].plan, slope, error, expected, timings[0].tokens, timings[-1].tokens)


def line(y: Sequence[float], x: Sequence[float]) -> tuple[float, float]:
    """Slope of the least squares line and its standard error (NaN for two points)."""
    slope, intercept = statistics.linear_regression(x, y)
    spread = sum((value - statistics.fmean(x)) ** 2 for value in x)
    rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(rest / (len(x) - 2) / spread) if len(x) > 2 else math.nan


# ── the plot ──────────────────────────────────────────────────────────────────────────────────────────────────────────

COLOURS = {1: "#9ecae1", 2: "#4292c6", 3: "#2171b5", 4: "#08306b"}
STYLES = {"substituted": "-", "consistent": "--"}
PLANS = {EXACT: "#222222", "consistent": "#d95f02", "substituted": "#1b9e77"}


def plot(grown: Errors, measured: Times, fixed: int, path: Path) -> None:
    """Three panels: (a) error over layers, (b) error over the degree, (c) time over tokens."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 4.6), layout="constrained")
        by_layers, by_degree, by_tokens = figure.subplots(1, 3)
        layers = sorted({depth for _, _, depth in grown})
        degrees = sorted({degree for _, degree, _ in grown})
        for gradient in GRADIENTS:
            for degree in degrees:
                runs = [grown[gradient, degree, depth] for depth in layers]
                look = {"color": COLOURS[degree], "linestyle": STYLES[gradient]}
                by_layers.plot(layers, [statistics.median(run) for run in runs], label=f"{gradient} {degree}", **look)
                by_layers.fill_between(layers, [*map(min, runs)], [*map(max, runs)], color=COLOURS[degree], alpha=0.15)
            runs = [grown[gradient, degree, fixed] for degree in degrees]
            by_degree.errorbar(
                degrees,
                [statistics.median(run) for run in runs],
                [
                    [statistics.median(run) - min(run) for run in runs],
                    [max(run) - statistics.median(run) for run in runs],
                ],
                marker="o",
                capsize=3,
                color=COLOURS[3],
                linestyle=STYLES[gradient],
                label=gradient,
            )
        by_layers.set(yscale="log", xlabel="layers", ylabel="worst relative error of a gradient", title="(a)")
        by_degree.set(yscale="log", xlabel="degree", xticks=degrees, title=f"(b) {fixed} layers")
        for one in measured.fits:
            timings = measured.of(one.plan)
            n = [timing.tokens for timing in timings]
            # both lines go through the middle of the measurements
            middle = [statistics.fmean(map(math.log, values)) for values in (n, [timing.median for timing in timings])]
            by_tokens.plot(n, [timing.median for timing in timings], "o", color=PLANS[one.plan])
            for slope, style, words in ((one.slope, "-", "measured"), (one.expected, ":", "FLOPs")):
                height = [math.exp(middle[1] + slope * (math.log(tokens) - middle[0])) for tokens in n]
                label = f"{one.plan}, {words}: n^{slope:.2f}"
                by_tokens.plot(n, height, style, color=PLANS[one.plan], label=label)
        by_tokens.set(xscale="log", yscale="log", xlabel="tokens n", ylabel="seconds, forward and backward")
        by_tokens.set(title=f"(c) one layer, width log₂ n, degree {measured.degree}")
        by_layers.set_ylim(min(map(min, grown.values())) / 50)  # room for the legend
        for axes, columns in ((by_layers, 2), (by_degree, 1), (by_tokens, 1)):
            axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left" if columns == 2 else "best")
        figure.savefig(path, dpi=150)
