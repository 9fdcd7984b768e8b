"""Observers look on while attention runs: ``explain`` sees the tensors of every call, and of its backward.

Nobody does otherwise, and a call then costs one look at an empty list.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.masks.mask import Mask
from polyattn.runtime.registry import Entry
from polyattn.site_plan import SitePlan


class Observer(Protocol):
    """What is told of calls; tensors are those of the operators, [batch, heads, tokens, ·], and not copies."""

    def forward(
        self,
        entry: Entry,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        plan: SitePlan | None,
        fit: Fit | None,
        keep: torch.Tensor | None,
    ) -> None:
        """A call of a site: q, k, v, its output, and how it was computed; a plan of None is exact attention.

        The fit is what the features of its heads were; None where nothing is fitted. ``keep`` [batch, n_k] says which
        keys took part; None: all.
        """

    def backward(
        self,
        g: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        mask: Mask,
        gradients: Sequence[torch.Tensor | None],
        keep: torch.Tensor | None,
    ) -> None:
        """A backward of some call with these q, k and v: the output's gradient and theirs, None where not asked."""


_lock = threading.Lock()
_observers: tuple[Observer, ...] = ()


def observers() -> tuple[Observer, ...]:
    """Those that look on now."""
    return _observers


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell an observer of every call of this process, those of other threads too, until the end."""
    global _observers
    with _lock:
        _observers = (*_observers, observer)
    try:
        yield
    finally:
        with _lock:
            _observers = tuple(w for w in _observers if w is not observer)
