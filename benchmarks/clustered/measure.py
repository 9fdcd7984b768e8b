"""How accurate clustered attention is on trained heads, how many pairs it computes exactly, and what it costs.

python benchmarks/clustered/measure.py [--every 4] [--threads 1] [--write docs/clustered.md]

The heads are those of the encoder that benchmarks/accuracy.py measures (d = 32), on 8 windows of 512 tokens joined to
4,096 and on 32 joined to 16,384. Before anything is measured, the batched form is compared with the oracle in float64.
Errors are those of ``polyattn.Errors``, against exact attention in float64. Gradients are compared with exact ones for
two gradients of the output: smooth, tanh of a fixed linear function of the output, and white noise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import heads

from clustered import causal, costs, dense, fields, gradients, page, plan
from clustered.causal import CausalSetting
from clustered.moments import key_moments, pseudo_keys, query_moments
from clustered.plan import Setting

Operands = tuple[Tensor, Tensor, Tensor]
"""q (with the scale), k and v of heads, [H, n, d]."""

COARSE, FINE = Setting(), Setting(32, 32, 2.6e-3, "refined tree")
NARROW_KEYS = Setting(64, 16, 1.4e-3, "refined tree")
SETTINGS = {
    4096: (
        Setting(tau=3e-3, exponent=1.0),
        COARSE,
        Setting(tau=4.3e-3, grouping="refined tree"),
        FINE,
        NARROW_KEYS,
        Setting(tau=4.3e-3, grouping="k-means"),
        Setting(32, 32, 3e-3, "k-means"),
    ),
    16384: (
        Setting(tau=2e-3),
        Setting(tau=4.5e-3, ratio=5.0),
        Setting(64, 32, 3e-3, "refined tree", ratio=5.0),
        Setting(64, 16, 2.4e-3, "refined tree", ratio=5.0),
        Setting(tau=4.5e-3, grouping="k-means", ratio=5.0),
    ),
}
"""By tokens."""
OTHER_TEXT = (COARSE, FINE, NARROW_KEYS)
CAUSAL = (
    CausalSetting(),
    CausalSetting(tau=6e-3),
    CausalSetting(width_k=32, tau=3.5e-3),
    CausalSetting(width_q=16, width_k=16, cluster=32, tau=1.4e-3),
)
GRADIENTS = (COARSE, FINE, NARROW_KEYS)
TIMED = {
    4096: (COARSE, FINE),
    16384: (Setting(tau=4.5e-3, ratio=5.0), Setting(128, 128, 4.3e-3)),
}
REPEATS, TIMED_HEADS = 2, 6
GATE = 1e-9
"""Relative error against the oracle that is allowed in float64."""


def read(tokens: int, every: int, text: int = 0) -> list[Operands]:
    """Every so many of the encoder's heads, each by itself: [1, n, d]."""
    layers = heads.encoder(text, tokens // heads.LENGTH)
    q, k, v = (torch.cat([layer[i][0] for layer in layers])[every // 2 :: every] for i in range(3))
    return list(zip((q * q.shape[-1] ** -0.5).split(1), k.split(1), v.split(1), strict=True))


def exact(x: Operands, *, is_causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(*(y[None] for y in x), scale=1.0, is_causal=is_causal)[0]


def relative(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


def gate(sample: Sequence[Operands]) -> None:
    """Compare output, near pairs, gradient and causal output with the oracle, on the first 512 tokens of heads.

    Raises:
        SystemExit: they are not the same.
    """
    q, k, v = (torch.cat([head[i][:, :512] for head in sample]).double() for i in range(3))
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=v.dtype)
    errors: dict[str, float] = {}
    for setting in (Setting(32, 16, 1e-2), Setting(32, 16, 1e-2, "k-means")):
        made = plan.make(q, k, v, setting)
        errors[f"output, {setting.grouping}"] = relative(fields.output(q, k, v, made), dense.planned(q, k, v, made))
        wanted = dense.planned_gradient(q, k, v, g, made)
        for name, x, y in zip(("dQ", "dK", "dV"), gradients.substituted(q, k, v, g, made, 0), wanted, strict=True):
            errors[f"{name}, {setting.grouping}"] = relative(x, y)
        if not torch.equal(dense.planned_scores(q, k, v, made, setting) > setting.tau, made.near):
            raise SystemExit(f"the near pairs of {setting} are not those of the oracle's scores")
    in_segments = CausalSetting(segment=128, width_q=16, width_k=16, cluster=16, tau=1e-2)
    out, segments = causal.output(q, k, v, in_segments)
    errors["causal output"] = relative(out, dense.causal(q, k, v, segments, in_segments))
    wrong = {name: error for name, error in errors.items() if not error <= GATE}
    if wrong:
        raise SystemExit(f"the batched form is not the oracle's: {wrong}")


def add_errors(to: page.Quality, out: Tensor, wanted: Tensor, v: Tensor, shares: tuple[Tensor, Tensor]) -> None:
    """One more head: its errors, and its shares of pairs."""
    import polyattn

    found = polyattn.Errors.of(out[None], wanted[None], v[None])
    to.additive.append(float(found.additive))
    to.relative.append(float(found.relative))
    to.pairs.append(float(shares[0]))
    to.executed.append(float(shares[1]))


@torch.no_grad()
def accuracy(sample: Sequence[Operands], text: int, settings: Sequence[Setting]) -> Iterator[page.Accuracy]:
    """Each setting on these heads."""
    wanted = [exact(tuple(y.double() for y in x)) for x in sample]
    for setting in settings:
        n, d, e = sample[0][0].shape[1], sample[0][0].shape[2], sample[0][2].shape[2]
        row = page.Accuracy(n, text, setting)
        for x, reference in zip(sample, wanted, strict=True):
            made = plan.make(*x, setting)
            shares = plan.near_shares(made, n, n)
            add_errors(row.quality, fields.output(*x, made), reference, x[2], shares)
            tiles, executed = (made.near.shape[1], made.near.shape[2]), float(shares[1])
            row.forward.append(sum(costs.forward(n, d, e, tiles, executed, setting).values()))
            row.backward.append(sum(costs.backward(n, d, e, tiles, executed).values()))
        yield row


@torch.no_grad()
def causal_accuracy(sample: Sequence[Operands]) -> Iterator[page.Causal]:
    """Each causal setting on these heads."""
    wanted = [exact(tuple(y.double() for y in x), is_causal=True) for x in sample]
    for setting in CAUSAL:
        n = sample[0][0].shape[1]
        row = page.Causal(n, setting)
        for x, reference in zip(sample, wanted, strict=True):
            out, segments = causal.output(*x, setting)
            add_errors(row.quality, out, reference, x[2], causal.near_shares(segments, n, setting))
        yield row


def cotangents(out: Tensor) -> dict[str, Tensor]:
    """A smooth gradient of the output [1, n, e], and white noise."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.randn(out.shape[2], out.shape[2], generator=generator, dtype=torch.float64)
    turned = (out - out.mean(1, keepdim=True)) @ turn.to(out.dtype)
    white = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return {"smooth": torch.tanh(turned / turned.square().mean().sqrt()), "white": white.to(out.dtype)}


def differentiated(output: Callable[..., Tensor], x: Sequence[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    leaves = [y.detach().clone().requires_grad_() for y in x]
    return torch.autograd.grad(output(*leaves), leaves, g)


def gradient_errors(sample: Sequence[Operands], setting: Setting) -> list[page.Gradient]:
    """Every form of the gradient on these heads, with two cotangents."""
    found: dict[tuple[str, str], page.Gradient] = {}
    for x in sample:
        made = plan.make(*x, setting)
        high = [y.double() for y in x]
        for cotangent, g in cotangents(exact(x)).items():
            wanted = differentiated(lambda *y: exact(y), high, g.double())
            forms = {"consistent": differentiated(lambda *y: fields.output(*y, made), x, g)}  # noqa: B023
            for order in (0, 1):
                with torch.no_grad():
                    forms[f"substituted, order {order}"] = gradients.substituted(*x, g, made, order)
            for form, grads in forms.items():
                row = found.setdefault((form, cotangent), page.Gradient(setting, form, cotangent))
                row.errors.append([relative(a, b) for a, b in zip(grads, wanted, strict=True)])
    return list(found.values())


def times(sample: Sequence[Operands], settings: Sequence[Setting]) -> list[page.Times]:
    """Exact attention and each setting, head by head and in turns; of a head's turns the median, without the first."""
    n = sample[0][0].shape[1]
    rows = [page.Times(n, setting) for setting in (None, *settings)]
    for x in sample:
        g = torch.randn(x[2].shape, generator=torch.Generator().manual_seed(0))
        turns = [[one_call(x, g, row.setting) for row in rows] for _ in range(REPEATS + 1)][1:]
        for row, seconds in zip(rows, zip(*turns, strict=True), strict=True):
            for stage in seconds[0]:
                row.seconds.setdefault(stage, []).append(statistics.median(one[stage] for one in seconds))
            if row.setting is not None:
                row.executed.append(float(plan.near_shares(plan.make(*x, row.setting), n, n)[1]))
    return rows


def one_call(x: Operands, g: Tensor, setting: Setting | None) -> dict[str, float]:
    """Seconds of a forward pass, of its stages, and of forward and backward; exact attention without a setting."""
    if setting is not None:
        return one_clustered_call(x, g, setting)
    with torch.no_grad():
        forward = timed(lambda: exact(x))
    return {"forward": forward, "forward + backward": timed(lambda: differentiated(lambda *y: exact(y), x, g))}


@torch.no_grad()
def one_clustered_call(x: Operands, g: Tensor, setting: Setting) -> dict[str, float]:
    """The same by the stages of ``page.STAGES``; backward is the substituted gradient of order 1."""
    q, k, v = x
    clock = [time.perf_counter()]
    queries, keys = plan.group(q, k, v, setting)
    clock.append(time.perf_counter())
    near = plan.near_pairs(q, k, v, queries, keys, setting)
    clock.append(time.perf_counter())
    q_t, k_t, v_t = queries.gather(q), keys.gather(k), keys.gather(v)
    of_q, of_k = query_moments(q_t, queries.valid), key_moments(k_t, v_t, keys.valid)
    far = fields.far_field(q_t, of_q, of_k, pseudo_keys(of_q.mu, k_t, v_t, keys.valid), near)
    clock.append(time.perf_counter())
    queries.scatter(fields.merge(far, fields.near_field(q_t, k_t, v_t, keys.valid, near))[0], q.shape[1])
    clock.append(time.perf_counter())
    made = plan.Plan(queries, keys, near)
    both = clock[2] - clock[0] + timed(lambda: gradients.substituted(q, k, v, g, made, 1))
    seconds = [*(b - a for a, b in itertools.pairwise(clock)), clock[-1] - clock[0], both]
    return dict(zip(page.STAGES, seconds, strict=True))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(every: int, step: Callable[[str], None]) -> page.Measured:
    """All tables; ``step`` is told what has been done."""
    found = page.Measured()
    sample = read(4096, every)
    gate(sample[:2])
    step("gate")
    for row in accuracy(sample, 0, SETTINGS[4096]):
        found.accuracy.append(row)
        step("4,096 tokens")
    for row in accuracy(read(4096, every, text=1), 1, OTHER_TEXT):
        found.accuracy.append(row)
        step("another text")
    for part in causal_accuracy(sample):
        found.causal.append(part)
        step("causal")
    for setting in GRADIENTS:
        found.gradients += gradient_errors(sample[::2], setting)
        step("gradients")
    longer = read(16384, 2 * every)
    for row in accuracy(longer, 0, SETTINGS[16384]):
        found.accuracy.append(row)
        step("16,384 tokens")
    for some in (sample, longer):
        found.times += times(some[:: max(1, len(some) // TIMED_HEADS)][:TIMED_HEADS], TIMED[some[0][0].shape[1]])
        step("times")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--every", type=int, default=4, help="of the 72 heads every so many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced")
    options = parser.parse_args()
    from rich.progress import Progress

    torch.set_num_threads(options.threads)
    begin, load = time.monotonic(), os.getloadavg()[0]
    steps = 1 + sum(map(len, SETTINGS.values())) + len(OTHER_TEXT) + len(CAUSAL) + len(GRADIENTS) + len(TIMED)
    with Progress() as progress:
        task = progress.add_task("reading with the encoder", total=steps)
        found = measure(options.every, lambda done: progress.update(task, advance=1, description=done))
    command = f"python benchmarks/clustered/measure.py --every {options.every} --threads {options.threads}"
    text = page.tables(found, command, (time.monotonic() - begin) / 60, load)
    if options.write is not None:
        page.update(options.write, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
