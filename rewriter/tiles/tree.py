"""Tiles of similar tokens: what tokens are compared by, and a balanced tree that sorts them (math.md §8).

Every set of tokens is halved at the median along its leading direction until tiles are left, all of one width, so that
nothing is ragged: sums over a tile are sums over an axis. Shapes: H heads, n tokens, f features, A tiles of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Projection:
    """What queries are compared by: (q − q̄) Σ_k^½ in its leading directions."""

    mean: Tensor
    """[H, 1, d]"""
    matrix: Tensor
    """[H, d, f]"""

    def __call__(self, q: Tensor) -> Tensor:
        """[H, n, d] → [H, n, f]"""
        return (q - self.mean) @ self.matrix


def features(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Projection, Tensor]:
    """What tokens are compared by: queries by (q − q̄) Σ_k^½, keys by (k − k̄) Σ_q^½ beside the values, [H, m, f].

    Distances of queries are those of their logits, and so are those of keys. The values are centred and scaled to
    ``VALUE_WEIGHT`` times the power of the features of keys. Keys that are not valid [H, m] have features 0.
    """
    q_mean, q_covariance = covariance_of(q)
    k_mean, k_covariance = covariance_of(k, valid)
    v_mean = mean_of(v, valid)
    of_q, of_k, of_v = root(k_covariance), (k - k_mean) @ root(q_covariance), v - v_mean
    if valid is not None:
        of_k, of_v = (x.masked_fill(~valid[..., None], 0) for x in (of_k, of_v))
    power_k, power_v = (x.square().sum((1, 2), keepdim=True) for x in (of_k, of_v))
    some = power_v > torch.finfo(v.dtype).tiny
    weight = VALUE_WEIGHT * torch.where(some, power_k / torch.where(some, power_v, 1), 0).sqrt()
    both = torch.cat([of_k, weight * of_v], -1)
    return Projection(q_mean, of_q @ leading(of_q.mT @ q_covariance @ of_q)), both @ leading(both.mT @ both)


def leading(power: Tensor) -> Tensor:
    """The ``LEADING`` leading directions of features, in which most of their power [H, f, f] lies: [H, f, ·]."""
    if power.shape[-1] <= LEADING:
        return torch.eye(power.shape[-1], dtype=power.dtype, device=power.device).expand_as(power)
    sound = torch.isfinite(power).all((1, 2))[:, None, None]  # a head with other numbers has no tiles that matter
    made: Tensor = torch.linalg.eigh(power.masked_fill(~sound, 0))[1][..., -LEADING:]
    return made


@dataclass(frozen=True)
class Cut:
    """How the sets of one level of a tree were halved."""

    axis: Tensor
    """[H · sets, f]: the direction of each set."""
    bound: Tensor
    """[H · sets]: tokens at least so far along it are in the upper half."""


def tree(x: Tensor, shape: Shape, valid: Tensor | None = None, cuts: list[Cut] | None = None) -> Tiles:
    """Tiles of equal width of tokens with features x [H, n, f].

    Tokens that are not valid [H, n] are in no tile: places that are left are empty, and last.

    Args:
        cuts: what each level's sets were halved by is appended to it.
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
        axis = _axis(y, seen)
        along = (y @ axis[..., None])[..., 0]
        along = along if seen is None else along.masked_fill(~seen, torch.inf)
        permutation, bound = _halves(along)
        if cuts is not None:
            cuts.append(Cut(axis, bound))
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


def descend(x: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """The tile of a tree in which other tokens with features x [H, n, f] would be, [H, n]: each goes its own way."""
    h, n, f = x.shape
    flat, at = x.reshape(h * n, f), torch.arange(h, device=x.device).repeat_interleave(n)
    first = at
    for cut in cuts:
        upper = (flat * cut.axis.index_select(0, at)).sum(1) >= cut.bound.index_select(0, at)
        at = 2 * at + upper
    tiles = 1 << len(cuts)
    return (at - first * tiles).view(h, n)


@dataclass(frozen=True)
class Seats:
    """Tokens that were told their tile, in order; those of none, or that find theirs full, are in further tiles."""

    tiles: Tiles
    further: Tensor
    """[H, A], bool: which tiles are such, or of no token."""


def seat(tile: Tensor, count: int, width: int, spare: int = 0) -> Seats:
    """Put tokens into the tiles [H, n] that they were told, first come, first served.

    A token's place depends on none that comes after it but for the order among further tiles.

    Args:
        tile: ``count`` for a token of no tile.
        count: the number of tiles; width: places of each, of which the last ``spare`` stay empty.
    """
    h, n = tile.shape
    room = width - spare
    order = tile.argsort(dim=1, stable=True)
    ranked = tile.gather(1, order)
    sizes = torch.zeros(h, count + 1, dtype=tile.dtype, device=tile.device)
    sizes.scatter_add_(1, tile, torch.ones_like(tile))
    rank = torch.arange(n, device=tile.device) - (sizes.cumsum(1) - sizes).gather(1, ranked)
    late = (rank >= room) | (ranked == count)
    number = late.cumsum(1) - 1
    extra = -(-int(late.sum(1).max()) // room) if n else 0
    place = torch.where(late, (count + number // room) * width + number % room, ranked * width + rank)
    places = (count + extra) * width
    index = torch.zeros(h, places, dtype=order.dtype, device=tile.device).scatter_(1, place, order)
    held = torch.zeros(h, places, dtype=torch.bool, device=tile.device).scatter_(1, place, True)
    tiles = Tiles(index.view(h, -1, width), held.view(h, -1, width), False)
    further = ~tiles.valid.any(2)
    further[:, count:] = True
    return Seats(tiles, further)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the lower and then of the upper half of each row [sets, size], in no order inside a half, and the
    least number of the upper half."""
    sets, size = x.shape
    most, upper = x.topk(size // 2, dim=1, sorted=False)
    lower = torch.ones_like(x, dtype=torch.bool).scatter_(1, upper, False).nonzero()[:, 1].view(sets, -1)
    return torch.cat([lower, upper], 1), most.amin(1)


def _axis(y: Tensor, seen: Tensor | None) -> Tensor:
    """The leading direction of the tokens of each set [sets, size, f], [sets, f]."""
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
    return axis[:, 0]
