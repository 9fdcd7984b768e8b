"""Small models with one attention, and the state of the only site that has run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from polyattn.runtime import registry
from polyattn.runtime.registry import Entry
from polyattn.runtime.state import SiteState


class Live:
    """What is known of a site now, whenever it is read; its fields by their names alone."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    @property
    def now(self) -> SiteState:
        """The present state."""
        return self.entry.state

    @property
    def fitted(self) -> torch.Tensor | None:
        """The values of the fit."""
        return None if self.now.fit is None else self.now.fit.values

    @property
    def fit_error(self) -> tuple[float, ...]:
        """Of each key head, the error of the fit."""
        return () if self.now.fit is None else self.now.fit.error

    @property
    def rank(self) -> int | None:
        """Features of the low-rank form."""
        return self.now.plan.family.rank(self.now.decision.shape["d"]) if self.now.low_rank else None

    def change(self, **fields: Any) -> None:
        """Replace fields of the state."""
        registry.update(self.entry, lambda state: dataclasses.replace(state, **fields))

    def __getattr__(self, name: str) -> Any:
        state = self.now
        for part in (state, state.counters, state.audit, state.decision, state.plan, state.plan.family):
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"a state has no {name}")


def all_states() -> list[Live]:
    """Those of all sites that have run since the last reset, in order of first use."""
    return [Live(entry) for entry in registry.entries()]


def only_state() -> Live:
    """The state of the only site that has run since the last reset."""
    (state,) = all_states()
    return state


class Model(torch.nn.Module):
    """Two heads of width 6 from one projection of 12, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(12, 36, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
