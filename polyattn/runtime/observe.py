"""Who looks on while attention runs: ``explain`` sees the tensors of every call, and of its backward, through this.

Nobody does otherwise, and a call then costs one look at an empty list.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from polyattn.runtime.execute import Setting
from polyattn.runtime.guard import SiteState


class Watcher(Protocol):
    """What is told of calls; tensors are those of the operators, [batch, heads, tokens, ·], and not copies."""

    def forward(
        self,
        site: str,
        state: SiteState,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        setting: Setting | None,
    ) -> None:
        """A call of a site: q, k, v, its output, and how it was computed; None for exact attention."""

    def backward(
        self, g: torch.Tensor, tensors: Sequence[torch.Tensor], causal: bool, gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """A backward of some call with these q, k and v: the output's gradient and theirs, None where not asked."""


_lock = threading.Lock()
_watchers: tuple[Watcher, ...] = ()


def watchers() -> tuple[Watcher, ...]:
    return _watchers


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher of every call of this process, those of other threads too, until the end."""
    global _watchers
    with _lock:
        _watchers = (*_watchers, watcher)
    try:
        yield
    finally:
        with _lock:
            _watchers = tuple(w for w in _watchers if w is not watcher)
