"""Causal attention inside of segments of a sequence, exactly, by torch's kernel with segments as batch elements.

Tensors are grouped by key head: queries [H, groups, n, d], keys [H, n, d], values [H, n, e].
"""

from __future__ import annotations

import torch

from polyattn.rewriter.masks.mask import CAUSAL
from polyattn.runtime import exact, tiled_block
from polyattn.runtime.exact import ExactSoftmax, Grouped


def _cut(x: torch.Tensor, length: int, axis: int, fill: float = 0.0) -> torch.Tensor:
    """An axis of tokens cut into segments as batch elements: [H, ..., n, ...] → [H · segments, ..., length, ...]."""
    missing = -x.shape[axis] % length
    if missing:
        after = [0] * (2 * (x.ndim - 1 - axis))
        x = torch.nn.functional.pad(x, (*after, 0, missing), value=fill)
    cut = x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
    return cut.movedim(axis, 1).flatten(0, 1)


def _joined(x: torch.Tensor, heads: int, axis: int, tokens: int) -> torch.Tensor:
    """The inverse of :func:`_cut`."""
    joined = x.reshape(heads, -1, *x.shape[1:]).movedim(1, axis).flatten(axis, axis + 1)
    return joined.narrow(axis, 0, tokens)


def _cut_all(tensors: Grouped, length: int, keep: torch.Tensor | None) -> tuple[Grouped, torch.Tensor | None]:
    q, k, v = tensors
    kept = None if keep is None else _cut(keep, length, 1, False)
    return (_cut(q, length, 2), _cut(k, length, 1), _cut(v, length, 1)), kept


def forward(
    tensors: Grouped, scale: float, length: int, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [H, groups, n, e] and logarithms of the rows' sums [H, groups, n], −inf where a row sees no key.

    Args:
        length: tokens of a segment.
        keep: which keys take part, bool [H, n]; None: all.
    """
    heads, n = len(tensors[0]), tensors[0].shape[2]
    (q, k, v), kept = _cut_all(tensors, length, keep)
    out, lse = exact.forward(q, k[:, None], v[:, None], ExactSoftmax(scale, CAUSAL), kept)
    if kept is not None:
        none = (kept.cumsum(1) == 0)[:, None]
        out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, -torch.inf)
    return _joined(out, heads, 2, n), _joined(lse, heads, 2, n)


def gradients(
    g: torch.Tensor,
    tensors: Grouped,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    length: int,
    keep: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What pairs inside of segments add to gradients, by name.

    Args:
        g: gradient of the output, grouped; out: the output, over other keys too.
        lse: logarithms of the rows' sums, over other keys too; where they are infinite a row has no gradient.
    """
    heads, n = len(g), g.shape[2]
    some, kept = _cut_all(tensors, length, keep)
    rows = _cut(g, length, 2), _cut(out, length, 2), _cut(lse, length, 2, torch.inf)
    made = tiled_block.exact_gradients(rows[0], some, rows[1], rows[2], ExactSoftmax(scale, CAUSAL), kept)
    return {name: _joined(x, heads, 2 if name == "dQ" else 1, n) for name, x in made.items()}
