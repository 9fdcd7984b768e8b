"""Groups of similar tokens: features to compare tokens by, a balanced tree and k-means, and the tiles that hold them.

Shapes: H heads, n tokens, f features, A tiles of T tokens. Every tile is a cluster with moments of its own, so that
sums over a cluster are reductions over the axis T. Places of a tile without a token have ``valid`` False and weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VALUE_WEIGHT = 0.3
"""Weight of the values in the features of keys, relative to the features of the keys themselves."""
SAMPLE, POWER_STEPS = 256, 3
"""Tokens of a set that its leading direction is found from, and power steps from the token farthest away."""
REACH = 8
"""How many tiles a tile may give tokens to where a tree is refined, itself counted."""
LLOYD_STEPS, LLOYD_TOKENS = 3, 8
"""Lloyd steps of k-means, and the tokens per cluster that they see; one assignment of all tokens follows."""


@dataclass(frozen=True)
class Tiles:
    """Which tokens each tile holds."""

    index: Tensor
    """[H, A, T], long: positions of tokens, any position where no token is."""
    valid: Tensor
    """[H, A, T], bool: places that hold a token."""

    def gather(self, x: Tensor) -> Tensor:
        """[H, n, d] → [H, A, T, d], zero where no token is."""
        h, a, t = self.index.shape
        rows = self.index + torch.arange(h, device=x.device)[:, None, None] * x.shape[1]
        tiles = x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(h, a, t, -1)
        return tiles * self.valid[..., None]

    def scatter(self, tiles: Tensor, n: int) -> Tensor:
        """[H, A, T, d] → [H, n, d], zero for tokens of no tile."""
        h, a, t = self.index.shape
        out = tiles.new_zeros(h, n + 1, tiles.shape[-1])  # places without a token write into the row past the end
        rows = self.index.masked_fill(~self.valid, n).view(h, a * t, 1).expand(-1, -1, tiles.shape[-1])
        return out.scatter(1, rows, tiles.reshape(h, a * t, -1))[:, :n]

    def labels(self, n: int) -> Tensor:
        """[H, n]: the tile of each token, -1 for none."""
        h, a, t = self.index.shape
        out = self.index.new_full((h, n + 1), -1)
        number = torch.arange(a, device=self.index.device).view(1, a, 1).expand(h, a, t)
        rows = self.index.masked_fill(~self.valid, n).view(h, -1)
        return out.scatter(1, rows, number.reshape(h, -1))[:, :n]

    def sizes(self) -> Tensor:
        """[H, A]: tokens of each tile."""
        return self.valid.sum(2)


def covariance(x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [H, 1, d] and covariance [H, d, d] of x [H, n, d] over the valid tokens [H, n]."""
    w = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
    total = w.sum(1, keepdim=True).clamp_min(1)
    mean = (x * w).sum(1, keepdim=True) / total
    x0 = (x - mean) * w
    return mean, x0.mT @ x0 / total


def root(covariances: Tensor) -> Tensor:
    """L with L Lᵀ = Σ, [H, d, d]: it does for the square root, since only distances count and ‖x L‖² = x Σ xᵀ."""
    ridge = covariances.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * 1e-5
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    factor: Tensor = torch.linalg.cholesky(covariances + ridge[:, None, None] * eye)
    return factor


def features(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where tokens are grouped: (q − q̄) Σ_k^½ [H, n, d], and (k − k̄) Σ_q^½ beside the values [H, m, d + e].

    The values are centred and scaled to ``VALUE_WEIGHT`` times the power of the features of keys. Features of keys that
    are not valid [H, m] are zero.
    """
    q_mean, q_covariance = covariance(q)
    k_mean, k_covariance = covariance(k, valid)
    v_mean, _ = covariance(v, valid)
    of_q, of_k, of_v = (q - q_mean) @ root(k_covariance), (k - k_mean) @ root(q_covariance), v - v_mean
    if valid is not None:
        of_k, of_v = of_k * valid[..., None], of_v * valid[..., None]
    power_k, power_v = (x.square().sum((1, 2), keepdim=True) for x in (of_k, of_v))
    return of_q, torch.cat([of_k, VALUE_WEIGHT * (power_k / power_v.clamp_min(1e-30)).sqrt() * of_v], -1)


def tree(x: Tensor, width: int, valid: Tensor | None = None) -> Tiles:
    """Tiles of equal width: every set of features [H, n, f] is halved at the median along its leading direction.

    Tokens that are not valid [H, n] come last.

    Raises:
        ValueError: n is not ``width`` times a power of two.
    """
    h, n, f = x.shape
    if n % width or (n // width).bit_count() != 1:
        raise ValueError(
            f"a tree needs {width} times a power of two tokens, got {n}: pad with tokens that are not valid"
        )
    x = x.reshape(h * n, f)
    present = torch.ones(h * n, dtype=torch.bool, device=x.device) if valid is None else valid.reshape(-1)
    order, size = torch.arange(h * n, device=x.device), n
    while size > width:
        sets = h * (n // size)
        step = max(1, size // SAMPLE)
        members = order.view(sets, size)
        y = x.index_select(0, order).view(sets, size, f)
        w = present[members[:, ::step]][..., None].to(x.dtype)
        few = y[:, ::step]
        few = (few - (few * w).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp_min(1)) * w
        farthest = few.square().sum(2).argmax(1)
        axis = few[torch.arange(sets, device=x.device), farthest][:, None]  # [sets, 1, f]
        for _ in range(POWER_STEPS):
            axis = torch.nn.functional.normalize((axis @ few.mT) @ few, dim=2)
        along = (y @ axis.mT)[..., 0].masked_fill(~present[members], float("inf"))
        order, size = members.gather(1, along.argsort(1)).view(-1), size // 2
    start = torch.arange(h, device=x.device)[:, None] * n
    return Tiles((order.view(h, n) - start).view(h, n // width, width), present[order].view(h, n // width, width))


def refine(tiles: Tiles, x: Tensor) -> Tiles:
    """Tiles of the same widths with a smaller sum of squares of the features [H, n, f]: balanced Lloyd steps on pairs.

    Tiles i and i xor m, for each m below ``REACH``, share out their 2 T tokens by the direction between their means.
    Tiles that hold tokens that are not valid are left as they are.
    """
    h, a, t = tiles.index.shape
    if not bool(tiles.valid.all()):
        return tiles
    rows = x.reshape(-1, x.shape[-1])
    start = torch.arange(h, device=x.device)[:, None, None] * x.shape[1]
    order, number = tiles.index + start, torch.arange(a, device=x.device)
    for m in range(1, min(REACH, a)):
        first = number[(number ^ m) > number]
        pairs = torch.stack([first, first ^ m], 1)  # [A / 2, 2]
        both = order[:, pairs].reshape(-1, 2 * t)
        y = rows.index_select(0, both.view(-1)).view(-1, 2, t, x.shape[-1])
        mean = y.mean(2)
        along = (y.flatten(1, 2) @ (mean[:, 1] - mean[:, 0])[:, :, None])[..., 0]
        order[:, pairs] = both.gather(1, along.argsort(1)).view(h, len(first), 2, t)
    return Tiles(order - start, tiles.valid)


def k_means(x: Tensor, count: int) -> Tensor:
    """Labels [H, n] of features [H, n, f]: Lloyd steps on a sample, then the nearest of ``count`` means for each."""
    h, n, f = x.shape
    generator = torch.Generator().manual_seed(0)
    sample = x[:, torch.randperm(n, generator=generator)[: LLOYD_TOKENS * count].to(x.device)]
    centres = sample[:, :count]
    for _ in range(LLOYD_STEPS):
        member = nearest(sample, centres)
        total = torch.zeros_like(centres).scatter_add_(1, member[..., None].expand(-1, -1, f), sample)
        size = total.new_zeros(h, count).scatter_add_(1, member, torch.ones_like(member, dtype=x.dtype))[..., None]
        centres = torch.where(size > 0, total / size.clamp_min(1), centres)
    return nearest(x, centres)


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre [H, n] of every token, of centres [H, count, f]."""
    return torch.baddbmm(centres.square().sum(-1)[:, None] * -0.5, x, centres.mT).argmax(-1)


def split(labels: Tensor, count: int, width: int, valid: Tensor | None = None) -> tuple[Tiles, Tensor]:
    """Clusters of any size, by labels [H, n] below ``count``, cut into tiles; and the cluster of each tile [H, A].

    Tokens that are not valid [H, n] are in no tile. A is that of the head with the most tiles.
    """
    h, n = labels.shape
    if valid is not None:
        labels = labels.masked_fill(~valid, count)
    ordered, order = labels.sort(dim=1, stable=True)
    size = labels.new_zeros(h, count + 1).scatter_add_(1, labels, torch.ones_like(labels))
    tiles = (size + width - 1) // width
    tiles[:, count] = 0
    start, first = size.cumsum(1) - size, tiles.cumsum(1) - tiles
    total = int(tiles.sum(1).max())
    rank = torch.arange(n, device=labels.device) - start.gather(1, ordered)
    slot = (first.gather(1, ordered) * width + rank).masked_fill(ordered == count, total * width)
    index = labels.new_zeros(h, total * width + 1).scatter_(1, slot, order)
    filled = torch.zeros_like(index, dtype=torch.bool).scatter_(1, slot, True)
    number = torch.arange(total, device=labels.device).expand(h, total).contiguous()
    cluster = torch.searchsorted((first + tiles).contiguous(), number, right=True).clamp_max(count - 1)
    shape = (h, total, width)
    return Tiles(index[:, :-1].view(shape), filled[:, :-1].view(shape)), cluster
