"""The causal form: nothing about a query depends on later tokens (math.md §8).

A sequence is cut into segments. Keys are in tiles of their segment, for the queries of later ones. Queries are assigned
to clusters of queries of *earlier* segments, formed anew whenever the past has doubled; the mean and covariance of
those clusters and the past keys say which tiles are near. A query's own segment is exact.

Shapes: H heads, n tokens, L tokens of a segment, A clusters of queries, B tiles of past keys, d and e widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clustered.fields import Partial, far_field, merge, near_field
from clustered.moments import (
    LOWEST,
    KeyMoments,
    PseudoKeys,
    QueryMoments,
    key_moments,
    pseudo_keys,
    scores,
)
from clustered.tiles import Tiles, covariance, features, k_means, nearest, root, split, tree

MOMENT_WIDTH = 32
"""Tokens of a tile in which moments of clusters of queries are summed up."""


@dataclass(frozen=True)
class CausalSetting:
    """How segments and tiles are made, and which pairs of them are near."""

    segment: int = 512
    """Tokens of a segment: ``width_k`` times a power of two."""
    width_q: int = 32
    """Tokens of a tile of queries; tiles here only group queries of one cluster for execution."""
    width_k: int = 64
    """Tokens of a tile of keys."""
    cluster: int = 64
    """Earlier queries per cluster."""
    tau: float = 4e-3
    """A pair is near where its score exceeds this."""


@dataclass(frozen=True)
class Clusters:
    """Clusters of queries of earlier segments."""

    moments: QueryMoments
    mean: Tensor
    """[H, 1, d]: of all earlier queries."""
    root: Tensor
    """[H, d, d]: takes deviations from the mean to the features that clusters are formed in."""

    def assign(self, q: Tensor) -> Tensor:
        """[H, n]: the nearest cluster of each query [H, n, d]."""
        return nearest((q - self.mean) @ self.root, (self.moments.mu - self.mean) @ self.root)


@dataclass(frozen=True)
class Segment:
    """What was held constant for the queries of a segment."""

    queries: Tiles
    cluster: Tensor
    """[H, tiles]: the cluster of each tile of queries."""
    moments: QueryMoments
    near: Tensor
    """[H, A, B]"""
    pairs: Tensor
    """[H]: exact pairs of tokens with the past."""
    executed: Tensor
    """[H]: the same with the empty places of tiles."""


def key_tiles(q: Tensor, k: Tensor, v: Tensor, setting: CausalSetting) -> Tiles:
    """Tiles [H, n / width, width] of the keys, formed in each segment from its own tokens alone, in their order."""
    h, n, _ = k.shape
    count = n // setting.segment
    tiles = tree(features(*(x.reshape(h * count, setting.segment, -1) for x in (q, k, v)))[1], setting.width_k)
    start = (torch.arange(count, device=k.device) * setting.segment).repeat(h)[:, None, None]
    shape = (h, n // setting.width_k, setting.width_k)
    return Tiles((tiles.index + start).view(shape), tiles.valid.view(shape))


def clusters(q: Tensor, k: Tensor, per_cluster: int) -> Clusters:
    """Clusters of the queries [H, n, d] that have been, k-means in the metric of the keys that have been."""
    h, n, d = q.shape
    count = n // per_cluster
    mean, factor = q.mean(1, keepdim=True), root(covariance(k)[1])
    tiles, cluster = split(k_means((q - mean) @ factor, count), count, MOMENT_WIDTH)
    x, w, at = tiles.gather(q), tiles.valid[..., None].to(q.dtype), cluster[..., None]
    size = x.new_zeros(h, count).scatter_add_(1, cluster, w.sum((2, 3)))
    mu = x.new_zeros(h, count, d).scatter_add_(1, at.expand(-1, -1, d), x.sum(2)) / size.clamp_min(1)[..., None]
    delta = (x - mu.gather(1, at.expand(-1, -1, d))[:, :, None]) * w
    squares = x.new_zeros(h, count, d * d).scatter_add_(1, at.expand(-1, -1, d * d), (delta.mT @ delta).flatten(2))
    sigma = (squares / size.clamp_min(1)[..., None]).unflatten(2, (d, d))
    return Clusters(QueryMoments(mu, sigma, size), mean, factor)


def output(q: Tensor, k: Tensor, v: Tensor, setting: CausalSetting) -> tuple[Tensor, list[Segment]]:
    """The output [H, n, e], and what was held constant in every segment but the first.

    Raises:
        ValueError: n is no multiple of the segment.
    """
    n, length = q.shape[1], setting.segment
    if n % length:
        raise ValueError(f"a causal call needs a multiple of {length} tokens, got {n}: pad at the end")
    tiles = key_tiles(q, k, v, setting)
    k_t, v_t = tiles.gather(k), tiles.gather(v)
    of_keys = key_moments(k_t, v_t, tiles.valid)
    outs, segments, known = [], [], None
    for number in range(n // length):
        here, past = slice(number * length, (number + 1) * length), slice(number * length)
        own = within_segment(q[:, here], k[:, here], v[:, here])
        if number == 0:
            outs.append(own.acc / own.total)
            continue
        if known is None or number.bit_count() == 1:
            known = clusters(q[:, past], k[:, past], setting.cluster)
        count = number * length // setting.width_k
        radius = (v[:, past] - v[:, past].mean(1, keepdim=True)).norm(dim=2).amax(1)
        of_past = KeyMoments(*(x[:, :count] for x in (of_keys.cross, of_keys.sigma, of_keys.var, of_keys.size)), radius)
        in_past = k_t[:, :count], v_t[:, :count], tiles.valid[:, :count]
        partial, segment = over_past(q[:, here], known, *in_past, of_past, setting)
        outs.append(merge(partial, own)[0])
        segments.append(segment)
    return torch.cat(outs, 1), segments


def within_segment(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Exact causal attention inside a segment: sums [H, L, e] and [H, L, 1]."""
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.mT).masked_fill(later, float("-inf"))
    top = logits.detach().amax(2, keepdim=True)
    weights = (logits - top).exp()
    return Partial(weights @ v, weights.sum(2, keepdim=True), top)


def over_past(
    q: Tensor, known: Clusters, k: Tensor, v: Tensor, valid: Tensor, keys: KeyMoments, setting: CausalSetting
) -> tuple[Partial, Segment]:
    """Sums of a segment's queries [H, L, d] over past tiles of keys [H, B, T, d], and what was held constant."""
    of_clusters = known.moments
    pseudo = pseudo_keys(of_clusters.mu, k, v, valid)
    near = scores(of_clusters, keys, pseudo) > setting.tau
    tiles, cluster = split(known.assign(q), of_clusters.mu.shape[1], setting.width_q)

    def of_tiles(x: Tensor) -> Tensor:
        """[H, A, ...] → [H, tiles, ...]: what the cluster of each tile has."""
        rows = cluster + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, cluster.shape)

    q_t = tiles.gather(q)
    # the mean is that of earlier queries: to centre by the tile's own would let queries see later ones
    of_queries = QueryMoments(*(of_tiles(x) for x in (of_clusters.mu, of_clusters.sigma, of_clusters.size)))
    of_pairs = PseudoKeys(*(of_tiles(x) for x in (pseudo.log_mass, pseudo.key, pseudo.value)))
    near_tiles = of_tiles(near) & tiles.valid.any(2)[:, :, None]
    far = far_field(q_t, of_queries, keys, of_pairs, near_tiles)
    out, log_sum = merge(far, near_field(q_t, k, v, valid, near_tiles))
    out, log_sum = tiles.scatter(out, q.shape[1]), tiles.scatter(log_sum, q.shape[1])
    pairs = (near_tiles.sum(2) * tiles.sizes()).sum(1) * setting.width_k
    executed = near_tiles.sum((1, 2)) * setting.width_q * setting.width_k
    partial = Partial(out, torch.ones_like(log_sum), log_sum.clamp_min(LOWEST))
    return partial, Segment(tiles, cluster, of_clusters, near, pairs, executed)


def near_shares(segments: list[Segment], n: int, setting: CausalSetting) -> tuple[Tensor, Tensor]:
    """Of the n² / 2 causal pairs, per head [H]: those computed exactly, and those with the empty places of tiles.

    The own segments are exact in both.
    """
    own = n * setting.segment / 2
    pairs, executed = (torch.stack(x).sum(0) for x in zip(*((s.pairs, s.executed) for s in segments), strict=True))
    return (pairs + own) / (n * n / 2), (executed + own) / (n * n / 2)
