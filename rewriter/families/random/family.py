"""Positive random features (FAVOR+): orthogonal random directions, drawn for each head at its first call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch

from polyattn.rewriter.families.family import Bound, FamilyOptions, FeatureFamily, Fit, Problem, Sample, below
from polyattn.rewriter.families.random.rule import M, RandomRule

LEAST, MOST, DEFAULT = 8, 4096, 256


@dataclass(frozen=True)
class Random(FeatureFamily):
    """exp(s q·k) → (1/m) exp(q·Ω − s‖q‖²/2) exp(k·Ω − s‖k‖²/2)ᵀ with random directions Ω of each key head.

    Packed: [kv_heads, m, d + 1], the directions times the root of the scale, and −½ log m beside them. They do not
    depend on the tokens: of a call they take its number of heads and their width alone.
    """

    name = "random"

    directions: int = DEFAULT
    """Their number, m."""

    @classmethod
    def problems(cls, options: FamilyOptions) -> Iterator[Problem]:
        """See :meth:`FeatureFamily.problems`."""
        m = options.rank
        if options.degree is not None:
            yield "degree", options.degree, "None: random features have no degree"
        if options.polynomial != "taylor":
            yield "polynomial", options.polynomial, "left out: random features have none"
        if m is not None and not (isinstance(m, int) and not isinstance(m, bool) and LEAST <= m <= MOST):
            yield "rank", m, f"an integer from {LEAST} to {MOST}, or None"

    @classmethod
    def of(cls, options: FamilyOptions) -> Random:
        """See :meth:`FeatureFamily.of`."""
        return cls(options.rank or DEFAULT)

    @property
    def rule(self) -> RandomRule:
        """See :attr:`FeatureFamily.rule`."""
        return RandomRule()

    def rank(self, d: int) -> int:
        """See :meth:`FeatureFamily.rank`."""
        return self.directions

    def sizes(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """See :meth:`FeatureFamily.sizes`."""
        return {M: self.directions}

    def chunk_length(self, d: int, of_target: Callable[[int], int]) -> int:
        """Like polynomials of as many features."""
        return of_target(below(self.directions))

    @property
    def fitted(self) -> bool:
        """See :attr:`FeatureFamily.fitted`: the directions are drawn at the first call."""
        return True

    def packed_shape(self, kv_heads: int, d: int) -> tuple[int, ...]:
        """See :meth:`FeatureFamily.packed_shape`."""
        return kv_heads, self.directions, d + 1

    def fit(self, sample: Sample, generator: torch.Generator) -> Fit:
        """Draw the directions: orthogonal in blocks of d, each as long as a normal vector is.

        Raises:
            ValueError: a negative scale, whose root is not real.
        """
        if sample.scale < 0:
            raise ValueError(f"random features need a scale of the logits that is not negative, got {sample.scale}")
        heads, d = len(sample.k), sample.k.shape[-1]
        blocks = -(-self.directions // d)
        normal = torch.randn(2, heads, blocks, d, d, generator=generator, dtype=torch.float64)
        orthogonal, triangle = torch.linalg.qr(normal[0])
        # uniform among orthogonal matrices only where the triangle's diagonal is positive
        orthogonal = orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        lengths = normal[1].norm(dim=-1, keepdim=True)
        made = (orthogonal * lengths).flatten(1, 2)[:, : self.directions] * sample.scale**0.5
        logs = torch.full_like(made[..., :1], -0.5 * math.log(self.directions))
        return Fit(torch.cat([made, logs], 2).to(sample.k.device))

    def bind(self, packed: torch.Tensor | None, d: int) -> Bound:
        """See :meth:`FeatureFamily.bind`."""
        return Bound() if packed is None else Bound({"OMEGA": packed[..., :d], "LOGS": packed[..., d].contiguous()})

    def dense(self, q: torch.Tensor, k: torch.Tensor, scale: float, packed: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`FeatureFamily.dense`."""
        assert packed is not None, "directions are drawn at the first call"

        def features(x: torch.Tensor) -> torch.Tensor:
            norms = x.square().sum(-1, keepdim=True)
            made: torch.Tensor = torch.exp(x @ packed[..., :-1].mT - scale / 2 * norms) / float(packed.shape[-2]) ** 0.5
            return made

        return features(q) @ features(k).mT
