"""Moments of tiles of queries, of tiles of keys and of pairs of tiles, and the scores that say which pairs are near.

Shapes: H heads; A, B tiles of queries and of keys; T tokens of a tile; d, e widths of keys and values. Operands are in
tiles, zero where no token is (``tiles.Tiles.gather``); queries carry the scale of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -1e30
"""A logit of weight 0 that, other than −inf, can be subtracted from itself."""
LARGEST_TRACE = 25.0
"""Where the variance of logits inside a pair is cut off in its score (math.md §8)."""


@dataclass(frozen=True)
class QueryMoments:
    """Moments of every tile (or cluster) of queries."""

    mu: Tensor
    """[H, A, d], μ_a: the mean."""
    sigma: Tensor
    """[H, A, d, d], Σ_a: the covariance."""
    size: Tensor
    """[H, A]: tokens."""


@dataclass(frozen=True)
class KeyMoments:
    """Moments of every tile of keys and their values, each key counted once."""

    cross: Tensor
    """[H, B, d, e], M_b: the cross-covariance of keys and values."""
    sigma: Tensor
    """[H, B, d, d], C_b: the covariance of keys."""
    var: Tensor
    """[H, B]: the trace of the covariance of values."""
    size: Tensor
    """[H, B]: tokens."""
    radius: Tensor
    """[H]: the largest distance of a value from their mean."""


@dataclass(frozen=True)
class PseudoKeys:
    """What the mean query of a tile sees of a tile of keys: one key, one value, and a bias of its logit."""

    log_mass: Tensor
    """[H, A, B], log D_ab = log Σ_{j ∈ b} exp(μ_a · k_j); −inf for a tile without tokens."""
    key: Tensor
    """[H, A, B, d], c_ab: the mean of the keys with weights exp(μ_a · k_j)."""
    value: Tensor
    """[H, A, B, e], V_ab / D_ab: the mean of the values with the same weights."""


def centred(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [H, A, 1, d] of each tile, deviations from it (zero where no token is), and sizes [H, A, 1, 1], ≥ 1."""
    w = valid[..., None].to(x.dtype)
    size = w.sum(2, keepdim=True).clamp_min(1)
    mean = (x * w).sum(2, keepdim=True) / size
    return mean, (x - mean) * w, size


def query_moments(q: Tensor, valid: Tensor) -> QueryMoments:
    """Moments of queries [H, A, T, d]."""
    mean, delta, size = centred(q, valid)
    return QueryMoments(mean[:, :, 0], delta.mT @ delta / size, valid.sum(2).to(q.dtype))


def key_moments(k: Tensor, v: Tensor, valid: Tensor) -> KeyMoments:
    """Moments of keys [H, B, T, d] and values [H, B, T, e]."""
    _, k0, size = centred(k, valid)
    _, v0, _ = centred(v, valid)
    mean = v.sum((1, 2), keepdim=True) / valid.sum((1, 2)).clamp_min(1)[:, None, None, None]
    radius = ((v - mean).square().sum(-1) * valid).amax((1, 2)).sqrt()
    var = v0.square().sum(3).sum(2) / size[..., 0, 0]
    return KeyMoments(k0.mT @ v0 / size, k0.mT @ k0 / size, var, valid.sum(2).to(k.dtype), radius)


def pair_weights(mu: Tensor, k: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """ω_aj = exp(μ_a · k_j) / D_ab [H, B, A, T], and log D_ab [H, A, B]."""
    bias = torch.zeros_like(k[..., 0]).masked_fill(~valid, LOWEST)
    logits = mu[:, None] @ k.mT + bias[:, :, None]
    log_mass = logits.logsumexp(3).masked_fill(~valid.any(2)[:, :, None], float("-inf"))
    return logits.softmax(3), log_mass.mT


def pseudo_keys(mu: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> PseudoKeys:
    """One key and value for each pair of tiles, from means [H, A, d], keys [H, B, T, d] and values [H, B, T, e]."""
    omega, log_mass = pair_weights(mu, k, valid)
    key, value = ((omega @ x).transpose(1, 2).contiguous() for x in (k, v))
    return PseudoKeys(log_mass.contiguous(), key, value)


def scores(
    queries: QueryMoments, keys: KeyMoments, pseudo: PseudoKeys, exponent: float = 0.5, ratio: float | None = None
) -> Tensor:
    """[H, A, B]: lifted share · min(25, tr Σ_a C_b)^exponent · size; a pair is near where this exceeds τ.

    Squares are expanded, so that products with Σ_a are the only temporaries of shape [H, A, B, d].

    Args:
        exponent: 1 in math.md §8; ½ errs less at the same number of near pairs.
        ratio: the relative tolerance over the additive one. With it, size is measured in ratio · RMS_a ‖ō_a − ō‖ where
            that is below max ‖v − v̄‖, so that heads whose output hardly varies keep the relative tolerance too.
    """
    log_share = pseudo.log_mass.log_softmax(2)
    share = log_share.exp()[:, :, None]  # [H, A, 1, B]
    mean_key, out = share @ pseudo.key, share @ pseudo.value  # [H, A, 1, d], [H, A, 1, e]
    turned, turned_mean = pseudo.key @ queries.sigma, mean_key @ queries.sigma
    square = (turned * pseudo.key).sum(3)
    variance = square + (-2 * turned @ mean_key.mT + turned_mean @ mean_key.mT)[..., 0]  # c̃ᵀ Σ_a c̃
    lifted = (log_share + variance / 2).clamp(max=0).exp()
    away = pseudo.value.square().sum(3) + (-2 * pseudo.value @ out.mT + out @ out.mT)[..., 0]
    unit = keys.radius
    if ratio is not None:
        w = (queries.size / queries.size.sum(1, keepdim=True))[..., None, None]
        from_mean = out - (w * out).sum(1, keepdim=True)
        unit = torch.minimum(unit, ratio * (w * from_mean.square()).sum((1, 2, 3)).sqrt())
    size = (away.clamp(min=0) + keys.var[:, None]).sqrt() / unit[:, None, None]
    trace = (queries.sigma.flatten(2) @ keys.sigma.flatten(2).mT).clamp(min=0, max=LARGEST_TRACE)
    return lifted * trace**exponent * size
