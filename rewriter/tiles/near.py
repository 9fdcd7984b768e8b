"""Which pairs of tiles are near: a score for every pair, from moments that the expansion has anyway (math.md §8).

It stays outside of the algebra because it is a decision: a constant of the differentiation, and no derivative, cost or
kernel follows from it but through the mask that it makes.

With share_IJ the part of J in what the mean query of I sees, c̃ = c_IJ − Σ_J share c_IJ, ō_I the output of the mean
query, Σ_I the covariance of the tile's queries, C_J and var_J of keys and values of a tile of keys, a pair is near
where

    min(1, share exp(½ s² c̃ᵀ Σ_I c̃)) · min(25, s² tr Σ_I C_J)^½ · (‖v_IJ − ō_I‖² + var_J)^½ / unit  >  τ

what the share can become for queries away from the mean, how far logits vary inside the pair, and how far its values
are from the output, in units of the values' spread or, where that is less, of ``RATIO`` times the spread of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LARGEST_TRACE = 25.0
"""Where the variance of logits inside a pair is cut off in its score."""
CACHED = 1 << 18
"""Elements of the largest values at once: they are to stay in the cache."""
MADE = ("M_near", "M_far", "TOP", "SHIFT")
RATIO = 5.0
"""The relative tolerance over the additive one: heads whose output hardly varies keep the relative one too."""


@dataclass(frozen=True)
class Others:
    """What the queries of tiles attend to beside the keys of a layout, as far as that is known."""

    lse: Tensor
    """[H, A]: logarithms of sums of exponentials over all keys; −inf where none is known."""
    out: Tensor
    """[H, A, e]: outputs over all keys."""

    def beside(self, head: int, tiles: slice, top: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The same for some tiles with what the keys of a layout have: logarithms [I] and outputs [I, 1, e]."""
        total = torch.logaddexp(top, self.lse[head, tiles])
        share = (top - total).exp()[:, None, None]
        return total, share * out + (1 - share) * self.out[head, tiles, None]


@dataclass(frozen=True)
class Moments:
    """What the scores of a head's pairs read of its tiles of keys."""

    of_keys: Tensor
    """Their covariances, [d (d + 1) / 2, B], upper halves."""
    variance: Tensor
    """The variance of their values, [B]."""
    some: Tensor
    """[B], bool: which hold a key."""
    unit: Tensor
    """The unit of distances of values."""


@dataclass
class NearPairs:
    """The choice of near pairs of a call, head by head and block by block.

    Args:
        q, k, v: operands in tiles, [H, A, T_q, d], [H, B, T_k, d] and [H, B, T_k, e].
        share_q: what a query counts in the mean of its tile, [H, A, T_q].
        share_k: the same of keys, [H, B, T_k].
        scale: factor of the logits.
        tau: the threshold of each head, [H]; inf: no pair is near, 0: every pair is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    share_q: Tensor
    share_k: Tensor
    scale: float
    tau: Tensor
    shift: Tensor | None = None
    """Logarithms of the sums of rows [H, A, T_q] where they are known, as in a backward."""
    near: Tensor | None = None
    """[H, A, B]: what was chosen, where it is to be kept."""
    shifts: Tensor | None = None
    """[H, A, T_q]: the rows' shifts, where they are to be kept."""
    scores: Tensor | None = None
    """[H, A, B]: the scores of all pairs, where they are to be kept; inf where one is no number."""
    means: Tensor | None = None
    """[H, tiles, d]: means of all tiles, where ``q`` holds rows of some of them."""
    sigma: Tensor | None = None
    """[H, A, d, d]: covariances of the logits of their queries, likewise."""
    others: Others | None = None
    """What queries attend to beside these keys; None: nothing."""
    whole: Tensor | None = None
    """[H, A], bool: tiles of queries all of whose pairs are near; None: there are none."""
    moments: dict[int, Moments] = field(default_factory=dict)
    """What is known of the tiles of keys of some heads; others are added."""

    def __call__(self, head: int, tiles: slice, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :data:`polyattn.codegen.phases.Choose`."""
        mass = values["DP"]
        step = max(1, CACHED // max(1, values["CK"][0].numel()))
        parts = []
        for at in range(0, len(mass), step):
            some = slice(at, min(at + step, len(mass)))
            of_part = {"MU": values["MU"][some], "KBAR": values["KBAR"], "DP": mass[some]}
            of_part |= {"CK": values["CK"][some], "NP": values["NP"][some]}
            parts.append(self._some_tiles(head, slice(tiles.start + some.start, tiles.start + some.stop), of_part))
        made = {name: torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name] for name in MADE}
        if self.shift is not None:
            made["SHIFT"] = self.shift[head, tiles]
        if self.near is not None:
            self.near[head, tiles] = made["M_near"]
        if self.shifts is not None:
            self.shifts[head, tiles] = made["SHIFT"]
        return made

    def _some_tiles(self, head: int, tiles: slice, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = self._of_head(head)
        mu, mean, mass, away, sums = (values[name] for name in ("MU", "KBAR", "DP", "CK", "NP"))
        q, w = self.q[head, tiles], self.share_q[head, tiles]
        delta = q - mu[:, None]
        sigma = self._covariances(delta, w) if self.sigma is None else self.sigma[head, tiles]
        log_mass = mass.log() + self.scale * (mu @ mean.mT)
        top = log_mass.logsumexp(1)
        share = (log_mass - top[:, None]).exp()[:, None]  # [I, 1, J]
        sums = sums[..., : self.v.shape[-1]]
        mean_key, out = share @ away + share @ mean, (share / mass[:, None]) @ sums  # [I, 1, d], [I, 1, e]
        total = top
        if self.others is not None:
            total, out = self.others.beside(head, tiles, top, out)
        log_share = log_mass - total[:, None]
        key = (away + mean).sub_(mean_key)
        variance = (key @ sigma).mul_(key).sum(2)
        lifted = variance.mul_(0.5).add_(log_share).clamp_(max=0).exp_()
        distance = torch.linalg.vector_norm(torch.addcmul(sums, mass[..., None], out, value=-1), dim=2) / mass
        size = distance.square_().add_(known.variance).sqrt_().div_(known.unit)
        trace = (halves(sigma, 2) @ known.of_keys).clamp_(min=0, max=LARGEST_TRACE)
        score = lifted.mul_(trace.sqrt_()).mul_(size)
        # what is not finite is near, so that exact arithmetic says what it is
        near = ~(score <= self.tau[head]) & (w > 0).any(1)[:, None]
        if self.whole is not None:
            near |= self.whole[head, tiles, None]
        near &= known.some
        if self.scores is not None:
            self.scores[head, tiles] = torch.where(score.isnan(), torch.inf, score)
        shift = top[:, None] + self.scale * (delta @ mean_key.mT)[..., 0] if self.shift is None else top
        return {"M_near": near, "M_far": ~near, "TOP": top, "SHIFT": shift}

    def _covariances(self, delta: Tensor, w: Tensor) -> Tensor:
        """Covariances of the logits of tiles of queries, [I, d, d]."""
        return self.scale**2 * ((delta * w[..., None]).mT @ delta)

    def _of_head(self, head: int) -> Moments:
        """What does not depend on the tile of queries."""
        if head in self.moments:
            return self.moments[head]
        k, v, w = self.k[head], self.v[head], self.share_k[head][..., None]
        mean_k, mean_v = (w * k).sum(1, keepdim=True), (w * v).sum(1, keepdim=True)
        k0, v0 = k - mean_k, v - mean_v
        of_keys = halves((k0 * w).mT @ k0, 1).mT.contiguous()
        some = w[..., 0] > 0
        size = some.sum(1).to(k.dtype)
        centre = (size[:, None] * mean_v[:, 0]).sum(0) / size.sum().clamp_min(1)
        radius = ((v - centre).square().sum(2) * some).amax().sqrt()
        spread = self._spread_of_outputs(head, mean_k[:, 0], mean_v[:, 0], of_keys, size)
        unit = torch.minimum(radius, RATIO * spread).clamp_min(torch.finfo(k.dtype).tiny)
        self.moments[head] = Moments(of_keys, (w * v0.square()).sum((1, 2)), some.any(1), unit)
        return self.moments[head]

    def _spread_of_outputs(self, head: int, k: Tensor, v: Tensor, of_keys: Tensor, size: Tensor) -> Tensor:
        """RMS ‖ō_I − ō‖, of outputs over whole tiles of keys with their logits' variance to the second order."""
        mu = (self.share_q[head][..., None] * self.q[head]).sum(1) if self.means is None else self.means[head]
        square = halves(mu[:, :, None] * mu[:, None], 2) @ of_keys
        logits = self.scale * (mu @ k.mT) + (self.scale**2 / 2 * square).clamp(max=LARGEST_TRACE) + size.log()
        out = logits.softmax(1) @ v
        return (out - out.mean(0)).square().sum(1).mean().sqrt()


def halves(symmetric: Tensor, times: int) -> Tensor:
    """The upper halves of symmetric matrices [·, d, d], [·, d (d + 1) / 2], off the diagonal so many times."""
    d = symmetric.shape[-1]
    row, column = torch.triu_indices(d, d, device=symmetric.device)
    return symmetric[:, row, column] * torch.where(row == column, 1, times).to(symmetric.dtype)
