"""The plan of a site: the one value that its derivation, kernels, costs, fits and gradients depend on.

It is made once from the options and the site (:meth:`SitePlan.of`), is frozen and hashable, and is what a backward gets
back from its forward: by an identifier (:func:`intern`), because operators hand on tensors and nothing else.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import sympy
import torch

from polyattn.codegen import targets
from polyattn.options import Options
from polyattn.passes.derive.forms import Form, softmax
from polyattn.passes.derive.kernels import Kernels, kernels
from polyattn.rewriter.algebra.tensor import CHUNK, D1, E1, N_K, N_Q, D, E
from polyattn.rewriter.families.family import FeatureFamily, Fit
from polyattn.rewriter.families.registry import families
from polyattn.rewriter.masks.mask import CAUSAL, LOCAL_WINDOW, NONE, Mask

Centring = Literal["none", "call", "first_chunk"]
"""Which tokens the means are taken of that queries and keys are centred by: no centring, all of a call, or the first
chunk, before which no query stands."""
Gradient = Literal["consistent", "substituted", "projected"]
"""``projected``: the substituted gradient with queries and keys in coordinates of a few directions."""


@dataclass(frozen=True)
class OutlierKeys:
    """Which keys of a call are computed exactly for every query: those at some positions, and so many of the largest
    norm."""

    count: int = 0
    positions: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.total > 0

    @property
    def total(self) -> int:
        """Their number in each head, where a call has as many keys."""
        return self.count + len(self.positions)


@dataclass(frozen=True)
class ProjectionRanks:
    """How many directions values, and how many queries and keys, are projected on in the substituted gradient; 0: they
    are not."""

    values: int = 0
    keys: int = 0

    def __bool__(self) -> bool:
        return self.values > 0 or self.keys > 0


@dataclass(frozen=True)
class SitePlan:
    """How the low-rank form of one site is computed."""

    mask: Mask
    family: FeatureFamily
    gradient: Gradient
    scale: float
    """Factor of the logits."""
    chunk: int = 0
    """Tokens per chunk where the mask has chunks, of the shortest segment where it has tiles and is causal; 0 where it
    has neither."""
    centring: Centring = "none"
    outliers: OutlierKeys = field(default_factory=OutlierKeys)
    projection: ProjectionRanks = field(default_factory=ProjectionRanks)
    refusal: str = ""
    """Why there is no low-rank form of the family on the site's device, or under its mask; empty where there is one."""
    padding: bool = False
    """Whether a call says which keys take part (key padding), for each batch element; others have the factor 0."""
    differentiated: bool = True
    """Whether gradients may be asked for: then their errors count too; of a form that does not check itself always."""
    device: str = "cpu"
    """The type of the site's device."""

    @classmethod
    def of(
        cls,
        options: Options,
        causal: bool,
        scale: float,
        d: int,
        device: str,
        padding: bool = False,
        differentiated: bool = True,
        choice: int = 0,
    ) -> SitePlan:
        """The plan of a site with queries of width ``d`` on a device (its type, such as ``cpu``).

        Args:
            padding: whether calls say which keys take part.
            differentiated: whether gradients may be asked for.
            choice: which of the families that the options ask for, in the order in which they are tried.
        """
        family = families(options)[choice].of(options)
        mask: Mask = CAUSAL if causal else NONE if options.local_window is None else LOCAL_WINDOW
        chunk = 0
        own, refusal = family.mask(mask), ""
        if isinstance(own, str):
            refusal = own
        else:
            mask = own
        target = targets.of_device(torch.device(device))
        if mask.tiled and not target.tiles and options.policy == "auto":
            refusal = f"programs in tiles have no code for {device} yet, and plain torch would be slower than exact"
        if mask is LOCAL_WINDOW:
            chunk = options.local_window or 0
        elif mask.tiled and mask.hides:
            chunk = options.causal_chunk or 0
        elif mask is CAUSAL:
            chunk = options.causal_chunk or family.chunk_length(d, targets.of_device(torch.device(device)).chunk_length)
        centring: Centring = "none" if not options.centring else options.causal_stats if causal else "call"
        centring = "none" if mask.tiled else centring  # deviations from means are part of the form
        gradient: Gradient = "consistent"
        if options.gradient == "substituted":
            gradient = "substituted" if options.key_directions is None else "projected"
        return cls(
            mask,
            family,
            gradient,
            scale,
            chunk,
            centring,
            OutlierKeys(options.outlier_keys, options.exact_keys),
            ProjectionRanks(options.value_directions or 0, options.key_directions or 0),
            refusal,
            padding,
            differentiated or not mask.tiled,
            device,
        )

    @classmethod
    def all_of(
        cls,
        options: Options,
        causal: bool,
        scale: float,
        d: int,
        device: str,
        padding: bool = False,
        differentiated: bool = True,
    ) -> tuple[SitePlan, ...]:
        """The plans that a site tries in turn; the arguments are those of :meth:`of`."""
        choices = range(len(families(options)))
        return tuple(cls.of(options, causal, scale, d, device, padding, differentiated, choice) for choice in choices)

    @property
    def key_bias(self) -> bool:
        """Whether kernels take factors of the keys: centred queries leave them; outlier keys and keys that take no part
        have the factor 0."""
        return self.centring != "none" or bool(self.outliers) or self.padding

    @property
    def tiled(self) -> bool:
        """Whether tokens are in tiles of similar ones, whose near pairs every call finds."""
        return self.mask.tiled

    @property
    def seen(self) -> str:
        """Which keys queries see: ``none``, ``causal``, ``key padding``, ``causal + key padding``."""
        parts = [self.mask.name] if self.mask.hides else []
        return " + ".join([*parts, *(["key padding"] if self.padding else [])]) or "none"

    @property
    def near(self) -> int | None:
        """Tokens per chunk where pairs of near chunks are met one by one; None where no pair is."""
        return self.chunk if self.mask.chunked else None

    @property
    def form(self) -> Form:
        """The form of attention that is derived."""
        return softmax(self.mask, self.key_bias)

    @property
    def kernels(self) -> Kernels:
        """Specifications of forward and backward, derived once per form, rule and gradient."""
        return kernels(self.form, self.family.rule, self.gradient)

    def sizes(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """Numbers for the symbols of costs per key head; grouped queries count as further rows.

        Args:
            shape: batch, heads, kv_heads, n_q, n_k, d and e.
        """
        groups = shape["heads"] // shape["kv_heads"]
        return {
            N_Q: shape["n_q"] * groups,
            N_K: shape["n_k"],
            D: shape["d"],
            E: shape["e"],
            CHUNK: self.chunk,
            D1: min(shape["d"], self.projection.keys),
            E1: min(shape["e"], self.projection.values),
            **self.family.sizes(shape),
        }

    def with_fit(self, fit: Fit) -> SitePlan:
        """The plan with what a fit has chosen of the family's parameters."""
        return dataclasses.replace(self, family=self.family.with_fit(fit))

    def unprojected(self) -> SitePlan:
        """The plan with the substituted gradient whole."""
        return dataclasses.replace(self, gradient="substituted", projection=ProjectionRanks())

    def __str__(self) -> str:
        parts = [self.family.describe(), f"{self.mask.name} mask", f"{self.gradient} gradient"]
        parts += [f"chunks of {self.chunk}"] if self.mask.chunked else []
        parts += [f"segments of {self.chunk} or more"] if self.mask.tiled and self.mask.hides else []
        parts += [f"centred by {self.centring.replace('_', ' ')}"] if self.centring != "none" else []
        parts += ["key padding"] if self.padding else []
        parts += [f"{self.outliers.total} outlier keys"] if self.outliers else []
        parts += [] if self.differentiated else ["without gradients"]
        parts += [f"projected on {self.projection.values}, {self.projection.keys}"] if self.projection else []
        return ", ".join(parts)


@dataclass(frozen=True)
class ExactPlan:
    """How a call with masks of its own was computed exactly."""

    mask: Mask
    padding: bool = False
    """Whether some keys took no part."""
    other: bool = False
    """Its masks are neither causal nor key padding: they were applied as they are given."""


EXACT = 0
"""The identifier of a call that was exact, under the mask that compiling knows."""
_lock = threading.Lock()
_identifiers: dict[SitePlan | ExactPlan, int] = {}
_plans: list[SitePlan | ExactPlan] = []


def intern(plan: SitePlan | ExactPlan | None) -> int:
    """The identifier of a plan in this process; ``EXACT`` for None. Equal plans have one identifier."""
    if plan is None:
        return EXACT
    found = _identifiers.get(plan)
    if found is not None:
        return found
    with _lock:
        if plan not in _identifiers:
            _plans.append(plan)
            _identifiers[plan] = len(_plans)
        return _identifiers[plan]


def interned(identifier: int) -> SitePlan | ExactPlan | None:
    """The plan of an identifier; None for ``EXACT``."""
    return None if identifier == EXACT else _plans[identifier - 1]
