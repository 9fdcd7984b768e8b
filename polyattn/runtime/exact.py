"""Exact attention: torch's fused kernel where it takes the tensors, else blocks of rows through the algebra.

The second way serves single rows too (audits, rows whose low-rank denominator is not positive). Its gradients are the
traced autograd graph of the exact form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from polyattn.codegen import targets
from polyattn.codegen.target import Fused
from polyattn.passes.derive.kernels import exact_nodes
from polyattn.rewriter.masks.mask import Mask
from polyattn.runtime.rectangle import Rectangle

Grouped = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [batch · kv_heads, groups, n_q, d], keys [batch · kv_heads, n_k, d], values [batch · kv_heads, n_k, e]."""
PAIRS = 1 << 22
"""Pairs of a query and a key at once."""


class Softmax(Protocol):
    """What exact attention depends on beside its tensors; a :class:`polyattn.site_plan.SitePlan` is one."""

    @property
    def scale(self) -> float:
        """Factor of the logits."""

    @property
    def mask(self) -> Mask:
        """Which keys a query sees."""


class ExactSoftmax(NamedTuple):
    """The same as a value of its own, for calls that have no plan."""

    scale: float
    mask: Mask


def _blocks(rows: torch.Tensor, n_k: int) -> Iterator[slice]:
    step = max(1, PAIRS // n_k)
    return (slice(at, at + step) for at in range(0, len(rows), step))


def _seen(rows: torch.Tensor, n_k: int, softmax: Softmax, keep: torch.Tensor | None) -> torch.Tensor | None:
    """Which keys queries at positions ``rows`` [s] see, bool [s, n_k]; None: every one."""
    seen = softmax.mask.seen(rows, n_k)
    if keep is None:
        return seen
    return keep.expand(len(rows), -1) if seen is None else seen & keep


def weights(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, softmax: Softmax, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax rows [s, n_k] of queries [s, d] at positions ``rows`` [s].

    Args:
        keep: which keys take part, bool [n_k]; None: all. A row that sees no key has weights 0.
    """
    score = q @ k.mT * softmax.scale
    seen = _seen(rows, len(k), softmax, keep)
    if seen is not None:
        score = score.masked_fill(~seen, float("-inf"))
    made = torch.softmax(score, -1)
    return made if keep is None or seen is None else made.masked_fill(~seen.any(-1, keepdim=True), 0)


def rows_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    softmax: Softmax,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact outputs of some rows of one head: q [s, d] at positions ``rows`` [s], k [n_k, d], v [n_k, e] → [s, e]."""
    out = [weights(q[part], k, rows[part], softmax, keep) @ v for part in _blocks(rows, len(k))]
    return torch.cat(out) if out else v.new_zeros(0, v.shape[-1])


def write_rows(
    out: torch.Tensor, some: torch.Tensor, tensors: Grouped, softmax: Softmax, keep: torch.Tensor | None = None
) -> int:
    """Write rows of a grouped output [heads, groups, n_q, e] exactly; how many there were.

    Args:
        some: which rows, bool [heads, groups, n_q].
        keep: which keys take part, bool [heads, n_k]; None: all.
    """
    q, k, v = tensors
    for h, g in some.any(-1).nonzero().tolist():
        rows = some[h, g].nonzero().squeeze(1)
        mine = None if keep is None else keep[h]
        out[h, g, rows] = rows_forward(q[h, g, rows], k[h], v[h], rows, softmax, mine)
    return int(some.sum())


def add_row_gradients(
    total: dict[str, torch.Tensor],
    some: torch.Tensor,
    tensors: Grouped,
    g: torch.Tensor,
    softmax: Softmax,
    keep: torch.Tensor | None = None,
) -> None:
    """The exact gradients of some rows, as far as ``total`` holds gradients: dQ is written, dK and dV are added to.

    Args:
        some: which rows, bool [heads, groups, n_q]; g: the gradient of the output, grouped.
    """
    q, k, v = tensors
    for h, group in some.any(-1).nonzero().tolist():
        rows = some[h, group].nonzero().squeeze(1)
        mine = None if keep is None else keep[h]
        dq, dk, dv = rows_backward(q[h, group, rows], k[h], v[h], g[h, group, rows], rows, softmax, mine)
        if "dQ" in total:
            total["dQ"][h, group, rows] = dq
        if "dK" in total:
            total["dK"][h] += dk
        if "dV" in total:
            total["dV"][h] += dv


def rows_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    rows: torch.Tensor,
    softmax: Softmax,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`rows_forward`: dQ of the rows [s, d], and their share of dK [n_k, d] and dV [n_k, e].

    Args:
        g: gradient of the rows' outputs, [s, e].
    """
    nodes = exact_nodes(softmax.mask)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _blocks(rows, len(k)):
        inputs = {"Q": q[part], "K": k, "V": v, "G": g[part]}
        seen = _seen(rows[part], len(k), softmax, keep)
        if seen is not None:
            lost = ~seen.any(-1, keepdim=True)  # rows that see no key have no gradient
            inputs["M"], inputs["G"] = (seen | lost).to(k.dtype), g[part].masked_fill(lost, 0)
        block = Rectangle(inputs, softmax.scale)
        d = block.value(nodes.denominator)
        block.read(O=block.value(nodes.numerator) / d[:, None], D=d)
        dq[part] = block.value(nodes.gradients["dQ"])
        dk += block.value(nodes.gradients["dK"])
        dv += block.value(nodes.gradients["dV"])
    return dq, dk, dv


# -- memory ----------------------------------------------------------------------------------------------------------


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The tensor [B, H, n, ·] with the memory of [B, n, H, ·], as torch's own attention returns it.

    A model joins the heads of each token next, which then copies nothing.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_tokens_first(like: torch.Tensor, width: int) -> torch.Tensor:
    """Memory for such a tensor [B, H, n, width], with batch, heads and tokens of ``like``."""
    batch, heads, tokens = like.shape[:3]
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


# -- whole tensors ---------------------------------------------------------------------------------------------------


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    """The head dim padded with zeros, and contiguous: torch's fused kernels read past the rows of anything else."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _width(q: torch.Tensor, v: torch.Tensor, kernel: Fused) -> int:
    """Head dims of q and v in one, as the kernel takes them."""
    wide = max(q.shape[-1], v.shape[-1])
    return -(-wide // kernel.multiple) * kernel.multiple


def _spread(x: torch.Tensor, heads: int) -> torch.Tensor:
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def fused_forward(
    kernel: Fused,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax: Softmax,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, H, n, ·] tensors by one of torch's kernels: output and log-sum-exp [B, H, n_q].

    Args:
        added: what is added to the scores, as :class:`polyattn.codegen.Fused` says; only for a ``masked`` kernel.
    """
    wide, heads = _width(q, v, kernel), q.shape[1]
    full = _pad(q, wide), _pad(_spread(k, heads), wide), _pad(_spread(v, heads), wide)
    out, lse = kernel.forward(*full, softmax.scale, softmax.mask.is_causal, *([] if added is None else [added]))
    return out[..., : v.shape[-1]], lse.contiguous()


def fused_backward(
    kernel: Fused,
    g: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax: Softmax,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`fused_forward` by q, k and v; ``out`` and ``lse`` are what it returned."""
    q, k, v = tensors
    heads, d, e = q.shape[1], q.shape[-1], v.shape[-1]
    groups = heads // k.shape[1]
    wide = _width(q, v, kernel)
    full = [_pad(x, wide) for x in (g, q, _spread(k, heads), _spread(v, heads), out)]
    dq, dk, dv = kernel.backward(*full, lse, softmax.scale, softmax.mask.is_causal, *([] if added is None else [added]))
    dq, dk, dv = dq[..., :d], dk[..., :d], dv[..., :e]
    if groups > 1:
        dk, dv = (x.reshape(x.shape[0], k.shape[1], groups, *x.shape[2:]).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _added(keep: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What torch's kernels add to hide the keys of [B, n_k] that take no part: [B, 1, 1, n_k].

    Rows that see no key are 0 there, and their log-sum-exp is finite, so that they have no gradient.
    """
    made = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, -torch.inf)
    return made[:, None, None]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of [B, H, n, ·] tensors: output and log-sum-exp [B, H, n_q] (zeros without torch's kernels).

    Args:
        keep: which keys take part, bool [B, n_k]; None: all. A row that sees no key is 0.
    """
    heads, e = q.shape[1], v.shape[-1]
    kernel = targets.fused_kernel(q)
    if kernel is not None and keep is None:
        return fused_forward(kernel, q, k, v, softmax)
    if kernel is not None and kernel.masked and keep is not None:
        return fused_forward(kernel, q, k, v, softmax, _added(keep, q))
    groups = heads // k.shape[1]
    rows = torch.arange(q.shape[2], device=q.device)
    result = q.new_empty(*q.shape[:-1], e)
    for b in range(q.shape[0]):
        for h in range(heads):
            mine = None if keep is None else keep[b]
            result[b, h] = rows_forward(q[b, h], k[b, h // groups], v[b, h // groups], rows, softmax, mine)
    return result, q.new_zeros(q.shape[:-1])


def backward(
    g: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax: Softmax,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`forward` by q, k and v."""
    q, k, v = tensors
    kernel = targets.fused_kernel(q)
    if kernel is not None and keep is None:
        return fused_backward(kernel, g, tensors, out, lse, softmax)
    if kernel is not None and kernel.masked and keep is not None:
        return fused_backward(kernel, g, tensors, out, lse, softmax, _added(keep, q))
    groups = q.shape[1] // k.shape[1]
    rows = torch.arange(q.shape[2], device=q.device)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            c = h // groups
            mine = None if keep is None else keep[b]
            made = rows_backward(q[b, h], k[b, c], v[b, c], g[b, h], rows, softmax, mine)
            dq[b, h] = made[0]
            dk[b, c] += made[1]
            dv[b, c] += made[2]
    return dq, dk, dv
