"""Which keys the queries of a call see, where compiling could not tell: one pass over the bytes of its masks.

Scores that a mask hides, and nothing else that masks do, leave a low-rank form possible: a causal mask, keys that take
no part (key padding, per batch element), both, or nothing at all. Rows in which everything is hidden are told apart:
they are computed as the model wrote them.

Pairs that are seen lie in R × K, with the rows R and the keys K that see or are seen at all, so that their number tells
whether they are all of R × K, or all of it up to the diagonal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from polyattn.passes.match.bias import FILL
from polyattn.rewriter.masks.mask import CAUSAL, NONE, Mask
from polyattn.runtime.written import ScoreMask

PAIRS = 1 << 18
"""Pairs of a query and a key that are looked at at once, in all batch elements."""


class Seen(NamedTuple):
    """What a call's masks show."""

    mask: Mask
    """Causal or none."""
    keep: torch.Tensor | None = None
    """Which keys take part, bool [B, n_k]; None: all."""
    lost: torch.Tensor | None = None
    """Which queries see no key, bool [B, n_q]; None: none."""


def look(given: ScoreMask, mask: Mask, q: torch.Tensor, k: torch.Tensor) -> Seen | None:
    """What queries [B, H, n_q, d] see of keys [B, kv_heads, n_k, d]; None where it is none of the above.

    Args:
        mask: what is known without looking; steps that are causal say it as well.
    """
    batch, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
    if any(step.causal for step, _ in given.steps):
        mask = CAUSAL
    if given.one_row:
        seen = _shown(given, slice(0, 1), n_k)
        return None if seen is None else _same_for_all(seen[:, 0], mask, batch, n_q)
    return _counted(given, mask, batch, n_q, n_k)


def _shown(given: ScoreMask, rows: slice, n_k: int) -> torch.Tensor | None:
    """Which pairs of some queries are shown, bool [B|1, rows|1, n_k]; None: heads differ, or scores are changed."""
    hidden: torch.Tensor | None = None
    for step, tensor in given.steps:
        if tensor is None:
            continue
        some = tensor[:, :, rows] if tensor.shape[2] > 1 else tensor
        if step.kind == "replace":
            gone = ~some
        else:
            gone = some <= torch.tensor(FILL, dtype=some.dtype)  # in half precision -1e4 is a little more
            if int(torch.count_nonzero(some)) != int(gone.sum(dtype=torch.int32)):  # NaN is neither 0 nor little
                return None
        if gone.shape[1] > 1:
            if not bool((gone[:, 1:] == gone[:, :1]).all()):
                return None
            gone = gone[:, :1]
        hidden = gone if hidden is None else hidden | gone
    if hidden is None:
        return torch.ones(1, 1, n_k, dtype=torch.bool)
    return (~hidden[:, 0]).expand(-1, -1, n_k)


def _same_for_all(keep: torch.Tensor, mask: Mask, batch: int, n_q: int) -> Seen:
    """The keys [B|1, n_k] that all queries see, those that a causal mask hides apart."""
    if bool(keep.all()):
        return Seen(mask)
    keep = keep.expand(batch, -1)
    lost = mask.sums_of(keep.to(torch.int64), n_q).expand(-1, n_q) == 0
    return Seen(mask, keep, lost if bool(lost.any()) else None)


def _counted(given: ScoreMask, mask: Mask, batch: int, n_q: int, n_k: int) -> Seen | None:
    step = max(1, PAIRS // (batch * n_k))
    used: torch.Tensor | None = None
    counts, above = [], False
    for at in range(0, n_q, step):
        rows = slice(at, min(at + step, n_q))
        shown = _shown(given, rows, n_k)
        if shown is None:
            return None
        flags = shown.view(torch.uint8).expand(-1, rows.stop - at, -1)  # reductions of bool are slow
        if mask is CAUSAL:
            flags = flags.tril(at)
        elif not above:
            after, own = flags[..., rows.stop :], flags[..., at : rows.stop].triu(1)
            above = any(bool(some.amax()) for some in (after, own) if some.numel())
        mine = flags.amax(1) != 0
        used = mine if used is None else used | mine
        counts.append(flags.sum(-1, dtype=torch.int32))
        if above and _ragged(counts[-1]):
            return None
    assert used is not None
    total = torch.cat(counts, 1).to(torch.int64)
    seeing = total > 0
    kind = _kind(total, seeing, used, above, mask)
    if kind is None:
        return None
    if kind is CAUSAL:
        used = used | (torch.arange(n_k, device=used.device) >= n_q)  # these no query sees anyway
    lost = ~seeing
    return Seen(
        kind,
        None if bool(used.all()) else used.expand(batch, -1),
        lost.expand(batch, -1) if bool(lost.any()) else None,
    )


def _ragged(counts: torch.Tensor) -> bool:
    """Whether rows that see keys after them see different numbers of keys; rows that see none do not count."""
    most = counts.amax(1, keepdim=True)
    return bool(((counts != most) & (counts != 0)).any())


def _kind(total: torch.Tensor, seeing: torch.Tensor, used: torch.Tensor, above: bool, mask: Mask) -> Mask | None:
    """The mask of which the rows and keys that are seen make all pairs; None for others.

    Args:
        total: how many keys each row sees, [B, n_q].
        seeing, used: rows and keys that see or are seen, bool [B, n_q] and [B, n_k].
        above: some pair of a key after its query is seen.
    """
    whole = used.sum(-1, keepdim=True)
    before = CAUSAL.sums_of(used.to(torch.int64), total.shape[1])
    if mask is not CAUSAL and bool((total == seeing * whole).all()):
        return NONE
    if (mask is CAUSAL or not above) and bool((total == seeing * before).all()):
        return CAUSAL
    return None
