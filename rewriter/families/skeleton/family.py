"""Skeleton features: a CUR (generalised Nyström) approximation of exp, fitted to a head (math.md §2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch

from polyattn.rewriter.families.family import Bound, FamilyOptions, FeatureFamily, Fit, Problem, Sample, below
from polyattn.rewriter.families.skeleton import landmarks
from polyattn.rewriter.families.skeleton.rule import M, SkeletonRule

LEAST, MOST, DEFAULT = 8, 2048, 512


@dataclass(frozen=True)
class Skeleton(FeatureFamily):
    """exp(s q·k) → exp(s q·κ) Z exp(s k·λ)ᵀ with landmarks κ, λ and a core Z that are fitted to a head and kept.

    Packed: [kv_heads, m, 2 d + m]: landmarks of keys, landmarks of queries, and core, side by side.
    """

    name = "skeleton"

    landmarks: int = DEFAULT
    """Their number on each side, m."""

    @classmethod
    def problems(cls, options: FamilyOptions) -> Iterator[Problem]:
        """See :meth:`FeatureFamily.problems`."""
        m = options.rank
        if options.degree is not None:
            yield "degree", options.degree, "None: skeleton features have no degree"
        if options.polynomial != "taylor":
            yield "polynomial", options.polynomial, "left out: skeleton features have none"
        if m is not None and not (isinstance(m, int) and not isinstance(m, bool) and LEAST <= m <= MOST):
            yield "rank", m, f"an integer from {LEAST} to {MOST}, or None"

    @classmethod
    def of(cls, options: FamilyOptions) -> Skeleton:
        """See :meth:`FeatureFamily.of`."""
        return cls(options.rank or DEFAULT)

    @property
    def rule(self) -> SkeletonRule:
        """See :attr:`FeatureFamily.rule`."""
        return SkeletonRule()

    def rank(self, d: int) -> int:
        """See :meth:`FeatureFamily.rank`."""
        return self.landmarks

    def sizes(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`FeatureFamily.sizes`."""
        return {M: self.landmarks}

    def chunk_length(self, d: int, of_target: Callable[[int], int]) -> int:
        """A state meets the core in every chunk, 2 m² (e + 1) FLOPs: half of the rank to all of it, on any target."""
        return min(512, max(128, below(self.landmarks)))

    @property
    def fitted(self) -> bool:
        """See :attr:`FeatureFamily.fitted`."""
        return True

    def packed_shape(self, kv_heads: int, d: int) -> tuple[int, ...]:
        """See :meth:`FeatureFamily.packed_shape`."""
        return kv_heads, self.landmarks, 2 * d + self.landmarks

    def fit(self, sample: Sample, generator: torch.Generator) -> Fit:
        """See :meth:`FeatureFamily.fit`."""
        made = landmarks.fit(
            sample.q,
            sample.k,
            sample.weights,
            sample.scale,
            self.landmarks,
            generator,
            sample.mask,
            near=sample.near,
        )
        packed = torch.cat([made.keys, made.queries, made.core], 2)
        return Fit(packed, (), made.radius, tuple(made.error.tolist()))

    def bind(self, packed: torch.Tensor | None, d: int) -> Bound:
        """See :meth:`FeatureFamily.bind`."""
        if packed is None:
            return Bound()
        of_keys, of_queries, core = packed[..., :d], packed[..., d : 2 * d], packed[..., 2 * d :]
        return Bound({"LK": of_keys, "LQ": of_queries, "Z": core.contiguous()})

    def describe(self, fit: Fit | None = None) -> str:
        """See :meth:`FeatureFamily.describe`."""
        return "skeleton (CUR) features"

    def dense(self, q: torch.Tensor, k: torch.Tensor, scale: float, packed: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`FeatureFamily.dense`."""
        bound = self.bind(packed, q.shape[-1]).inputs
        phi = torch.exp(scale * q @ bound["LK"].mT)
        psi = torch.exp(scale * k @ bound["LQ"].mT)
        return phi @ bound["Z"] @ psi.mT
