"""Real text that every Python has: the source of its own standard library, as bytes, in an order that is fixed."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}


def read(limit: int = 4_000_000) -> torch.Tensor:
    """The first ``limit`` bytes of the standard library's modules in alphabetical order: uint8 [bytes].

    Raises:
        FileNotFoundError: this Python keeps its standard library elsewhere than in files (a zip archive).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        raise FileNotFoundError(f"there is no Python source below {root}")
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batches(text: torch.Tensor, tokens: int, steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (inputs, targets) of int64 [1, tokens], the targets one byte ahead; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = int(torch.randint(len(text) - tokens, (), generator=generator))
        piece = text[start : start + tokens + 1].long()
        yield piece[None, :-1], piece[None, 1:]
