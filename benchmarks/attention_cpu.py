"""Low-rank attention against torch's fused exact kernel on the CPU, forward and backward, by causal chunk length.

Prints a Markdown table for docs/performance.md. Every row is behind a gate: the emitted code must give what
``evaluate`` gives, which defines what a specification means. Queries and keys are shifted, as by default; skeleton
features have been fitted before. Runs are interleaved; medians of five.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from polyattn.codegen.evaluate import Evaluation
from polyattn.passes.derive.kernels import exact_nodes, kernels
from polyattn.rewriter.families.polynomial.rule import Approximation
from polyattn.rewriter.families.skeleton.landmarks import fit
from polyattn.runtime import exact, execute

DEGREE, RANK, REPEATS = 2, 512, 5
SHAPES = (
    (4, 4096, 16, True, (64, 128, 256)),
    (4, 4096, 32, True, (64, 128, 256, 512)),
    (4, 16384, 32, True, (64, 128, 256)),
    (8, 4096, 64, True, (64, 128, 256)),
    (4, 4096, 32, False, (0,)),
    (4, 16384, 32, False, (0,)),
)
"""Heads, tokens, head dim, causal, chunk lengths."""


def gate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: execute.Setting) -> None:
    """Raises AssertionError where the emitted code and ``evaluate`` differ on the first 600 tokens."""
    qs, ks, vs = (x[..., :600, :] for x in execute.grouped(q, k, v))
    made = execute.forward(qs, ks, vs, setting)
    inputs = {"V": vs, **setting.moved(qs, ks).inputs, **setting.skeleton(len(ks), qs)}
    scalars = {"s": setting.scale, **Approximation(DEGREE).values}
    spec = kernels(setting.causal, setting.degree, setting.gradient, weighted=True).forward
    wanted = Evaluation(spec, inputs, scalars, setting.basis(q.shape[-1]), setting.chunk or 600).run()
    torch.testing.assert_close(made.out, wanted["O"], rtol=1e-3, atol=1e-3)


def settings_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, chunks: tuple[int, ...]
) -> dict[str, execute.Setting]:
    """What is timed, by name."""
    found = {
        f"degree {DEGREE}" + (f", C = {c}" if causal else ""): execute.Setting(
            scale, causal, DEGREE, "consistent", c, "call"
        )
        for c in chunks
    }
    plain = execute.Setting(scale, causal, None, "consistent", 256 if causal else 0, "call")
    qs, ks, _ = execute.grouped(q, k, v)
    moved = plain.moved(qs, ks)
    made = fit(moved.q, moved.k[:, None], moved.weights[:, None], scale, RANK, torch.Generator().manual_seed(0), causal)
    marks = torch.cat([made.keys, made.queries, made.core], 2).float()
    found[f"skeleton {RANK}" + (", C = 256" if causal else "")] = dataclasses.replace(plain, fitted=marks)
    return found


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(heads: int, n: int, d: int, causal: bool, chunks: tuple[int, ...]) -> list[str]:
    """Milliseconds, forward / backward: exact, then low rank per chunk length."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, heads, n, d, generator=generator) * 0.3 for _ in range(4))
    scale = d**-0.5
    nodes = exact_nodes(causal)
    settings = settings_of(q, k, v, scale, causal, chunks)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("exact", *settings)}
    for setting in settings.values():
        gate(q, k, v, setting)
    for repeat in range(REPEATS + 1):
        for name, (forward, backward) in times.items():
            if name == "exact":
                start = time.perf_counter()
                out, lse = exact.forward(q, k, v, scale, causal)
                first = time.perf_counter() - start
                tensors = (q, k, v)
                second = timed(lambda: exact.backward(nodes, g, tensors, out, lse, scale, causal))  # noqa: B023
            else:
                setting = settings[name]
                start = time.perf_counter()
                made = execute.forward(*execute.grouped(q, k, v), setting)
                first = time.perf_counter() - start
                out, stat = made.out.reshape(1, heads, n, d), made.denominators.reshape(1, heads, n)
                needs = (True, True, True)
                second = timed(lambda: execute.backward(g, q, k, v, out, stat, setting, needs))  # noqa: B023
            if repeat:
                forward.append(first)
                backward.append(second)
    cells = {n: f"{statistics.median(f) * 1e3:.0f} / {statistics.median(b) * 1e3:.0f}" for n, (f, b) in times.items()}
    low = "; ".join(f"{name}: {cells[name]}" for name in settings)
    return [str(heads), f"{n:,}", str(d), "causal" if causal else "none", cells["exact"], low]


def main() -> None:
    """Print the table and what it was measured on."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from machine import processor

    print(
        f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, "
        f"load average {os.getloadavg()[0]:.1f} before; Python {platform.python_version()}, torch {torch.__version__}; "
        f"float32, consistent gradient. Milliseconds, forward / backward.\n"
    )
    print("| heads | tokens | head dim | mask | exact (torch's flash kernel) | low rank |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        print("| " + " | ".join(row(*shape)) + " |", flush=True)


if __name__ == "__main__":
    main()
