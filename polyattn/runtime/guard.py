"""The run-time decision of every site: low rank or exact, taken at first use and audited again and again (math.md §5).

State is keyed by the site and by the parameters that feed its queries and keys, because one compiled block may serve
many layers. Under ``policy="auto"`` a failed audit makes a site exact from that call on, until :func:`reset`: to try
again it would have to run the low-rank form beside the exact one, in vain as long as nothing has changed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import sympy
import torch

from polyattn.options import Options
from polyattn.passes.derive.forms import softmax_form
from polyattn.passes.derive.kernels import exact_cost, kernels
from polyattn.rewriter.algebra.expr import CHUNK, N_K, N_Q, R1, D, E, R
from polyattn.rewriter.algebra.tensor import D1, E1
from polyattn.rewriter.families.polynomial import monomials
from polyattn.rewriter.families.skeleton.rule import M
from polyattn.runtime.fit import Fit
from polyattn.runtime.projection import Few
from polyattn.runtime.replay import Calls, inside_backward


@dataclass(frozen=True)
class Ticket:
    """What a call of a site does: its number (None for a recomputation), low rank or exact, audited or not."""

    number: int | None
    low_rank: bool
    audit: bool = False
    fit: Fit | None = None
    """Of a recomputation: the one that its first run took."""


@dataclass
class SiteState:
    """What is known of one site under one set of parameters; FLOPs are of one call, forward and backward."""

    verdict: Literal["low_rank", "exact"]
    reason: str
    degree: int | None
    rank: int | None
    features: str
    """Family of features: ``polynomial``, ``skeleton``, or ``none`` for exact attention."""
    chunk: int | None
    gradient: str
    shift: str
    """Which tokens the means are taken of that queries and keys are shifted by: ``none``, ``call``, ``first_chunk``."""
    polynomial: str
    """How the coefficients of a polynomial are found (``Options.polynomial``)."""
    band: bool
    """Whether, without a mask, keys of neighbouring chunks are exact."""
    heavy: int
    """Keys of each head that are exact for every query."""
    few: Few
    """Of the substituted gradient: how many directions values, and queries and keys, are projected on."""
    shape: dict[str, int]
    flops_before: int
    flops_after: int
    flops_before_symbolic: sympy.Expr
    flops_after_symbolic: sympy.Expr
    error: float | None = None
    """Worst row of the last audit, in the additive unit."""
    relative_error: float | None = None
    worst_error: float | None = None
    """The largest ``error`` of all audits; NaN once one of them was."""
    worst_relative_error: float | None = None
    guarantee: Literal["audited", "exact", "none"] = "none"
    calls: int = 0
    """Calls so far; what a checkpoint runs again is not counted."""
    audits: int = 0
    audited_call: int = 0
    """Number of the last audited call, from 1; 0 before the first audit."""
    exact_rows: int = 0
    fit: Fit | None = field(default=None, repr=False, compare=False)
    """What is fitted to the heads, from the first low-rank call on."""
    fits: int = 0
    """How often that was made."""
    wait: int = 1
    """After how many times ``audit_every`` calls a fit may be made anew: doubled when that did not help."""
    warned: bool = False
    recent: Calls = field(default_factory=Calls, repr=False, compare=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def fitted(self) -> torch.Tensor | None:
        """The values of the fit."""
        return None if self.fit is None else self.fit.values

    @property
    def widths(self) -> tuple[int, ...]:
        return () if self.fit is None else self.fit.widths

    @property
    def radius(self) -> torch.Tensor | None:
        return None if self.fit is None else self.fit.radius

    @property
    def fit_error(self) -> tuple[float, ...]:
        return () if self.fit is None else self.fit.error

    @property
    def calls_since_audit(self) -> int:
        return self.calls - self.audited_call

    def enter(self, options: Options, *tensors: torch.Tensor) -> Ticket:
        """The plan of a call with these q, k and v. A recomputation gets the plan of its first run and nothing else."""
        with self.lock:
            if self.calls and inside_backward():
                if self.verdict != "low_rank" and not len(self.recent):
                    return Ticket(None, False)  # it never was low rank
                again = self.recent.find(*tensors)
                if again is not None:
                    return Ticket(None, again.low_rank, fit=again.fit)
            self.calls += 1
            low = self.verdict == "low_rank"
            since = self.calls - self.audited_call
            due = self.audits == 0 or (options.audit_every > 0 and since >= options.audit_every)
            audit = low and options.audit_rows > 0 and due
            if audit:
                self.audited_call = self.calls  # claimed: another thread need not audit as well
            return Ticket(self.calls, low, audit)

    def leave(self, ticket: Ticket, low_rank: bool, fit: Fit | None, *tensors: torch.Tensor) -> None:
        """Remember which plan a call took, for its recomputation; sites that were never low rank need no memory."""
        with self.lock:
            if ticket.number is not None and (low_rank or len(self.recent)):
                self.recent.add(low_rank, fit, *tensors)

    def measured(self, ticket: Ticket, error: float, relative_error: float) -> None:
        """Record an audit."""
        assert ticket.number is not None
        with self.lock:
            self.audits += 1
            self.audited_call = max(self.audited_call, ticket.number)
            self.error, self.relative_error = error, relative_error
            self.worst_error = larger(self.worst_error, error)
            self.worst_relative_error = larger(self.worst_relative_error, relative_error)
            if self.verdict == "low_rank":
                self.guarantee = "audited"

    def first_warning(self) -> bool:
        """True once."""
        with self.lock:
            first, self.warned = not self.warned, True
            return first

    def become_exact(self, reason: str) -> None:
        """Exact from now on."""
        with self.lock:
            self.reason = reason
            self.verdict, self.guarantee = "exact", "exact"
            self.flops_after, self.flops_after_symbolic = self.flops_before, self.flops_before_symbolic
            self.degree = self.rank = self.chunk = None
            self.shift = self.features = "none"
            self.band, self.heavy = False, 0

    @property
    def weighted(self) -> bool:
        """Whether kernels take weights of the keys."""
        return self.shift != "none" or self.heavy > 0


def seed(options: Options, site: str, what: object) -> int:
    """The seed of a random choice: of the options, the site and what is chosen; not of the folder a file lies in."""
    name = site.rsplit(os.sep, 1)[-1] if site.startswith("polyattn.attention at ") else site
    text = f"{options.seed}/{name}/{what}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def larger(a: float | None, b: float) -> float:
    """The larger of two errors; NaN, which may be any error, is larger than every number."""
    return b if a is None or math.isnan(b) or b > a else a


def place(site: str) -> str:
    """Number of a site in its graph, for graphs are numbered through the process; outside of graphs what follows the
    folder that a file lies in."""
    return site.rsplit("/", 1)[-1]


class Key(NamedTuple):
    """The identity of a state."""

    site: str
    owners: tuple[int, ...]
    """Memory of the parameters that feed the site."""
    options: str
    """``Options.key``."""
    causal: bool
    scale: float
    d: int
    e: int

    @property
    def place(self) -> str:
        return place(self.site)


_lock = threading.Lock()
_states: dict[Key, SiteState] = {}


def states(site: str) -> tuple[SiteState, ...]:
    """The states of a site, in order of first use; empty before its first call."""
    with _lock:
        return tuple(state for where, state in _states.items() if where.site == site)


def every() -> tuple[tuple[Key, SiteState], ...]:
    """All states, in order of first use."""
    with _lock:
        return tuple(_states.items())


def find(where: Key) -> SiteState | None:
    with _lock:
        return _states.get(where)


def keep(where: Key, state: SiteState) -> SiteState:
    """Record a decision; of two threads that decide at once the first one wins."""
    with _lock:
        return _states.setdefault(where, state)


def forget(site: str, owners: tuple[int, ...]) -> SiteState | None:
    """Take a state out, the first one that a site has for these parameters."""
    with _lock:
        found = next((where for where in _states if (where.site, where.owners) == (site, owners)), None)
        return None if found is None else _states.pop(found)


def reset() -> None:
    """Forget every decision."""
    with _lock:
        _states.clear()


@functools.cache
def symbolic_costs(
    causal: bool,
    degree: int | None,
    gradient: str,
    weighted: bool = False,
    band: bool = False,
    few_values: bool = False,
) -> tuple[sympy.Expr, sympy.Expr]:
    """FLOPs per head, forward and backward, of exact attention and of the low-rank plan, in r and r'."""
    dense = exact_cost(softmax_form(causal))
    if causal:
        # Half of the pairs of tokens are masked; terms without a pair are lower order.
        dense = dense / 2
    return sympy.expand(dense), kernels(causal, degree, gradient, weighted, band).cost(few_values)


def costs(
    shape: dict[str, int],
    causal: bool,
    degree: int | None,
    gradient: str,
    chunk: int,
    weighted: bool = False,
    rank: int | None = None,
    band: bool = False,
    heavy: int = 0,
    few: Few | None = None,
) -> tuple[int, int]:
    """The same as numbers, for all heads; grouped queries count as further rows of a key head.

    ``rank``: features at most; None: all monomials. ``heavy``: keys of each head that are exact for every query.
    ``few``: directions of the substituted gradient.
    """
    groups = shape["heads"] // shape["kv_heads"]
    values = {N_Q: shape["n_q"] * groups, N_K: shape["n_k"], D: shape["d"], E: shape["e"], CHUNK: chunk}
    few = few or Few()
    values |= {D1: min(shape["d"], few.keys), E1: min(shape["e"], few.values)}
    if degree is None:
        values[M] = rank or 0
    else:
        full = [monomials.rank(monomials.full(shape["d"], g)) for g in (degree, degree - 1)]
        values |= dict(zip((R, R1), (min(r, rank or r) for r in full), strict=True))
    heads = shape["batch"] * shape["kv_heads"]
    before, after = symbolic_costs(causal, degree, gradient, weighted, band, few.values > 0)
    columns = exact_cost(softmax_form(False)).subs(values | {N_K: heavy}) if heavy else 0
    return int(before.subs(values)) * heads, int(after.subs(values) + columns) * heads


def chunk_length(options: Options, d: int, device: str, causal: bool = True) -> int:
    """Tokens per chunk: of the near field without a mask, else under a causal mask.

    The near field costs 4 C d per token, the far field does not depend on C: short chunks need fewer FLOPs, long ones
    make larger matrix products. On a CPU a quarter of the rank, from 128 to 256, was fastest for head dims 16 to 64
    (docs/performance.md); on a GPU, where every chunk leaves a state in memory, about the rank (math.md §6). With
    skeleton features a state meets the core in every chunk, 2 m² (e + 1): half of the rank to all of it.
    """
    if not causal and options.near_field is not None:
        return options.near_field
    if options.causal_chunk is not None:
        return options.causal_chunk
    below = 1 << (options.resolved_rank(d) - 1).bit_length() >> 1
    if options.resolved_degree is None:
        return min(512, max(128, below))
    return min(256, max(128, below // 4)) if device == "cpu" else min(512, max(64, below))


def decide(shape: dict[str, int], causal: bool, options: Options, device: str) -> SiteState:
    """The verdict by policy and cost; the audit comes after the first low-rank forward."""
    degree, gradient = options.resolved_degree, options.resolved_gradient
    chunk, rank = chunk_length(options, shape["d"], device, causal), options.resolved_rank(shape["d"])
    moved = options.resolved_shift(causal)
    band = options.band(causal)
    few = Few(*options.directions)
    weighted, heavy = options.weighted(causal), min(options.heavy_keys + len(options.exact_keys), shape["n_k"])
    before, after = costs(shape, causal, degree, gradient, chunk, weighted, rank, band, heavy, few)
    symbolic = symbolic_costs(causal, degree, gradient, weighted, band, few.values > 0)
    verdict: Literal["low_rank", "exact"] = "low_rank"
    if options.policy == "exact":
        verdict, reason = "exact", "policy='exact'"
    elif options.policy == "low_rank":
        reason = "policy='low_rank'"
    elif options.audit_rows == 0:
        verdict, reason = "exact", "policy='auto' needs an audit, and audit_rows=0"
    elif after >= before:
        verdict, reason = "exact", f"low rank costs {after / before:.2f} times exact attention at this length"
    else:
        reason = f"low rank costs {after / before:.2f} times exact attention"
    low = verdict == "low_rank"
    return SiteState(
        verdict=verdict,
        reason=reason,
        degree=degree if low else None,
        rank=rank if low else None,
        features=("skeleton" if degree is None else "polynomial") if low else "none",
        chunk=chunk if low and (causal or band) else None,
        gradient=gradient,
        shift=moved if low else "none",
        polynomial=options.polynomial,
        band=band and low,
        heavy=heavy if low else 0,
        few=few if low else Few(),
        shape=shape,
        flops_before=before,
        flops_after=after if low else before,
        flops_before_symbolic=symbolic[0],
        flops_after_symbolic=symbolic[1] if low else symbolic[0],
        guarantee="none" if low else "exact",
    )
