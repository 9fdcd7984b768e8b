"""Leading directions of values, queries and keys, on which the substituted gradient is computed (math.md §2).

The factor (e + 1) d of its cost becomes (e′ + 1) d′. Rows of dS = P ∘ (G Vᵀ − δ 1ᵀ) sum to zero, so that values may be
taken around their mean; G Vᵀ is approximated by its largest singular directions, which second moments of G and V tell,
and K and Q, which dS meets, by their own.

Tensors are grouped by key head: queries [heads, groups, n_q, ·], keys [heads, n_k, ·].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from polyattn.rewriter import polynomial


class Projected(NamedTuple):
    """Inputs of the kernels in coordinates, and the way back."""

    inputs: dict[str, torch.Tensor]
    """G, O [heads, groups, n_q, e′], V [heads, n_k, e′], QP [heads, groups, n_q, d′], KP [heads, n_k, d′]."""
    of_keys: torch.Tensor
    """Orthonormal directions of the keys, [heads, d, d′]: those that dQ has coordinates of."""
    of_queries: torch.Tensor
    """Of the queries: those of dK."""

    def back(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of queries and keys from their coordinates; others are left as they are."""
        made = dict(gradients)
        if "dQ" in made:
            made["dQ"] = made["dQ"] @ self.of_keys[:, None].mT
        if "dK" in made:
            made["dK"] = made["dK"] @ self.of_queries.mT
        return made


def finite(*tensors: torch.Tensor) -> bool:
    """Whether moments can be taken of them: a gradient that overflowed has no directions."""
    return all(bool(x.isfinite().all()) for x in tensors)


def project(inputs: Mapping[str, torch.Tensor], count: int) -> Projected:
    """On ``count`` directions, or all where there are fewer.

    Args:
        inputs: Q, K, V, G and O, as the kernels take them, all of them finite.
    """
    q, k, v, g, out = (inputs[name] for name in ("Q", "K", "V", "G", "O"))
    centre = v.mean(1, keepdim=True)
    of_g, of_v = values(g, v, count)
    of_q, of_k = directions(q, count), directions(k, count)
    made = {
        "G": g @ of_g[:, None],
        "V": (v - centre) @ of_v,
        "O": (out - centre[:, None]) @ of_v[:, None],
        "QP": q @ of_q[:, None],
        "KP": k @ of_k,
    }
    return Projected(made, of_k, of_q)


def values(g: torch.Tensor, v: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [heads, e, e′] with (G A) (V B)ᵀ ≈ G Vᵀ for values around their mean."""
    shifted = v - v.mean(1, keepdim=True)
    turn = polynomial.balance(g.flatten(1, 2), shifted, torch.ones_like(v[..., 0]))
    return turn.q[..., -count:].to(v.dtype), turn.k[..., -count:].to(v.dtype)


def directions(x: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal columns [heads, d, d′]: those of the largest second moments of x [heads, …, d]."""
    wide = x.flatten(1, -2).double()
    found: torch.Tensor = torch.linalg.eigh(wide.mT @ wide)[1]
    return found[..., -count:].to(x.dtype)
