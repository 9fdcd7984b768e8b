"""What happened to the attention of a compiled graph, for people (``str``, ``to_html``) and for programs
(``to_dict``)."""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from typing import TYPE_CHECKING, Any

from polyattn.options import Options
from polyattn.passes.site import Refusal, Site

if TYPE_CHECKING:
    import torch.fx as fx

    from polyattn.guard import SiteState

UNDECIDED = "the graph has not run yet"


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention site. What compiling knows is stored; what running knows is looked up when asked.

    A compiled block may serve many layers: each has a state of its own (``states``). Single values (``verdict``,
    ``error``, …) speak for the *worst* state: an exact one before a low-rank one, then the largest error.
    """

    identifier: str
    """Unique in this process: ``graph/index``."""
    where: str
    """``file.py:123, in forward``."""
    spelling: str
    """How the model writes it, for example ``softmax(q @ kᵀ * s) @ v``."""
    causal: bool
    mask: str
    """``none``, ``causal``, or what else is added to or put in place of the scores."""
    scale: float
    """NaN where it depends on a dynamic size."""
    compiled_shape: dict[str, int | str]
    """Sizes by name when compiled; symbolic ones as text."""
    options: Options
    exact: str = ""
    """Why the site was exact when it was compiled already; empty where that is decided when it runs."""

    @classmethod
    def of(cls, identifier: str, site: Site, options: Options) -> SiteReport:
        form = (site.where, site.spelling, site.causal, site.mask, site.known_scale, site.shape)
        return cls(identifier, *form, options, site.exact)

    @property
    def states(self) -> tuple[SiteState, ...]:
        """Run-time states, one for each set of parameters that feeds this site; empty before the first run."""
        from polyattn import guard

        return tuple(guard.states(self.identifier))

    @property
    def worst(self) -> SiteState | None:
        return max(self.states, key=_badness, default=None)

    def _of_worst(self, name: str, default: Any) -> Any:
        state = self.worst
        return default if state is None else getattr(state, name)

    @property
    def verdict(self) -> str:
        """``low_rank``, ``exact`` or ``undecided`` (before the first run)."""
        return "exact" if self.exact else str(self._of_worst("verdict", "undecided"))

    @property
    def reason(self) -> str:
        return self.exact or str(self._of_worst("reason", UNDECIDED))

    @property
    def degree(self) -> int | None:
        value: int | None = self._of_worst("degree", None)
        return value

    @property
    def rank(self) -> int | None:
        value: int | None = self._of_worst("rank", None)
        return value

    @property
    def features(self) -> str:
        """Family of features: ``polynomial``, ``skeleton``, or ``none`` for exact attention."""
        return str(self._of_worst("features", "none"))

    @property
    def chunk(self) -> int | None:
        """Tokens per chunk of a causal low-rank site or of one with an exact band; None otherwise."""
        value: int | None = self._of_worst("chunk", None)
        return value

    @property
    def gradient(self) -> str:
        return str(self._of_worst("gradient", self.options.resolved_gradient))

    @property
    def shift(self) -> str:
        """Which tokens the means are taken of that queries and keys are shifted by; ``none`` where they are not."""
        return str(self._of_worst("shift", "none"))

    @property
    def band(self) -> bool:
        """Whether, without a mask, keys of neighbouring chunks are exact."""
        return bool(self._of_worst("band", False))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a nested polynomial: in how many directions the monomials of each degree are; else empty."""
        found: tuple[int, ...] = self._of_worst("widths", ())
        return found

    @property
    def tolerance(self) -> float:
        return self.options.tolerance

    @property
    def error(self) -> float | None:
        """Worst row of the last audit, in the additive unit; None when nothing was measured."""
        value: float | None = self._of_worst("error", None)
        return value

    @property
    def worst_error(self) -> float | None:
        """The largest ``error`` of all audits."""
        value: float | None = self._of_worst("worst_error", None)
        return value

    @property
    def audits(self) -> int:
        """How often the site was audited."""
        return int(self._of_worst("audits", 0))

    @property
    def audited_call(self) -> int:
        """Number of the last audited call, from 1; 0 before the first audit."""
        return int(self._of_worst("audited_call", 0))

    @property
    def calls(self) -> int:
        """Calls so far; what activation checkpointing runs again is not counted."""
        return int(self._of_worst("calls", 0))

    @property
    def relative_error(self) -> float | None:
        value: float | None = self._of_worst("relative_error", None)
        return value

    @property
    def guarantee(self) -> str:
        """``proved``, ``audited`` (on sampled rows of the audited calls), ``exact`` or ``none``."""
        return "exact" if self.exact else str(self._of_worst("guarantee", "none"))

    @property
    def flops_before(self) -> int | None:
        """FLOPs of exact attention, forward and backward, at the shape of the last run."""
        value: int | None = self._of_worst("flops_before", None)
        return value

    @property
    def flops_after(self) -> int | None:
        value: int | None = self._of_worst("flops_after", None)
        return value

    @property
    def shape(self) -> dict[str, int | str]:
        """Sizes by name: batch, heads, kv_heads, n_q, n_k, d, e; those of a run once there was one."""
        value: dict[str, int | str] = dict(self._of_worst("shape", self.compiled_shape))
        return value

    @property
    def shape_text(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.shape.items())

    @property
    def derivation(self) -> str:
        """The readable log of the rewrite, step by step; empty for a site that is not low rank."""
        if self.verdict != "low_rank":
            return ""
        from polyattn.passes import inspection

        return str(
            inspection.derivation(
                causal=self.causal,
                degree=self.degree,
                gradient=self.gradient,
                weighted=self.shift != "none",
                band=self.band,
            )
        )

    @property
    def kernels(self) -> dict[str, str]:
        """Kernel specifications by name; empty for a site that is not low rank."""
        if self.verdict != "low_rank":
            return {}
        from polyattn.passes import inspection

        return dict(
            inspection.sources(
                causal=self.causal,
                degree=self.degree,
                gradient=self.gradient,
                weighted=self.shift != "none",
                band=self.band,
            )
        )

    def _graphs(self) -> tuple[fx.GraphModule | None, fx.GraphModule | None]:
        if (
            self.verdict != "low_rank"
            or self.degree is None
            or (self.worst is not None and self.worst.fitted is not None)
        ):
            return None, None
        from polyattn.passes import inspection

        sizes = {name: int(size) for name, size in self.shape.items()}
        forward, backward = inspection.graphs(
            causal=self.causal,
            degree=self.degree,
            gradient=self.gradient,
            shape=sizes,
            scale=self.scale,
            chunk=self.chunk,
            shift=self.shift,
            band=self.band,
        )
        return forward, backward

    @property
    def forward_graph(self) -> fx.GraphModule | None:
        """The rewritten forward as a runnable graph; None for exact sites, and for features that are
        fitted to a head."""
        return self._graphs()[0]

    @property
    def backward_graph(self) -> fx.GraphModule | None:
        """The rewritten backward as a runnable graph; None for exact sites, and for features that are
        fitted to a head."""
        return self._graphs()[1]

    def to_dict(self) -> dict[str, Any]:
        """Everything but graphs and sources, JSON-serialisable; the state of this moment."""
        return {
            "id": self.identifier,
            "where": self.where,
            "spelling": self.spelling,
            "causal": self.causal,
            "mask": self.mask,
            "scale": self.scale,
            "shape": self.shape,
            "verdict": self.verdict,
            "reason": self.reason,
            "degree": self.degree,
            "rank": self.rank,
            "features": self.features,
            "gradient": self.gradient,
            "shift": self.shift,
            "tolerance": self.tolerance,
            "error": self.error,
            "worst_error": self.worst_error,
            "relative_error": self.relative_error,
            "audits": self.audits,
            "audited_call": self.audited_call,
            "calls": self.calls,
            "guarantee": self.guarantee,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "states": [_state_dict(state) for state in self.states],
        }

    def __str__(self) -> str:
        scale = "of a dynamic size" if math.isnan(self.scale) and not self.exact else f"{self.scale:.6g}"
        lines = [self.where, f"  {self.spelling}", f"  {self.shape_text}   scale={scale}   mask={self.mask}"]
        states = self.states
        if self.exact:
            lines += textwrap.wrap(f"EXACT: {self.exact}", 110, initial_indent="  ", subsequent_indent="    ")
        elif not states:
            lines.append(f"  undecided: {UNDECIDED}")
        for number, state in enumerate(states):
            lines.extend(_state_lines(state, self.tolerance, f"layer {number}: " if len(states) > 1 else ""))
        return "\n".join(lines)


_STATE_FIELDS = (
    "verdict", "reason", "degree", "rank", "features", "chunk", "band", "widths", "polynomial",
    "gradient", "shift", "error", "worst_error",
    "relative_error",
    "worst_relative_error", "guarantee", "shape", "flops_before", "flops_after", "calls", "audits", "audited_call",
    "calls_since_audit", "exact_rows", "fit_error",
)  # fmt: skip


def _badness(state: SiteState) -> tuple[bool, float]:
    """By which states are compared: an exact one before a low-rank one, then the largest error, NaN above all."""
    error = state.error or 0.0
    return state.verdict == "exact", math.inf if math.isnan(error) else error


def _state_dict(state: SiteState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _STATE_FIELDS}


def _state_lines(state: SiteState, tolerance: float, label: str) -> list[str]:
    head = f"{label}{state.verdict.upper().replace('_', ' ')}"
    if state.verdict == "low_rank":
        family = "skeleton features" if state.degree is None else f"degree {state.degree}"
        family += f", coefficients by {state.polynomial.replace('_', ' ')}" if state.polynomial != "taylor" else ""
        family += f", nested {state.widths}" if state.widths else ""
        head += f", {family}, rank {state.rank}, {state.gradient} gradient"
        head += {"none": "", "call": ", shifted", "first_chunk": ", shifted by the first chunk"}[state.shift]
        head += f", keys up to {state.chunk} tokens away exact" if state.band else ""
    lines = textwrap.wrap(f"{head}: {state.reason}", 110, initial_indent="  ", subsequent_indent="    ")
    if state.flops_before:
        lines.append(f"    FLOPs {_count(state.flops_before)} → {_count(state.flops_after)}{_ratio(state)}")
    if state.error is not None:
        worst = f" (worst {state.worst_error:.2e})" if state.audits > 1 else ""
        relative = f", relative {state.relative_error:.2e}" if state.relative_error is not None else ""
        lines.append(f"    error of the last audit {state.error:.2e}{worst} of {tolerance:g} allowed{relative}")
    if state.fit_error and state.verdict == "low_rank":
        lines.append(f"    {_fit(state)}")
    lines.append(f"    guarantee: {_guarantee(state)}")
    return lines


def _fit(state: SiteState) -> str:
    """What is known of a fit: how far rows are off that it could see, and to which queries it was made."""
    errors = state.fit_error
    text = f"fitted at the first call: a row's weights off by {sum(errors) / len(errors):.2g} in sum"
    text += f" (worst head {max(errors):.2g})" if len(errors) > 1 else ""
    if state.radius is not None:
        text += f"; queries to a norm of {float(state.radius.min()):.3g}"
        text += f" to {float(state.radius.max()):.3g}" if len(errors) > 1 else ""
    return text + (f"; {state.exact_rows} rows exact so far" if state.exact_rows else "")


def _guarantee(state: SiteState) -> str:
    if state.guarantee == "audited":
        times = "once" if state.audits == 1 else f"{state.audits} times"
        return f"audited {times}, last at call {state.audited_call} of {state.calls}; it does not bound every row"
    return str(state.guarantee)


def _ratio(state: SiteState) -> str:
    if state.flops_after <= 0 or state.verdict == "exact":
        return ""
    ratio = state.flops_before / state.flops_after
    return f" ({ratio:.3g}x fewer)" if ratio >= 1 else f" ({1 / ratio:.3g}x more)"


def _count(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g}{unit}"
        flops /= 1000
    return f"{flops:.4g}P"


@dataclasses.dataclass(frozen=True)
class Report:
    """The attention of one compiled graph (or, from :func:`polyattn.explain`, of all graphs of a model)."""

    graph_id: str = ""
    options: Options = dataclasses.field(default_factory=Options)
    sites: tuple[SiteReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    failure: str | None = None
    """Why polyattn left the graph untouched after an error of its own; None when all went well."""
    graphs: int = 1
    """Number of graphs: more than one means graph breaks."""

    @classmethod
    def merged(cls, reports: list[Report], options: Options) -> Report:
        """One report for several graphs."""
        return cls(
            graph_id="+".join(report.graph_id for report in reports),
            options=options,
            sites=tuple(site for report in reports for site in report.sites),
            refusals=tuple(refusal for report in reports for refusal in report.refusals),
            failure="; ".join(report.failure for report in reports if report.failure) or None,
            graphs=len(reports),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; the state of this moment."""
        return {
            "graph": self.graph_id,
            "graphs": self.graphs,
            "policy": self.options.policy,
            "sites": [site.to_dict() for site in self.sites],
            "refusals": [dataclasses.asdict(refusal) for refusal in self.refusals],
            "failure": self.failure,
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page: the report, with derivations and kernels to unfold."""
        from polyattn.page import render

        with open(path, "w", encoding="utf-8") as file:
            file.write(render(self))

    def summary(self) -> str:
        """One line."""
        verdicts = [site.verdict for site in self.sites]
        counts = [
            f"{verdicts.count(v)} {v.replace('_', ' ')}" for v in ("low_rank", "exact", "undecided") if v in verdicts
        ]
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        sites = f"{len(self.sites)} attention site{'' if len(self.sites) == 1 else 's'}"
        refused = f", {len(self.refusals)} refused" if self.refusals else ""
        return f"polyattn: {sites}{' (' + ', '.join(counts) + ')' if counts else ''}{refused} in {graphs}"

    def __str__(self) -> str:
        parts = [self.summary()]
        if self.failure:
            parts.append(f"FAILED, the model runs unchanged: {self.failure}")
        for number, site in enumerate(self.sites, start=1):
            parts.append(textwrap.indent(str(site), "    ").replace("    ", f"{number:>3} ", 1))
        for refusal in self.refusals:
            parts.append(f"  - {refusal.where}\n      REFUSED, left as it was: {refusal.reason}  [{refusal.node}]")
        if not self.sites and not self.refusals and not self.failure:
            parts.append("  no softmax here feeds a product: there is no attention to rewrite")
        return "\n".join(parts)
