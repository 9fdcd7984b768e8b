"""Validity checks of rows: rows of a low-rank form that no softmax has are off for certain, at a linear cost.

A row of softmax attention has a denominator of at least W exp(Σ_j b_j s_j / W), by Jensen's inequality, with factors b
of the keys, their sum W and logits s; and its output is a mean of values, no further from any point than the furthest
value. Where an approximation of exp is close, both hold; rows far outside of what was fitted, whose denominators are
near zero or whose entries are large and of both signs, break one of them most of the time.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d], values [heads, n_k, e].
"""

from __future__ import annotations

import torch

from polyattn.rewriter.families.moments import mean_of
from polyattn.runtime.centring import Centred
from polyattn.site_plan import SitePlan

SHARE, REACH = 0.5, 1.1
"""Parts of the least denominator, and of the distance of the furthest value, from which on a row is taken for off:
half of the denominator is missing, or the output is off by a tenth of that distance."""


def denominators(centred: Centred, found: torch.Tensor, plan: SitePlan) -> torch.Tensor:
    """Which denominators [heads, groups, n_q] are not finite, not positive or too small."""
    factors = torch.ones_like(centred.k[..., 0]) if centred.factors is None else centred.factors
    n_q = found.shape[-1]
    sums = plan.mask.sums_of(factors, n_q)
    means = plan.mask.sums_of(centred.k * factors[..., None], n_q)
    means = means / sums.clamp_min(torch.finfo(sums.dtype).tiny)[..., None]
    least = (plan.scale * (centred.q * means[:, None]).sum(-1)).exp() * sums[:, None]
    # Where every key that is seen has the factor zero, nothing is missing.
    return ~(torch.isfinite(found) & ((found > SHARE * least) | ((sums == 0)[:, None] & (found == 0))))


def outputs(v: torch.Tensor, found: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Which outputs [heads, groups, n_q, e] are not finite or further from the mean value than every value.

    Args:
        keep: which values take part, bool [heads, n_k]; None: all.
    """
    centre = mean_of(v, keep)
    sizes = torch.stack([(v - centre).norm(dim=-1), v.norm(dim=-1)])
    sizes = sizes if keep is None else sizes.masked_fill(~keep, 0)
    furthest, largest = sizes.amax(2)
    rounding = torch.finfo(v.dtype).eps ** 0.5 * largest
    inside: torch.Tensor = (found - centre[:, None]).norm(dim=-1) <= (REACH * furthest + rounding)[:, None, None]
    return ~inside
