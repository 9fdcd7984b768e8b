"""Low-rank attention against torch's fused exact kernel on the CPU, forward and backward, by causal chunk length.

Prints a Markdown table for docs/performance.md. Every row is behind a gate: the emitted code must give what
``evaluate`` gives, which defines what a specification means. Queries and keys are centred, as by default; skeleton
features have been fitted before. Runs are interleaved; medians of five.
"""

from __future__ import annotations

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
from polyattn.options import Options
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.families.skeleton.family import Skeleton
from polyattn.rewriter.masks.mask import CAUSAL, NONE, Mask
from polyattn.runtime import exact, execute, fits
from polyattn.runtime.centring import centre
from polyattn.site_plan import SitePlan

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


Fitted = tuple[SitePlan, torch.Tensor | None]
"""How a low-rank call is computed, and what is fitted to its heads."""


def gate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SitePlan, fitted: torch.Tensor | None) -> None:
    """Raises AssertionError where the emitted code and ``evaluate`` differ on the first 600 tokens."""
    qs, ks, vs = (x[..., :600, :] for x in execute.grouped(q, k, v))
    made = execute.forward(qs, ks, vs, plan, fitted)
    bound = execute.bound(plan, fitted, ks)
    inputs = {"V": vs, **centre(qs, ks, plan, bound.change).inputs, **bound.inputs}
    scalars = {"s": plan.scale, **bound.scalars}
    basis = plan.family.basis(q.shape[-1])
    wanted = Evaluation(plan.kernels.forward, inputs, scalars, basis, plan.chunk or 600).run()
    torch.testing.assert_close(made.out, wanted["O"], rtol=1e-3, atol=1e-3)


def plans_of(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, mask: Mask, chunks: tuple[int, ...]
) -> dict[str, Fitted]:
    """What is timed, by name."""
    found: dict[str, Fitted] = {}
    for c in chunks:
        label = f"degree {DEGREE}" + (f", C = {c}" if mask.chunked else "")
        found[label] = SitePlan(mask, Polynomial(DEGREE), "consistent", scale, c, "call"), None
    chunk = 256 if mask.chunked else 0
    plan = SitePlan(mask, Skeleton(RANK), "consistent", scale, chunk, "call")
    made = fits.make("benchmark", tensors, plan, Options(), None, 0)
    found[f"skeleton {RANK}" + (f", C = {chunk}" if chunk else "")] = plan, made.values
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
    mask = CAUSAL if causal else NONE
    plans, softmax = plans_of((q, k, v), scale, mask, chunks), exact.ExactSoftmax(scale, mask)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("exact", *plans)}
    for plan, fitted in plans.values():
        gate(q, k, v, plan, fitted)
    for repeat in range(REPEATS + 1):
        for name, (forward, backward) in times.items():
            if name == "exact":
                start = time.perf_counter()
                out, lse = exact.forward(q, k, v, softmax)
                first = time.perf_counter() - start
                tensors = (q, k, v)
                second = timed(lambda: exact.backward(g, tensors, out, lse, softmax))  # noqa: B023
            else:
                plan, fitted = plans[name]
                start = time.perf_counter()
                made = execute.forward(*execute.grouped(q, k, v), plan, fitted)
                first = time.perf_counter() - start
                out, stat = made.out.reshape(1, heads, n, d), made.denominators.reshape(1, heads, n)
                needs = (True, True, True)
                second = timed(lambda: execute.backward(g, q, k, v, out, stat, plan, fitted, needs))  # noqa: B023
            if repeat:
                forward.append(first)
                backward.append(second)
    cells = {n: f"{statistics.median(f) * 1e3:.0f} / {statistics.median(b) * 1e3:.0f}" for n, (f, b) in times.items()}
    low = "; ".join(f"{name}: {cells[name]}" for name in plans)
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
