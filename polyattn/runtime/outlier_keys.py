"""Outlier keys: a few keys computed exactly and merged with a low-rank form of the others, in one softmax (math.md §3).

The low-rank kernels get them with the factor zero. What they add to numerators and denominators, and their part of the
gradients, is exact attention over a few columns (rectangle.py): linear in the number of queries. Backwards read outputs
and denominators of whole rows, so that neither part needs anything else of the other.

Tensors are grouped by key head: queries [heads, groups, n_q, d], keys [heads, n_k, d].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polyattn.passes.derive.kernels import exact_nodes
from polyattn.runtime.centring import Centred
from polyattn.runtime.exact import PAIRS
from polyattn.runtime.rectangle import Rectangle
from polyattn.site_plan import SitePlan

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _blocks(q: torch.Tensor, columns: int) -> Iterator[slice]:
    """Blocks of queries, so that those of all heads have no more pairs with the columns than are taken at once."""
    step = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * columns))
    return (slice(at, at + step) for at in range(0, q.shape[2], step))


def _columns(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _rectangle(tensors: Tensors, centred: Centred, part: slice, plan: SitePlan, keep: torch.Tensor | None) -> Rectangle:
    """Some queries against the outlier keys, groups one after the other; exp in the units of the low-rank part."""
    q, k, v = tensors
    assert centred.outliers is not None
    some = q[:, :, part]
    inputs = {
        "Q": some.flatten(1, 2),
        "K": _columns(k - centred.c[:, None], centred.outliers),
        "V": _columns(v, centred.outliers),
    }
    rows = torch.arange(q.shape[2], device=q.device)[part].repeat(q.shape[1])
    if plan.mask.hides:
        inputs["M"] = plan.mask.visible(rows, centred.outliers).to(q.dtype)
    if keep is not None:
        some_keep = keep.gather(1, centred.outliers)[:, None].to(q.dtype)
        inputs["M"] = inputs["M"] * some_keep if "M" in inputs else some_keep.expand(-1, len(rows), -1)
    return Rectangle(inputs, plan.scale, centred.top[:, None, None])


def forward(
    tensors: Tensors,
    centred: Centred,
    out: torch.Tensor,
    denominators: torch.Tensor,
    plan: SitePlan,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [heads, groups, n_q, e] and denominators [heads, groups, n_q] of all keys, from those of the others.

    Args:
        tensors: queries, keys and values, not centred.
        keep: which keys take part, bool [heads, n_k]; None: all.
    """
    q, nodes = tensors[0], exact_nodes(plan.mask)
    assert centred.outliers is not None
    merged, total = torch.empty_like(out), torch.empty_like(denominators)
    for part in _blocks(q, centred.outliers.shape[1]):
        few = _rectangle(tensors, centred, part, plan, keep)
        rest, low = denominators[:, :, part], out[:, :, part]
        # Where no other key is seen, the denominator of the others is 0 and their output undefined.
        numerator = (low * rest[..., None]).masked_fill((rest == 0)[..., None], 0)
        d = rest + few.value(nodes.denominator).view_as(rest)
        merged[:, :, part] = (numerator + few.value(nodes.numerator).view_as(low)) / d[..., None]
        total[:, :, part] = d
    return merged, total


def backward(
    tensors: Tensors,
    centred: Centred,
    g: torch.Tensor,
    out: torch.Tensor,
    denominators: torch.Tensor,
    plan: SitePlan,
    gradients: dict[str, torch.Tensor],
    keep: torch.Tensor | None = None,
) -> None:
    """Add what the outlier keys contribute to gradients that the others have made: dQ, dK and dV, as far as given."""
    q, nodes = tensors[0], exact_nodes(plan.mask)
    assert centred.outliers is not None
    for part in _blocks(q, centred.outliers.shape[1]):
        few = _rectangle(tensors, centred, part, plan, keep)
        few.read(**{name: x[:, :, part].flatten(1, 2) for name, x in {"G": g, "O": out, "D": denominators}.items()})
        for name, total in gradients.items():
            made = few.value(nodes.gradients[name])
            if name == "dQ":
                total[:, :, part] += made.view_as(total[:, :, part])
            else:
                total.scatter_add_(1, centred.outliers[..., None].expand_as(made), made)
