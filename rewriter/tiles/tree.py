"""Tiles of similar tokens: what tokens are compared by, and a balanced tree that sorts them (math.md §8).

Every set of tokens is halved at the median along its leading direction until tiles are left, all of one width, so that
nothing is ragged: sums over a tile are sums over an axis. Shapes: H heads, n tokens, f features, A tiles of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyattn.rewriter.families.moments import covariance_of, mean_of

VALUE_WEIGHT = 0.3
"""Weight of the values in what keys are compared by, relative to the keys themselves."""
LEADING = 16
"""Directions that tokens are compared in, at most: more cost time and change no tile that matters."""
SAMPLE, POWER_STEPS = 256, 3
"""Tokens of a set that its leading direction is found from, and power steps from the token farthest away."""
MULTIPLE = 8
"""Wide tiles have a multiple of so many tokens, which suits matrix products."""


@dataclass(frozen=True)
class Shape:
    """How a sequence is laid out in tiles: their number, a power of two, and the tokens of each."""

    tiles: int
    width: int

    @classmethod
    def of(cls, tokens: int, wanted: int) -> Shape:
        """The layout of a sequence whose tiles are to have about ``wanted`` tokens."""
        tiles = 1
        while tokens > tiles * wanted * 2**0.5:
            tiles *= 2
        width = -(-tokens // tiles)
        return cls(tiles, width if width < 2 * MULTIPLE else -(-width // MULTIPLE) * MULTIPLE)

    @property
    def places(self) -> int:
        """Places for tokens, at least as many as there are."""
        return self.tiles * self.width


@dataclass(frozen=True)
class Tiles:
    """Which tokens each tile holds."""

    index: Tensor
    """[H, A, T], long: positions of tokens; where a place is empty, that of some token that takes part."""
    valid: Tensor
    """[H, A, T], bool: places that hold a token."""
    full: bool
    """Whether every place does."""

    def gather(self, x: Tensor) -> Tensor:
        """[H, n, ...] → [H, A, T, ...]."""
        h, n = x.shape[:2]
        rows = self.index + torch.arange(h, device=x.device)[:, None, None] * n
        made = x.reshape(h * n, *x.shape[2:]).index_select(0, rows.flatten())
        return made.view(*self.index.shape, *x.shape[2:])

    def scatter(self, tiles: Tensor, n: int) -> Tensor:
        """[H, A, T, ...] → [H, n, ...], zero for tokens of no tile."""
        h = len(tiles)
        rest = tiles.shape[3:]
        rows = self.index + torch.arange(h, device=tiles.device)[:, None, None] * n
        if self.full and self.index[0].numel() == n:
            out = tiles.new_empty(h * n, *rest)
            out[rows.flatten()] = tiles.reshape(-1, *rest)
            return out.view(h, n, *rest)
        out = tiles.new_zeros(h * n + 1, *rest)  # empty places write into the row past the end
        out[rows.masked_fill(~self.valid, h * n).flatten()] = tiles.reshape(-1, *rest)
        return out[:-1].view(h, n, *rest)


def root(covariances: Tensor) -> Tensor:
    """L with L Lᵀ = Σ, [H, d, d]: it does for the square root, since only distances count and ‖x L‖² = x Σ xᵀ."""
    scale = covariances.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(covariances.dtype).tiny * 1e8)
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    factor, failed = torch.linalg.cholesky_ex(covariances + (scale * 1e-5)[:, None, None] * eye)
    plain: Tensor = torch.where((failed != 0)[:, None, None], scale.sqrt()[:, None, None] * eye, factor)
    return plain


def features(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What tokens are compared by: (q − q̄) Σ_k^½ [H, n, d], and (k − k̄) Σ_q^½ beside the values [H, m, d + e].

    Distances of queries are those of their logits, and so are those of keys. The values are centred and scaled to
    ``VALUE_WEIGHT`` times the power of the features of keys. Keys that are not valid [H, m] have features 0.
    """
    q_mean, q_covariance = covariance_of(q)
    k_mean, k_covariance = covariance_of(k, valid)
    v_mean = mean_of(v, valid)
    of_q, of_k, of_v = (q - q_mean) @ root(k_covariance), (k - k_mean) @ root(q_covariance), v - v_mean
    if valid is not None:
        of_k, of_v = (x.masked_fill(~valid[..., None], 0) for x in (of_k, of_v))
    power_k, power_v = (x.square().sum((1, 2), keepdim=True) for x in (of_k, of_v))
    some = power_v > torch.finfo(v.dtype).tiny
    weight = VALUE_WEIGHT * torch.where(some, power_k / torch.where(some, power_v, 1), 0).sqrt()
    return leading(of_q), leading(torch.cat([of_k, weight * of_v], -1))


def leading(x: Tensor) -> Tensor:
    """Features [H, n, f] in their ``LEADING`` leading directions, in which most of their power lies."""
    if x.shape[-1] <= LEADING:
        return x
    power = x.mT @ x
    directions = torch.linalg.eigh(power)[1][..., -LEADING:]
    made: Tensor = x @ directions
    return made


def tree(x: Tensor, shape: Shape, valid: Tensor | None = None) -> Tiles:
    """Tiles of equal width of tokens with features x [H, n, f].

    Tokens that are not valid [H, n] are in no tile: places that are left are empty, and last.
    """
    h, n, f = x.shape
    places = shape.places
    full = places == n and valid is None
    order = torch.arange(places, device=x.device).clamp_max(n - 1).expand(h, places)
    present = None
    if not full:
        present = torch.zeros(h, places, dtype=torch.bool, device=x.device)
        present[:, :n] = True if valid is None else valid
        x = torch.cat([x, x.new_zeros(h, places - n, f)], 1) if places > n else x
    y, sets, size = x.reshape(h, places, f), h, places
    flat = order.reshape(sets, size)
    seen = None if present is None else present.reshape(sets, size)
    while size > shape.width:
        y = y.reshape(sets, size, f)
        permutation = _halves(_along(y, seen))
        flat = flat.gather(1, permutation).view(2 * sets, size // 2)
        if seen is not None:
            seen = seen.gather(1, permutation).view(2 * sets, size // 2)
        if size // 2 > shape.width:
            base = torch.arange(sets, device=x.device)[:, None] * size
            y = y.reshape(-1, f).index_select(0, (permutation + base).flatten())
        sets, size = 2 * sets, size // 2
    index = flat.reshape(h, shape.tiles, shape.width)
    if seen is None:
        return Tiles(index, torch.ones_like(index, dtype=torch.bool), True)
    held = seen.reshape(h, shape.tiles, shape.width)
    some = torch.zeros_like(index[:, 0, 0]) if valid is None else valid.to(torch.uint8).argmax(1)
    return Tiles(torch.where(held, index, some[:, None, None]), held, False)


def _halves(x: Tensor) -> Tensor:
    """Positions of the lower and then of the upper half of each row [sets, size], in no order inside a half."""
    sets, size = x.shape
    upper = x.topk(size // 2, dim=1, sorted=False)[1]
    lower = torch.ones_like(x, dtype=torch.bool).scatter_(1, upper, False).nonzero()[:, 1].view(sets, -1)
    return torch.cat([lower, upper], 1)


def _along(y: Tensor, seen: Tensor | None) -> Tensor:
    """Positions of the tokens of each set [sets, size, f] along its leading direction; +inf where no token is."""
    step = max(1, y.shape[1] // SAMPLE)
    few = y[:, ::step]
    if seen is None:
        few = few - few.mean(1, keepdim=True)
    else:
        w = seen[:, ::step, None].to(y.dtype)
        few = (few - (few * w).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp_min(1)) * w
    farthest = few.square().sum(2).argmax(1)
    axis = few[torch.arange(len(few), device=y.device), farthest][:, None]
    for _ in range(POWER_STEPS):
        axis = torch.nn.functional.normalize((axis @ few.mT) @ few, dim=2)
    along = (y @ axis.mT)[..., 0]
    return along if seen is None else along.masked_fill(~seen, torch.inf)
