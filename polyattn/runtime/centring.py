"""Exact transformations of queries and keys, after which the logits are small where exp is approximated (math.md §3).

    exp(s q·k) = exp(s (q − u)·(k − c)) · exp(s u·(k − c)) · exp(s q·c)

The last factor is the same in a row and cancels in the softmax, also under a causal mask; the middle one is a factor
exp(bias) of the key; only the first is approximated. c and u are mean key and mean query of a head. Products do not
change either when q is multiplied by a matrix and k by its inverse transpose, which nested polynomials need. Keys that
are computed exactly elsewhere (outlier_keys.py) get the factor zero. Means, matrices and the choice of such keys are
constants to differentiation.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from polyattn.rewriter.families.family import ChangeOfBasis
from polyattn.site_plan import OutlierKeys, SitePlan


class Centred(NamedTuple):
    """Queries and keys as the kernels take them."""

    q: torch.Tensor
    k: torch.Tensor
    factors: torch.Tensor | None
    """exp(bias) of the keys, [heads, n_k], at most 1; None without centring and without outlier keys."""
    u: torch.Tensor
    """Mean queries, [heads, d]."""
    c: torch.Tensor
    """Mean keys, of those that are no outliers, [heads, d]; zero without centring, as u is."""
    top: torch.Tensor
    """The largest bias, which the factors are relative to, [heads]."""
    outliers: torch.Tensor | None
    """Positions of the keys that are computed exactly, [heads, ·]."""
    change: ChangeOfBasis | None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the kernels take in place of queries and keys."""
        return {"Q": self.q, "K": self.k, **({} if self.factors is None else {"B": self.factors})}

    def query_gradient(self, dq: torch.Tensor) -> torch.Tensor:
        """The gradient by the queries, from the kernels'."""
        return dq if self.change is None else dq @ self.change.q[:, None].mT

    def key_gradient(self, dk: torch.Tensor, dfactors: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The gradient by the keys, of which the factors are made as well: ∂ log b_j / ∂k_j = s u."""
        if self.change is not None:
            dk = dk @ self.change.k.mT
        if dfactors is None or self.factors is None:
            return dk
        return dk + (dfactors * self.factors)[..., None] * (scale * self.u)[:, None]


def choose_outliers(
    k: torch.Tensor, wanted: OutlierKeys, some: int | None, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions [heads, ·] of outlier keys among keys [heads, n_k, d]; the largest are of the ``some`` first ones.

    Norms are around the mean of the others: found twice, because a very large key moves the mean of all. Keys that take
    no part (``keep`` [heads, n_k] false) come last.
    """
    n = k.shape[1]
    named = torch.tensor(sorted(p for p in set(wanted.positions) if p < n), dtype=torch.long, device=k.device)
    chosen = named.expand(len(k), -1)
    free = min(n if some is None else some, n)
    count = min(wanted.count, free - int((named < free).sum()))
    for _ in range(2):
        norms = (k[:, :free] - _mean(k, chosen, some, keep)[:, None]).norm(dim=-1)
        norms = norms.index_fill(1, named[named < free], -2)
        norms = norms if keep is None else norms.masked_fill(~keep[:, :free] & (norms >= 0), -1)
        chosen = torch.cat([named.expand(len(k), -1), norms.topk(count)[1]], 1)
    return chosen


def _mean(k: torch.Tensor, outliers: torch.Tensor | None, some: int | None, keep: torch.Tensor | None) -> torch.Tensor:
    """The mean of the first keys of [heads, n_k, d] that take part and are no outliers; zero where none is left."""
    if outliers is None and keep is None:
        return k[:, :some].mean(1)
    share = torch.ones_like(k[..., 0]) if keep is None else keep.to(k.dtype)
    share = share if outliers is None else share.scatter(1, outliers, 0.0)
    share = share[:, :some, None]
    return (k[:, :some] * share).sum(1) / share.sum(1).clamp_min(1)


def centre(
    q: torch.Tensor,
    k: torch.Tensor,
    plan: SitePlan,
    change: ChangeOfBasis | None = None,
    keep: torch.Tensor | None = None,
) -> Centred:
    """Subtract the means of a call's queries and keys, and multiply by the matrices of a change of basis.

    With ``centring="first_chunk"`` means, and the outlier keys of largest norm, are those of the first chunk.

    Args:
        keep: which keys take part, bool [heads, n_k]; the others become the mean key, with the factor 0. None: all.
    """
    if keep is not None:
        k = k.masked_fill(~keep[..., None], 0)
    zero = torch.zeros_like(k[:, 0])
    factors, u, c, top = None, zero, zero, zero[:, 0]
    some = plan.chunk if plan.centring == "first_chunk" else None
    chosen = choose_outliers(k, plan.outliers, some, keep) if plan.outliers else None
    bias = torch.zeros_like(k[..., 0]) if chosen is not None or keep is not None else None
    if plan.centring != "none":
        c, u = _mean(k, chosen, some, keep), q[:, :, :some].mean((1, 2))
        q, k = q - u[:, None, None], k - c[:, None]
        k = k if keep is None else k.masked_fill(~keep[..., None], 0)
        bias = torch.einsum("hjd,hd->hj", k, u) * plan.scale
    if bias is not None:
        if chosen is not None:
            bias = bias.scatter(1, chosen, -torch.inf)
        if keep is not None:
            bias = bias.masked_fill(~keep, -torch.inf)
        top = bias.amax(1)
        top = top.masked_fill(top == -torch.inf, 0)
        factors = (bias - top[:, None]).exp()
    if change is not None:
        q, k = q @ change.q[:, None], k @ change.k
    return Centred(q, k, factors, u, c, top, chosen, change)
