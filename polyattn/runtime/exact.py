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


def weights(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Softmax rows [s, n_k] of queries [s, d] at positions ``rows`` [s]."""
    score = q @ k.mT * softmax.scale
    seen = softmax.mask.seen(rows, len(k))
    if seen is not None:
        score = score.masked_fill(~seen, float("-inf"))
    return torch.softmax(score, -1)


def rows_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """Exact outputs of some rows of one head: q [s, d] at positions ``rows`` [s], k [n_k, d], v [n_k, e] → [s, e]."""
    out = [weights(q[part], k, rows[part], softmax) @ v for part in _blocks(rows, len(k))]
    return torch.cat(out) if out else v.new_zeros(0, v.shape[-1])


def rows_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    rows: torch.Tensor,
    softmax: Softmax,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`rows_forward`: dQ of the rows [s, d], and their share of dK [n_k, d] and dV [n_k, e].

    Args:
        g: gradient of the rows' outputs, [s, e].
    """
    nodes = exact_nodes(softmax.mask)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _blocks(rows, len(k)):
        inputs = {"Q": q[part], "K": k, "V": v, "G": g[part]}
        seen = softmax.mask.seen(rows[part], len(k))
        if seen is not None:
            inputs["M"] = seen.to(k.dtype)
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


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of [B, H, n, ·] tensors: output and log-sum-exp [B, H, n_q] (zeros without torch's kernels)."""
    heads, e = q.shape[1], v.shape[-1]
    kernel = targets.fused_kernel(q)
    if kernel is not None:
        return fused_forward(kernel, q, k, v, softmax)
    groups = heads // k.shape[1]
    rows = torch.arange(q.shape[2], device=q.device)
    result = q.new_empty(*q.shape[:-1], e)
    for b in range(q.shape[0]):
        for h in range(heads):
            result[b, h] = rows_forward(q[b, h], k[b, h // groups], v[b, h // groups], rows, softmax)
    return result, q.new_zeros(q.shape[:-1])


def backward(
    g: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax: Softmax,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`forward` by q, k and v."""
    q, k, v = tensors
    kernel = targets.fused_kernel(q)
    if kernel is not None:
        return fused_backward(kernel, g, tensors, out, lse, softmax)
    groups = q.shape[1] // k.shape[1]
    rows = torch.arange(q.shape[2], device=q.device)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            c = h // groups
            made = rows_backward(q[b, h], k[b, c], v[b, c], g[b, h], rows, softmax)
            dq[b, h] = made[0]
            dk[b, c] += made[1]
            dv[b, c] += made[2]
    return dq, dk, dv
