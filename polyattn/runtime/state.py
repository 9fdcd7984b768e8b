"""What is known of a site under one set of parameters, as immutable values; policy makes new ones.

FLOPs are those of one call, forward and backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import sympy

from polyattn.rewriter.families.family import Fit
from polyattn.site_plan import SitePlan

Verdict = Literal["low_rank", "exact"]


@dataclass(frozen=True)
class Decision:
    """Low rank or exact, why, and at what cost."""

    verdict: Verdict
    reason: str
    plan: SitePlan
    """How the low-rank form is computed; of an exact site, how it would be."""
    shape: Mapping[str, int]
    """Sizes by name: batch, heads, kv_heads, n_q, n_k, d, e."""
    flops_before: int
    flops_after: int
    flops_before_symbolic: sympy.Expr
    flops_after_symbolic: sympy.Expr
    others: tuple[SitePlan, ...] = ()
    """Other forms, which are tried in turn where the audit of this one fails."""
    tried: tuple[str, ...] = ()
    """Forms that were given up, each with its reason."""
    seen: str = "none"
    """Which keys queries see: ``none``, ``causal``, ``key padding``, ``causal + key padding``, or that it is other."""


@dataclass(frozen=True)
class Counters:
    """What has happened so far."""

    calls: int = 0
    """Calls; what a checkpoint runs again is not counted."""
    audits: int = 0
    audited_call: int = 0
    """Number of the last audited call, from 1; 0 before the first audit."""
    exact_rows: int = 0
    """Rows that low-rank calls had to compute exactly."""
    fits: int = 0
    """How often features were fitted to the heads."""
    wait: int = 1
    """After how many times ``audit_every`` calls features may be fitted anew: doubled when that did not help."""


@dataclass(frozen=True)
class Audit:
    """What audits measured, in the two units of math.md §5; None before the first."""

    error: float | None = None
    """The worst row of the last audit, in the additive unit."""
    relative_error: float | None = None
    worst_error: float | None = None
    """The largest ``error`` of all audits; NaN once one of them was."""
    worst_relative_error: float | None = None


@dataclass(frozen=True)
class HeadState:
    """One key head in the last call in tiles, its batch elements together."""

    share: float
    """The share of its pairs that was computed exactly; 1 for exact attention."""
    threshold: float
    """Of near pairs; 0 for exact attention."""
    error: float | None
    """The row error, in the additive unit, that at most one in a hundred of the rows exceed; None: not measured."""
    relative_error: float | None
    gradient_error: float | None
    """The relative error of dQ; 0 where gradients were not asked for."""


@dataclass(frozen=True)
class SiteState:
    """Everything that is known of one site under one set of parameters."""

    decision: Decision
    counters: Counters = field(default_factory=Counters)
    audit: Audit = field(default_factory=Audit)
    guarantee: Literal["audited", "exact", "none"] = "none"
    fit: Fit | None = None
    """What is fitted to the heads, from the first low-rank call on."""
    heads: tuple[HeadState, ...] = ()
    """Where tokens are in tiles: the key heads of the last call."""
    warned: bool = False
    """Whether a warning about a failed audit was logged."""

    @property
    def low_rank(self) -> bool:
        """Whether the next call tries the low-rank form."""
        return self.decision.verdict == "low_rank"

    @property
    def verdict(self) -> Verdict:
        """``low_rank`` or ``exact``."""
        return self.decision.verdict

    @property
    def plan(self) -> SitePlan:
        """How the low-rank form is computed, with what the fit has chosen."""
        return self.decision.plan if self.fit is None else self.decision.plan.with_fit(self.fit)

    @property
    def calls_since_audit(self) -> int:
        """Calls after the last audited one."""
        return self.counters.calls - self.counters.audited_call

    def counting(self, **changed: int) -> SiteState:
        """The state with other counters."""
        return dataclasses.replace(self, counters=dataclasses.replace(self.counters, **changed))
