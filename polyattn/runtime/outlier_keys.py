"""A few keys computed exactly and merged with a low-rank form of the others, in one softmax (math.md §3).

The low-rank kernels get them with weight zero. What they add to numerators and denominators, and their part of the
gradients, is exact attention over a few columns (rectangle.py): linear in the number of queries. Backwards read
outputs and denominators of whole rows, so that neither part needs anything else of the other.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polyattn.passes.derive.kernels import ExactNodes
from polyattn.runtime.centring import Moved
from polyattn.runtime.exact import PAIRS
from polyattn.runtime.rectangle import Rectangle


def _blocks(q: torch.Tensor, columns: int) -> Iterator[slice]:
    """Blocks of queries, so that those of all heads have no more pairs with the columns than are taken at once."""
    step = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * columns))
    return (slice(at, at + step) for at in range(0, q.shape[2], step))


def _columns(x: torch.Tensor, heavy: torch.Tensor) -> torch.Tensor:
    return x.gather(1, heavy[..., None].expand(-1, -1, x.shape[-1]))


def _rectangle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, moved: Moved, part: slice, scale: float, causal: bool
) -> Rectangle:
    """Some queries against the heavy keys, groups one after the other; exp in the units of the low-rank part."""
    assert moved.heavy is not None
    some = q[:, :, part]
    inputs = {
        "Q": some.flatten(1, 2),
        "K": _columns(k - moved.c[:, None], moved.heavy),
        "V": _columns(v, moved.heavy),
    }
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[part].repeat(q.shape[1])
        inputs["M"] = (moved.heavy[:, None] <= rows[:, None]).to(q.dtype)
    return Rectangle(inputs, scale, moved.top[:, None, None])


def forward(
    nodes: ExactNodes,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    moved: Moved,
    out: torch.Tensor,
    denominators: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [heads, groups, n_q, e] and denominators [heads, groups, n_q] of all keys, from those of the others.

    Args:
        tensors: queries, keys and values, not moved.
    """
    q, k, v = tensors
    assert moved.heavy is not None
    merged, total = torch.empty_like(out), torch.empty_like(denominators)
    for part in _blocks(q, moved.heavy.shape[1]):
        few = _rectangle(q, k, v, moved, part, scale, causal)
        rest, low = denominators[:, :, part], out[:, :, part]
        # Where no other key is seen, the denominator of the others is 0 and their output undefined.
        numerator = (low * rest[..., None]).masked_fill((rest == 0)[..., None], 0)
        d = rest + few.value(nodes.denominator).view_as(rest)
        merged[:, :, part] = (numerator + few.value(nodes.numerator).view_as(low)) / d[..., None]
        total[:, :, part] = d
    return merged, total


def backward(
    nodes: ExactNodes,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    moved: Moved,
    g: torch.Tensor,
    out: torch.Tensor,
    denominators: torch.Tensor,
    scale: float,
    causal: bool,
    gradients: dict[str, torch.Tensor],
) -> None:
    """Add what the heavy keys contribute to gradients that the others have made: dQ, dK and dV, as far as given."""
    q, k, v = tensors
    assert moved.heavy is not None
    for part in _blocks(q, moved.heavy.shape[1]):
        few = _rectangle(q, k, v, moved, part, scale, causal)
        few.read(**{name: x[:, :, part].flatten(1, 2) for name, x in {"G": g, "O": out, "D": denominators}.items()})
        for name, total in gradients.items():
            made = few.value(nodes.gradients[name])
            if name == "dQ":
                total[:, :, part] += made.view_as(total[:, :, part])
            else:
                total.scatter_add_(1, moved.heavy[..., None].expand_as(made), made)
