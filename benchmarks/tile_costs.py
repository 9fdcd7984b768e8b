"""Seconds of attention in tiles beside torch's fused kernel, and the constants by which the runtime predicts them.

python benchmarks/tile_costs.py [--tokens 4096 8192 16384 65536]     # 4 minutes; needs the extra accuracy

Heads of the pretrained encoder of ``benchmarks/heads.py`` with thresholds at which no pair is near, and a fifth of
them; whole calls, checks included, in turns with torch's kernel on the same tensors, forward alone and forward and
backward. The constants (``TileCosts``) are fitted to the ratios with equal relative weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import heads

import polyattn
from polyattn.runtime import registry, thresholds
from polyattn.runtime.tile_check import Check
from polyattn.runtime.tile_layout import family_of

SHARES = (0.0, 0.2)


def forced(share: float) -> Callable[..., thresholds.Found]:
    """Thresholds at which so large a share of the pairs is near, in place of those that a check finds."""

    def found(check: Check, _: object) -> thresholds.Found:
        errors = check.errors(torch.full((check.heads,), torch.inf, device=check.means.device))
        tau = check.thresholds(torch.full_like(errors.share, share))
        return thresholds.Found(tau, tau, errors)

    return found


def ratio(tensors: heads.Heads, differentiated: bool, repeats: int) -> tuple[float, float, int]:
    """The median ratio of seconds, the share of near pairs and the width of tiles."""
    q, k, v = (x.detach().clone().requires_grad_(differentiated) for x in tensors)
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))

    def seconds(run: Callable[..., torch.Tensor]) -> float:
        begin = time.perf_counter()
        out = run(q, k, v)
        if differentiated:
            torch.autograd.grad(out, (q, k, v), g)
        return time.perf_counter() - begin

    def ours(*x: torch.Tensor) -> torch.Tensor:
        return polyattn.attention(*x, options={"features": "clustered", "policy": "low_rank"})

    registry.reset()
    seconds(ours)
    exact = torch.nn.functional.scaled_dot_product_attention
    found = statistics.median(seconds(ours) / seconds(exact) for _ in range(repeats))
    (entry,) = registry.entries()
    shares = [head.share for head in entry.state.heads]
    return found, statistics.mean(shares), family_of(entry.state.decision.plan).tile_width(q.shape[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 65536])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    points: dict[bool, list[tuple[list[float], float]]] = {False: [], True: []}
    for tokens in options.tokens:
        layer = heads.encoder(0, tokens // heads.LENGTH)[heads.LAYERS // 2]
        some = (layer[0][:, : options.heads], layer[1][:, : options.heads], layer[2][:, : options.heads])
        for differentiated, terms in points.items():
            for share in SHARES:
                thresholds.search = thresholds.again = forced(share)
                taken, near, width = ratio(some, differentiated, options.repeats)
                terms.append(([near, 2 / width, 1 / tokens**2], taken))
                what = "forward + backward" if differentiated else "forward"
                print(f"{tokens:,} tokens, {what}: {near:.3f} of the pairs near, {taken:.3f} of exact", flush=True)
    for differentiated, terms in points.items():
        rows, taken = np.array([row for row, _ in terms]), np.array([y for _, y in terms])
        near, far, fixed = np.linalg.lstsq(rows / taken[:, None], np.ones(len(taken)), rcond=None)[0]
        print(f"{'training' if differentiated else 'inference'}: TileCosts({near:.2f}, {far:.1f}, {fixed:.1e})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
