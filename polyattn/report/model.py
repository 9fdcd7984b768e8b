"""What happened to the attention of a compiled graph, as data: for programs (``to_dict``) and for those that render it.

The text of a report (``str``) is written by ``text.py``, its page by ``html.py``; they know reports by the protocols in
``views.py``.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyattn.options import Options
from polyattn.passes.match.site import Refusal, Site
from polyattn.report import plots, text
from polyattn.report.reading import FromState, WhileLowRank, outlier_keys_of, rank_of, worst_of
from polyattn.rewriter.masks.mask import LOCAL_WINDOW

if TYPE_CHECKING:
    import torch.fx as fx

    from polyattn.report.plots import Samples
    from polyattn.runtime.state import SiteState
    from polyattn.site_plan import SitePlan

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
    """``none``, ``causal``, ``key padding``, or what else is added to the scores (``bias``) or put in their place
    (``mask``), as far as it is known when compiling."""
    scale: float
    """Factor of the logits; NaN where it depends on a dynamic size."""
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
        """The report of a site that matching found."""
        form = (site.where, site.spelling, site.causal, site.mask, site.known_scale, site.shape)
        return cls(identifier, *form, options, site.exact)

    @property
    def states(self) -> tuple[SiteState, ...]:
        """Run-time states, one for each set of parameters that feeds this site; empty before the first run."""
        from polyattn.runtime import registry

        return registry.states(self.identifier)

    @property
    def worst(self) -> SiteState | None:
        """The state that speaks for all of them; None before the first run."""
        return worst_of(self.states)

    # -- read from the worst state; each has its line in ``to_dict``, also under its former name where it has one ------

    verdict = FromState[str](
        lambda state: state.verdict,
        lambda site: "exact" if site.exact else "undecided",
        "``low_rank``, ``exact`` or ``undecided`` (before the first run).",
    )
    reason = FromState[str](
        lambda state: state.decision.reason, lambda site: site.exact or UNDECIDED, "Why the verdict is what it is."
    )
    guarantee = FromState[str](
        lambda state: state.guarantee,
        lambda site: "exact" if site.exact else "none",
        "``proved``, ``audited`` (on sampled rows of the audited calls), ``exact`` or ``none``.",
    )
    shape = FromState[dict[str, int | str]](
        lambda state: dict(state.decision.shape),
        lambda site: dict(site.compiled_shape),
        "Sizes by name: batch, heads, kv_heads, n_q, n_k, d, e; those of a run once there was one.",
    )
    seen = FromState[str](
        lambda state: state.decision.seen,
        lambda site: site.mask,
        "Which keys queries see: ``none``, ``causal``, ``key padding``, ``causal + key padding``, or that it is other. "
        "Where compiling does not know what a mask shows (``mask`` says ``mask`` or ``bias``), each call looks at it.",
    )
    features = WhileLowRank[str](
        lambda state: state.plan.family.name,
        "none",
        "Family of features: ``polynomial``, ``skeleton``, …; ``none`` for exact attention.",
    )
    method = WhileLowRank[str](
        lambda state: state.plan.family.describe(state.fit),
        "exact softmax",
        "The features in words, with what was fitted, such as ``degree 2, coefficients by least squares``.",
    )
    degree = WhileLowRank[int | None](
        lambda state: state.plan.family.degree, None, "Degree of the polynomial; None for exact attention and others."
    )
    rank = WhileLowRank[int | None](rank_of, None, "Features of a query or key, at most; None for exact attention.")
    widths = WhileLowRank[tuple[int, ...]](
        lambda state: () if state.fit is None else state.fit.widths,
        (),
        "In how many directions the monomials of each degree of a nested polynomial are; else empty.",
    )
    gradient = FromState[str](
        lambda state: state.plan.gradient if state.low_rank else "exact",
        lambda site: "exact" if site.exact else site.options.gradient,
        "``consistent``, ``substituted``, ``projected`` or ``exact``; before the first run what the options ask for.",
    )
    chunk = WhileLowRank[int | None](
        lambda state: state.plan.near,
        None,
        "Tokens per chunk of a causal low-rank site or of one with a local window; None otherwise.",
    )
    centring = WhileLowRank[str](
        lambda state: state.plan.centring,
        "none",
        "Which tokens the means are taken of that queries and keys are centred by: ``none`` (they are not), ``call``, "
        "``first_chunk``.",
    )
    local_window = WhileLowRank[bool](
        lambda state: state.plan.mask == LOCAL_WINDOW,
        False,
        "Whether, without a mask, keys of neighbouring chunks are exact.",
    )
    outlier_keys = WhileLowRank[int](outlier_keys_of, 0, "How many keys of each head stay exact for every query.")
    projection = WhileLowRank[tuple[int, int]](
        lambda state: (state.plan.projection.values, state.plan.projection.keys),
        (0, 0),
        "Projection ranks of values, and of queries and keys, in the substituted gradient; 0: not projected.",
    )
    shift, band, heavy, few = centring, local_window, outlier_keys, projection
    """Former names."""
    error = FromState[float | None](
        lambda state: state.audit.error,
        None,
        "The worst row of the last audit, in the additive unit; None when nothing was measured.",
    )
    relative_error = FromState[float | None](
        lambda state: state.audit.relative_error,
        None,
        "The relative error of the last audit: RMS over its rows, in units of what is not mean pooling.",
    )
    worst_error = FromState[float | None](
        lambda state: state.audit.worst_error, None, "The largest ``error`` of all audits; NaN once one of them was."
    )
    worst_relative_error = FromState[float | None](
        lambda state: state.audit.worst_relative_error, None, "The largest ``relative_error`` of all audits."
    )
    calls = FromState[int](
        lambda state: state.counters.calls, 0, "Calls so far; what activation checkpointing runs again is not counted."
    )
    audits = FromState[int](lambda state: state.counters.audits, 0, "How often the site was audited.")
    audited_call = FromState[int](
        lambda state: state.counters.audited_call,
        0,
        "Number of the last audited call, from 1; 0 before the first audit.",
    )
    calls_since_audit = FromState[int](lambda state: state.calls_since_audit, 0, "Calls after the last audited one.")
    exact_rows = FromState[int](
        lambda state: state.counters.exact_rows,
        0,
        "Rows of all heads that low-rank calls had to compute exactly.",
    )
    fits = FromState[int](lambda state: state.counters.fits, 0, "How often features were fitted to the heads.")
    fit_error = WhileLowRank[tuple[float, ...]](
        lambda state: () if state.fit is None else state.fit.error,
        (),
        "Mean error Σ_j |P̃_ij − P_ij| of softmax rows that the fit did not see, for each key head; else empty.",
    )
    heads = WhileLowRank[list[dict[str, float | None]]](
        lambda state: [dataclasses.asdict(head) for head in state.heads],
        lambda site: [],
        "Where tokens are in tiles, for each key head of the last call: ``share`` of its pairs that are exact (1: "
        "all), ``threshold`` of near pairs (0: exact attention), ``error``, ``relative_error`` "
        "and ``gradient_error`` (of dQ) of its check.",
    )
    flops_before = FromState[int | None](
        lambda state: state.decision.flops_before,
        None,
        "FLOPs of exact attention, forward and backward of one call, at the shape of the first run.",
    )
    flops_after = FromState[int | None](
        lambda state: state.decision.flops_after, None, "FLOPs of what runs instead, counted alike."
    )

    @property
    def tolerance(self) -> float:
        """The additive bound on a row of the output that audits hold the site to."""
        return self.options.tolerance

    @property
    def shape_text(self) -> str:
        """The sizes in one line, such as ``n_q=128 d=64``."""
        return text.shape_text(self.shape)

    # -- the rewrite -------------------------------------------------------------------------------------------------

    @property
    def _plan(self) -> SitePlan | None:
        """The plan that the worst state runs by; None where attention is exact or undecided."""
        worst = self.worst
        return worst.plan if worst is not None and worst.low_rank else None

    @property
    def derivation(self) -> str:
        """The readable log of the rewrite, step by step; empty for a site that is not low rank."""
        from polyattn.passes.derive import inspection

        plan = self._plan
        return "" if plan is None else str(inspection.derivation(plan.form, plan.family.rule, plan.gradient))

    @property
    def kernels(self) -> dict[str, str]:
        """Kernel specifications and emitted sources by name; empty for a site that is not low rank."""
        from polyattn.passes.derive import inspection

        plan = self._plan
        return {} if plan is None else dict(inspection.sources(plan.form, plan.family.rule, plan.gradient))

    def _graphs(self) -> tuple[fx.GraphModule | None, fx.GraphModule | None]:
        from polyattn.report import graphs

        plan = self._plan
        if plan is None or not graphs.possible(plan):
            return None, None
        return graphs.graphs(plan, {name: int(size) for name, size in self.shape.items()})

    @property
    def forward_graph(self) -> fx.GraphModule | None:
        """The rewritten forward as a runnable graph; None for exact sites, for features that are fitted to a head, with
        outlier keys and where gradients are projected."""
        return self._graphs()[0]

    @property
    def backward_graph(self) -> fx.GraphModule | None:
        """The rewritten backward as a runnable graph; None where there is no ``forward_graph``."""
        return self._graphs()[1]

    # -- for programs and people -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything but graphs and sources, JSON-serialisable; the states of this moment."""
        read = {name: value for name, value in vars(type(self)).items() if isinstance(value, FromState)}
        states = self.states
        worst = worst_of(states)
        return {
            "id": self.identifier,
            "where": self.where,
            "spelling": self.spelling,
            "causal": self.causal,
            "mask": self.mask,
            "scale": self.scale,
            "tolerance": self.tolerance,
            **{name: value.before(self) if worst is None else value.of(worst) for name, value in read.items()},
            "states": [{name: value.of(state) for name, value in read.items()} for state in states],
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
        """Draw the samples as histograms in plain text; empty without samples."""
        return plots.sketch(self.samples, self.tolerance)

    def __str__(self) -> str:
        return text.site_text(self)


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
        """The report as JSON-serialisable values; the states of this moment."""
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
