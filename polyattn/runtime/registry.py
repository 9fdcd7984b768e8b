"""The registry of sites: states by site, parameters and options. It alone holds the lock; states are immutable.

State is keyed by the site and by the parameters that feed its queries and keys, because one compiled block may serve
many layers. Fits are made outside of the lock: of two threads that need one, the second waits for the first alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from polyattn.options import Options
from polyattn.rewriter.families.family import Fit
from polyattn.runtime import policy
from polyattn.runtime.replay import Calls, inside_backward
from polyattn.runtime.state import SiteState
from polyattn.site_plan import SitePlan


class Key(NamedTuple):
    """The identity of a state."""

    site: str
    owners: tuple[int, ...]
    """Memory of the parameters that feed the site."""
    options: str
    """``Options.key``."""
    seen: str
    """Which keys queries see, in words: ``none``, ``causal``, ``key padding``, …; a call's masks may differ from the
    last one's."""
    scale: float
    d: int
    e: int
    differentiated: bool = True
    """Whether gradients may be asked for: then their errors count too."""

    @property
    def place(self) -> str:
        """The number of the site in its graph; see :func:`place`."""
        return place(self.site)


def place(site: str) -> str:
    """Number of a site in its graph, for graphs are numbered through the process; outside of graphs what follows the
    folder that a file lies in."""
    return site.rsplit("/", 1)[-1]


def seed(options: Options, site: str, what: object) -> int:
    """The seed of a random choice: made of the options' seed, the site and what is chosen, not of the folder that a
    file lies in."""
    name = site.rsplit(os.sep, 1)[-1] if site.startswith("polyattn.attention at ") else site
    text = f"{options.seed}/{name}/{what}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class CallRecord:
    """What a call of a site does: its number (None for a recomputation), low rank or exact, audited or not."""

    number: int | None
    low_rank: bool
    audit: bool = False
    fit: Fit | None = None
    """For a recomputation, the fit that its first run took."""
    plan: SitePlan | None = None
    """For a recomputation, the plan that its first run took."""


@dataclass(eq=False)
class Entry:
    """One site under one set of parameters: its state, which the functions of this module alone replace."""

    key: Key
    state: SiteState
    recent: Calls = field(default_factory=Calls)
    """The last calls, so that a recomputation takes the plan of its first run."""
    fitting: threading.Lock = field(default_factory=threading.Lock)
    """Held while features are fitted, so that they are fitted once."""


_lock = threading.Lock()
_entries: dict[Key, Entry] = {}


def entries(site: str | None = None) -> tuple[Entry, ...]:
    """The entries of a site, or all, in order of first use."""
    with _lock:
        return tuple(entry for key, entry in _entries.items() if site is None or key.site == site)


def states(site: str) -> tuple[SiteState, ...]:
    """The states of a site, in order of first use; empty before its first call."""
    return tuple(entry.state for entry in entries(site))


def find(key: Key, decide: Callable[[], SiteState]) -> Entry:
    """The entry of a key; decided on where there is none. Of two threads that decide at once the first one wins."""
    with _lock:
        found = _entries.get(key)
    if found is not None:
        return found
    made = Entry(key, decide())
    with _lock:
        return _entries.setdefault(key, made)


def update(entry: Entry, change: Callable[[SiteState], SiteState]) -> SiteState:
    """Replace a state by what a function of :mod:`polyattn.runtime.policy` makes of it; returns the new one."""
    with _lock:
        entry.state = change(entry.state)
        return entry.state


def first_warning(entry: Entry) -> bool:
    """Whether no warning was logged about this entry yet; there is one from now on."""
    with _lock:
        first = not entry.state.warned
        entry.state = dataclasses.replace(entry.state, warned=True)
        return first


def enter(entry: Entry, options: Options, *tensors: torch.Tensor) -> CallRecord:
    """The record of a call with these q, k and v. A recomputation gets the plan of its first run and nothing else."""
    with _lock:
        if inside_backward():
            # torch's reentrant checkpoint runs a call first without gradients
            first = None if entry.state.counters.calls else _entries.get(entry.key._replace(differentiated=False))
            repeated = entry if first is None else first
            if repeated.state.counters.calls:
                if not repeated.state.low_rank and not len(repeated.recent):
                    return CallRecord(None, False)  # it never was low rank
                again = repeated.recent.find(*tensors)
                if again is not None:
                    return CallRecord(None, again.low_rank, fit=again.fit, plan=again.plan)
        entry.state, audited = policy.count(entry.state, options)
        return CallRecord(entry.state.counters.calls, entry.state.low_rank, audited)


def leave(entry: Entry, record: CallRecord, plan: SitePlan | None, fit: Fit | None, *tensors: torch.Tensor) -> None:
    """Remember which plan a call took, for its recomputation; sites that were never low rank need no memory.

    Args:
        plan: None for an exact call.
    """
    with _lock:
        if record.number is not None and (plan is not None or len(entry.recent)):
            entry.recent.add(plan is not None, fit, *tensors, plan=plan)


def forget(site: str, owners: tuple[int, ...]) -> SiteState | None:
    """Take a state out, the first one that a site has for these parameters."""
    with _lock:
        found = next((key for key in _entries if (key.site, key.owners) == (site, owners)), None)
        return None if found is None else _entries.pop(found).state


def reset() -> None:
    """Forget every state."""
    with _lock:
        _entries.clear()
