"""What happened to the attention of a compiled graph, for people (``str``, ``to_html``) and for programs
(``to_dict``)."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyattn.options import Options
from polyattn.passes.match.site import Refusal, Site
from polyattn.report import plots, text

if TYPE_CHECKING:
    import torch.fx as fx

    from polyattn.report.plots import Samples
    from polyattn.runtime.guard import SiteState

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
    samples: tuple[Samples, ...] = dataclasses.field(default=(), repr=False, compare=False)
    """Rows and weights of the last low-rank call beside exact ones, for each state that is low rank; only
    :func:`polyattn.explain` takes them."""

    @classmethod
    def of(cls, identifier: str, site: Site, options: Options) -> SiteReport:
        form = (site.where, site.spelling, site.causal, site.mask, site.known_scale, site.shape)
        return cls(identifier, *form, options, site.exact)

    @property
    def states(self) -> tuple[SiteState, ...]:
        """Run-time states, one for each set of parameters that feeds this site; empty before the first run."""
        from polyattn.runtime import guard

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
    def heavy(self) -> int:
        """How many keys of each head stay exact for every query."""
        return int(self._of_worst("heavy", 0))

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
        """The same in one line."""
        return text.shape_text(self.shape)

    @property
    def derivation(self) -> str:
        """The readable log of the rewrite, step by step; empty for a site that is not low rank."""
        if self.verdict != "low_rank":
            return ""
        from polyattn.passes.derive import inspection

        return str(
            inspection.derivation(
                causal=self.causal,
                degree=self.degree,
                gradient=self.gradient,
                weighted=self._of_worst("weighted", False),
                band=self.band,
            )
        )

    @property
    def kernels(self) -> dict[str, str]:
        """Kernel specifications by name; empty for a site that is not low rank."""
        if self.verdict != "low_rank":
            return {}
        from polyattn.passes.derive import inspection

        return dict(
            inspection.sources(
                causal=self.causal,
                degree=self.degree,
                gradient=self.gradient,
                weighted=self._of_worst("weighted", False),
                band=self.band,
            )
        )

    def _graphs(self) -> tuple[fx.GraphModule | None, fx.GraphModule | None]:
        worst = self.worst
        if worst is None or self.verdict != "low_rank" or self.degree is None:
            return None, None
        if worst.fit is not None or worst.heavy or any(worst.few):
            return None, None
        from polyattn.report import graphs

        sizes = {name: int(size) for name, size in self.shape.items()}
        forward, backward = graphs.graphs(
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
        """The rewritten forward as a runnable graph; None for exact sites, for features that are
        fitted to a head, with heavy keys and where gradients are projected."""
        return self._graphs()[0]

    @property
    def backward_graph(self) -> fx.GraphModule | None:
        """The rewritten backward as a runnable graph; None for exact sites, for features that are
        fitted to a head, with heavy keys and where gradients are projected."""
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
            "samples": [samples.to_dict() for samples in self.samples],
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the samples: approximate over exact weights, and errors of rows over their position.

        Args:
            path: where the figure is written; its ending (.svg, .png, .pdf) is the format.
        Returns:
            the matplotlib Figure.
        Raises:
            PolyattnError: there are no samples, or matplotlib is not installed; the message says what to install.
        """
        return plots.draw(self.samples, f"{self.where}: {self.spelling}", self.tolerance, path)

    def sketch(self) -> str:
        """The samples as histograms in plain text; empty without samples."""
        return plots.sketch(self.samples, self.tolerance)

    def __str__(self) -> str:
        return text.site_text(self)


_STATE_FIELDS = (
    "verdict", "reason", "degree", "rank", "features", "chunk", "band", "heavy", "few", "widths", "polynomial",
    "gradient", "shift", "error", "worst_error",
    "relative_error",
    "worst_relative_error", "guarantee", "shape", "flops_before", "flops_after", "calls", "audits", "audited_call",
    "calls_since_audit", "exact_rows", "fits", "fit_error",
)  # fmt: skip


def _badness(state: SiteState) -> tuple[bool, float]:
    """By which states are compared: an exact one before a low-rank one, then the largest error, NaN above all."""
    error = state.error or 0.0
    return state.verdict == "exact", math.inf if math.isnan(error) else error


def _state_dict(state: SiteState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _STATE_FIELDS}


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

    def plot(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write a figure of each site that has samples (:meth:`SiteReport.plot`) into a folder, made where it is not.

        Returns:
            the files, ``site-1.svg`` for the first site and so on; none where no site has samples.
        Raises:
            PolyattnError: matplotlib is not installed; the message says what to install.
        """
        paths = []
        for number, site in enumerate(self.sites, start=1):
            if site.samples:
                paths.append(Path(folder) / f"site-{number}.svg")
                site.plot(paths[-1])
        return paths

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page: the report, with derivations and kernels to unfold, and with the figures of
        samples where matplotlib is installed."""
        from polyattn.report import html

        with open(path, "w", encoding="utf-8") as file:
            file.write(html.page(self))

    def summary(self) -> str:
        """Say in one line how many sites there are and what became of them."""
        return text.summary(self)

    def __str__(self) -> str:
        return text.report_text(self)
