"""How a report reads what is known of a site at run time: the worst of its states speaks for all of them.

A state is an immutable value that the next call replaces, so that a report holds none: it asks when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, overload

from polyattn.rewriter.tiles.family import TiledFamily
from polyattn.runtime.state import SiteState

T = TypeVar("T")


class HasWorst(Protocol):
    """An object whose states can be read."""

    @property
    def worst(self) -> SiteState | None:
        """The state that speaks for all."""


class FromState(Generic[T]):
    """An attribute that is read from the worst state when it is asked for.

    Args:
        read: the value of a state.
        default: the value where there is no state yet, or a function of the report that yields it.
        doc: what the attribute is.
    """

    def __init__(self, read: Callable[[SiteState], T], default: T | Callable[[Any], T], doc: str) -> None:
        self._read, self._default, self.__doc__ = read, default, doc

    def of(self, state: SiteState) -> T:
        """The value of one state."""
        return self._read(state)

    def before(self, owner: object) -> T:
        """The value where there is no state yet."""
        default: Any = self._default
        value: T = default(owner) if callable(default) else default
        return value

    @overload
    def __get__(self, owner: None, kind: type) -> FromState[T]: ...
    @overload
    def __get__(self, owner: HasWorst, kind: type) -> T: ...
    def __get__(self, owner: HasWorst | None, kind: type) -> T | FromState[T]:
        if owner is None:
            return self
        state = owner.worst
        return self.before(owner) if state is None else self.of(state)


class WhileLowRank(FromState[T]):
    """An attribute that only a low-rank form has: an exact state, whose plan is abandoned, has the default."""

    def of(self, state: SiteState) -> T:
        """The value of one state."""
        return self._read(state) if state.low_rank else self.before(None)


def worst_of(states: Sequence[SiteState]) -> SiteState | None:
    """The state that speaks for all: an exact one before a low-rank one, then the largest error; None without any."""
    return max(states, key=badness, default=None)


def badness(state: SiteState) -> tuple[bool, float]:
    """The key that states are compared by; an error that is NaN is larger than every number."""
    error = state.audit.error or 0.0
    return not state.low_rank, math.inf if math.isnan(error) else error


def rank_of(state: SiteState) -> int:
    """The number of features of a query or key, at most."""
    return state.decision.plan.family.rank(state.decision.shape["d"])


def outlier_keys_of(state: SiteState) -> int:
    """How many keys of each head are computed exactly for every query; a call may have fewer than were asked for."""
    return min(state.decision.plan.outliers.total, state.decision.shape["n_k"])


def tile_width_of(state: SiteState) -> int:
    """About how many keys a tile has, where tokens are in tiles."""
    family = state.decision.plan.family
    return family.tile_width(state.decision.shape["n_k"]) if isinstance(family, TiledFamily) else 0
