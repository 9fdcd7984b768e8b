"""Balanced coordinates, in which queries and keys have one diagonal second moment (math.md §3, rotation)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Balance(NamedTuple):
    """Matrices [heads, d, d] for queries and keys, q' = q T_q and k' = k T_k with T_q T_kᵀ = 1, and the moments.

    ``spectrum`` [heads, d]: both second moments of every coordinate after it, ascending.
    """

    q: torch.Tensor
    k: torch.Tensor
    spectrum: torch.Tensor


def balance(q: torch.Tensor, k: torch.Tensor, mass: torch.Tensor) -> Balance:
    """Matrices after which the second moments of queries and of keys are one diagonal matrix, ascending (math.md §3).

    Args:
        q: queries [heads, …, d]; k: keys [heads, …, d], both shifted.
        mass: of the keys, the weights of their moments, [heads, keys].
    """
    q, k = (x.detach().double().flatten(1, -2) for x in (q, k))
    share = mass + 1e-9 * mass.mean(1, keepdim=True) + 1e-300  # all keys may be near ones
    share = share / share.sum(1, keepdim=True)
    factors = []
    for moment in (q.mT @ q / q.shape[1], (k * share[..., None]).mT @ k):
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        size = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
        factors.append(torch.linalg.cholesky(moment + 1e-6 * size * eye))
    left, right = factors
    _, sigma, v = torch.linalg.svd(left.mT @ right)
    v, sigma = v.mT.flip(2), sigma.flip(1)
    to_keys = torch.linalg.solve_triangular(right.mT, v, upper=True) * sigma.sqrt()[:, None]
    to_queries = (right @ v) * sigma.rsqrt()[:, None]
    return Balance(to_queries, to_keys, sigma)
