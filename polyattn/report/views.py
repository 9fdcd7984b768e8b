"""What text and page ask of a report: they are written against these protocols and know nothing of how one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from polyattn.passes.match.site import Refusal
    from polyattn.report.plots import Samples
    from polyattn.runtime.state import SiteState


class SiteView(Protocol):
    """One attention site, to be read; :class:`polyattn.report.model.SiteReport` says what every name means."""

    @property
    def where(self) -> str:
        """The user's line, ``file.py:123, in forward``."""

    @property
    def spelling(self) -> str:
        """How the model writes it."""

    @property
    def mask(self) -> str:
        """``none``, ``causal``, or what else is added to the scores."""

    @property
    def scale(self) -> float:
        """Factor of the logits; NaN where it depends on a dynamic size."""

    @property
    def shape(self) -> Mapping[str, int | str]:
        """Sizes by name."""

    @property
    def tolerance(self) -> float:
        """The additive bound on a row of the output, in units of the largest distance of a value from their mean."""

    @property
    def exact(self) -> str:
        """Why the site was exact when it was compiled already; else empty."""

    @property
    def verdict(self) -> str:
        """``low_rank``, ``exact`` or ``undecided``."""

    @property
    def reason(self) -> str:
        """Why the verdict is what it is."""

    @property
    def states(self) -> Sequence[SiteState]:
        """Run-time states, in order of first use."""

    @property
    def samples(self) -> Sequence[Samples]:
        """Samples of the states that have some."""

    @property
    def derivation(self) -> str:
        """The log of the rewrite; empty where there is none."""

    @property
    def kernels(self) -> Mapping[str, str]:
        """Kernel specifications and sources by name."""


class ReportView(Protocol):
    """The attention of some graphs, to be read; see :class:`polyattn.report.model.Report`."""

    @property
    def sites(self) -> Sequence[SiteView]:
        """The attention sites, in order."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """Attention that was left alone."""

    @property
    def failure(self) -> str | None:
        """Why the graph was left untouched; None when all went well."""

    @property
    def graphs(self) -> int:
        """Number of graphs."""
