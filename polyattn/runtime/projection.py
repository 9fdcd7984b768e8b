"""Leading directions of values, queries and keys, on which the substituted gradient is computed (math.md §2).

The factor (e + 1) d of its cost becomes (e′ + 1) d′. Rows of dS = P ∘ (G Vᵀ − δ 1ᵀ) sum to zero, so that values may be
taken around their mean; G Vᵀ is approximated by its largest singular directions, which second moments of G and V tell.
Of the keys those directions matter that dQ = dS K has, which some exact rows of it tell (the largest ones of the keys
themselves miss most of dQ on trained heads), and of the queries their largest ones.

Tensors are grouped by key head: queries [heads, groups, n_q, ·], keys [heads, n_k, ·].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from polyattn.rewriter.families.balance import balance
from polyattn.site_plan import ProjectionRanks


class Projected(NamedTuple):
    """Inputs of the kernels in coordinates, and the way back."""

    inputs: dict[str, torch.Tensor]
    """G, O [heads, groups, n_q, e′], V [heads, n_k, e′]; QP [heads, groups, n_q, d′], KP [heads, n_k, d′]."""
    of_keys: torch.Tensor | None
    """Orthonormal directions of the keys, [heads, d, d′]: those that dQ has coordinates of; None: dQ is whole."""
    of_queries: torch.Tensor | None
    """Orthonormal directions of the queries: those that dK has coordinates of; None: dK is whole."""

    def back(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of queries and keys from their coordinates; others are left as they are."""
        made = dict(gradients)
        if "dQ" in made and self.of_keys is not None:
            made["dQ"] = made["dQ"] @ self.of_keys[:, None].mT
        if "dK" in made and self.of_queries is not None:
            made["dK"] = made["dK"] @ self.of_queries.mT
        return made


def finite(*tensors: torch.Tensor) -> bool:
    """Whether moments can be taken of them: a gradient that overflowed has no directions."""
    return all(bool(x.isfinite().all()) for x in tensors)


def project(inputs: Mapping[str, torch.Tensor], ranks: ProjectionRanks, rows: Callable[[], torch.Tensor]) -> Projected:
    """Project on so many directions, or on all where there are fewer.

    Args:
        inputs: Q, K, V, G and O, as the kernels take them, all of them finite.
        rows: makes some rows of dQ, [heads, ·, d]; called where keys are projected.
    """
    q, k, v, g, out = (inputs[name] for name in ("Q", "K", "V", "G", "O"))
    made: dict[str, torch.Tensor] = {}
    of_k = of_q = None
    if ranks.values:
        centre, (of_g, of_v) = v.mean(1, keepdim=True), values(g, v, ranks.values)
        made |= {"G": g @ of_g[:, None], "V": (v - centre) @ of_v, "O": (out - centre[:, None]) @ of_v[:, None]}
    if ranks.keys:
        of_k, of_q = directions(rows(), ranks.keys), directions(q, ranks.keys)
        made |= {"QP": q @ of_q[:, None], "KP": k @ of_k}
    return Projected(made, of_k, of_q)


def values(g: torch.Tensor, v: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [heads, e, e′] with (G A) (V B)ᵀ ≈ G Vᵀ for values around their mean."""
    shifted = v - v.mean(1, keepdim=True)
    change = balance(g.flatten(1, 2), shifted, torch.ones_like(v[..., 0]))
    return change.q[..., -count:].to(v.dtype), change.k[..., -count:].to(v.dtype)


def directions(x: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal columns [heads, d, d′]: those of the largest second moments of x [heads, …, d]."""
    wide = x.flatten(1, -2).double()
    found: torch.Tensor = torch.linalg.eigh(wide.mT @ wide)[1]
    return found[..., -count:].to(x.dtype)
