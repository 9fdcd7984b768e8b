"""The output of clustered attention: far field, near field, and their merge.

The far field is softmax attention of a tile's queries over one pseudo-key per tile of keys: E_b D_ab = exp(δ · c_ab +
log D_ab). Logits are absolute everywhere, so that both fields merge like two blocks of an online softmax.

Shapes: H heads; A, B tiles of queries and of keys; T tokens of a tile; d, e widths of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clustered.moments import (
    LOWEST,
    KeyMoments,
    PseudoKeys,
    QueryMoments,
    key_moments,
    pseudo_keys,
    query_moments,
)
from clustered.plan import Plan

GROUP_LOGITS = 1 << 19
"""Near logits that are computed at a time."""


@dataclass(frozen=True)
class Partial:
    """Softmax sums over some of the keys: Σ exp(logit − top) v and Σ exp(logit − top)."""

    acc: Tensor
    """[H, A, T, e]"""
    total: Tensor
    """[H, A, T, 1]"""
    top: Tensor
    """[H, A, T, 1], finite and not differentiated."""


def far_bias(pseudo: PseudoKeys, near: Tensor) -> Tensor:
    """[H, A, B]: log D_ab, −inf where the pair is near."""
    return pseudo.log_mass.masked_fill(near, float("-inf"))


def far_field(
    q: Tensor, queries: QueryMoments, keys: KeyMoments, pseudo: PseudoKeys, near: Tensor, *, corrected: bool = True
) -> Partial:
    """Queries [H, A, T, d] over the pseudo-keys of their tile.

    Corrected, the sums also have what the pooled moments M_a and C_a say of keys and values inside far tiles:
    N (1 + s) + D δᵀ M_a and D (1 + s), s = min(1, ½ δᵀ C_a δ).
    """
    delta, bias = q - queries.mu[:, :, None], far_bias(pseudo, near)
    logits = delta @ pseudo.key.mT + bias[:, :, None]
    top = logits.detach().amax(3, keepdim=True).clamp_min(LOWEST)
    weights = (logits - top).exp()
    acc, total = weights @ pseudo.value, weights.sum(3, keepdim=True)
    if corrected:
        cross, sigma = pooled(bias, keys)
        s = second_order(delta, sigma)
        acc, total = acc * (1 + s) + total * (delta @ cross), total * (1 + s)
    return Partial(acc, total, top)


def pooled(bias: Tensor, keys: KeyMoments) -> tuple[Tensor, Tensor]:
    """M_a [H, A, d, e] and C_a [H, A, d, d]: means over the far tiles with weights exp(bias), zero without any."""
    weights = (bias - bias.amax(2, keepdim=True).clamp_min(LOWEST)).exp()
    share = weights / weights.sum(2, keepdim=True).clamp_min(1e-30)
    cross, sigma = (share @ x.flatten(2) for x in (keys.cross, keys.sigma))
    return cross.unflatten(2, keys.cross.shape[2:]), sigma.unflatten(2, keys.sigma.shape[2:])


def second_order(delta: Tensor, sigma: Tensor) -> Tensor:
    """s = min(1, ½ δᵀ C_a δ) [H, A, T, 1]."""
    return ((delta @ sigma) * delta).sum(3, keepdim=True).mul(0.5).clamp(max=1)


@dataclass(frozen=True)
class NearRows:
    """Some tiles of queries, and for each the tiles of keys near it, as many for all of them."""

    rows: Tensor
    """[G], numbers of tiles of queries among H · A."""
    tiles: Tensor
    """[G, c], numbers of tiles of keys among H · B."""
    bias: Tensor
    """[G, 1, c · T]: −inf where no key is."""


def near_rows(near: Tensor, valid: Tensor) -> Iterator[NearRows]:
    """All near pairs [H, A, B] for keys [H, B, T], rows of similar length together: the longest of all heads first."""
    h, a, b = near.shape
    t = valid.shape[2]
    flat, present = near.reshape(h * a, b), valid.reshape(h * b, t)
    count = flat.sum(1)
    order = count.argsort(descending=True)
    lengths = count[order].tolist()
    listed = (~flat).to(torch.uint8).argsort(dim=1, stable=True)  # near tiles first
    start = torch.arange(h, device=near.device).repeat_interleave(a)[:, None] * b
    at, stop = 0, sum(length > 0 for length in lengths)
    while at < stop:
        longest = lengths[at]
        end = min(stop, at + max(1, GROUP_LOGITS // (longest * t * t)))
        rows = order[at:end]
        tiles = listed[rows, :longest] + start[rows]
        listed_here = torch.arange(longest, device=near.device) < count[rows, None]
        absent = ~(listed_here[..., None] & present[tiles])
        bias = torch.zeros(absent.shape, device=near.device).masked_fill_(absent, float("-inf"))
        yield NearRows(rows, tiles, bias.view(len(rows), 1, longest * t))
        at = end


def near_field(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, near: Tensor) -> Partial:
    """Exact softmax sums of queries [H, A, T, d] over the tiles of keys [H, B, T, d] that are near."""
    h, a, t, d = q.shape
    t_k, e = v.shape[2:]
    rows, parts = [], []
    for some in near_rows(near, valid):
        shape = (len(some.rows), some.tiles.shape[1] * t_k)
        k_near = k.reshape(-1, t_k * d)[some.tiles.flatten()].view(*shape, d)
        v_near = v.reshape(-1, t_k * e)[some.tiles.flatten()].view(*shape, e)
        logits = q.reshape(h * a, t, d)[some.rows] @ k_near.mT + some.bias.to(q.dtype)
        top = logits.detach().amax(2, keepdim=True).clamp_min(LOWEST)
        weights = (logits - top).exp()
        rows.append(some.rows)
        parts.append(torch.cat([weights @ v_near, weights.sum(2, keepdim=True), top], 2))
    sums = torch.cat([q.new_zeros(h * a, t, e + 1), q.new_full((h * a, t, 1), LOWEST)], 2)
    if rows:
        sums = sums.index_copy(0, torch.cat(rows), torch.cat(parts))
    acc, total, top = sums.view(h, a, t, e + 2).split([e, 1, 1], 3)
    return Partial(acc, total, top.detach())


def merge(x: Partial, y: Partial) -> tuple[Tensor, Tensor]:
    """The output [H, A, T, e] of both sums together, and the logarithm of the whole sum of weights [H, A, T, 1]."""
    top = torch.maximum(x.top, y.top)
    factor_x, factor_y = (x.top - top).exp(), (y.top - top).exp()
    total = x.total * factor_x + y.total * factor_y
    return (x.acc * factor_x + y.acc * factor_y) / total, top + total.log()


def output_in_tiles(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, corrected: bool = True) -> tuple[Tensor, Tensor]:
    """Output [H, A, T, e] and logarithm of the sum of weights [H, A, T, 1] of operands in tiles."""
    queries, keys = query_moments(q, plan.queries.valid), key_moments(k, v, plan.keys.valid)
    pseudo = pseudo_keys(queries.mu, k, v, plan.keys.valid)
    far = far_field(q, queries, keys, pseudo, plan.near, corrected=corrected)
    return merge(far, near_field(q, k, v, plan.keys.valid, plan.near))


def output(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, corrected: bool = True) -> Tensor:
    """The output [H, n, e] for queries [H, n, d] (with the scale), keys [H, m, d] and values [H, m, e].

    It is differentiable: autograd's gradient is the consistent one. Without the correction by pooled moments the far
    weights are those of order 0.
    """
    in_tiles = plan.queries.gather(q), plan.keys.gather(k), plan.keys.gather(v)
    out, _ = output_in_tiles(*in_tiles, plan, corrected=corrected)
    return plan.queries.scatter(out, q.shape[1])
