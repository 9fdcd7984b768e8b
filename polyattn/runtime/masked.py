"""Attention with a mask or bias added to its scores, in training: ``polyattn::masked_attention`` and its backward.

Torch's fused kernel recomputes the weights of a row as exp(s + m - lse), where lse = M + log Σ exp(s + m - M) is one
rounded number. Far from 0 it has lost the logarithm: a row that the mask hides with the smallest number of its dtype
gets weights 1 instead of 1/n. So rows are told apart by M, the largest entry of their mask:

    |M| ≤ NEAR          the kernel, as it is
    NEAR < |M| ≤ FAR    the kernel, with m - M in place of m, which is the same softmax (ALiBi, for example)
    beyond, and NaN     as they were written: softmax of the rounded sum s + m, a few rows at a time, with torch's
                        autograd; what hides a row lies here (-1e4, -1e9, the smallest number, -inf)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from polyattn.codegen import targets
from polyattn.codegen.target import Fused
from polyattn.errors import DeviceError, DoubleBackwardError, PolyattnError, ShapeError
from polyattn.rewriter.masks.mask import NONE
from polyattn.runtime import exact, ops
from polyattn.runtime.exact import ExactSoftmax
from polyattn.runtime.execute import accumulator

NEAR = 64.0
"""Up to here a weight that is recomputed from lse is off by no more than 64 units of the last place."""
FAR = 8192.0
"""Up to here a score in float32 keeps three digits beside M; beyond, what eager attention rounds away is rounded
away."""
ROWS = 256
"""How many rows of scores are formed at once, over all heads."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AddedMask(NamedTuple):
    """What happens to the scores: ``added`` is added, then those that are not ``kept`` become ``fill``.

    Both tensors broadcast to the scores [B, H, n_q, n_k]; ``kept`` is bool, or None where all are kept.
    """

    added: torch.Tensor
    kept: torch.Tensor | None
    fill: float


class _Plan(NamedTuple):
    """The mask of a call: for the kernel, and for rows that are computed as they were written."""

    kernel: torch.Tensor
    """What the kernel adds, [B|1, H|1, n_q|1, n_k|1]: the same softmax in the rows that are not alone."""
    alone: torch.Tensor | None
    """The other rows, bool [B|1, H|1, n_q|1, 1]; None where there are none."""
    written: AddedMask
    """As it was given, each tensor [B|1, H|1, n_q|1, n_k|1]."""


def _fit(mask: torch.Tensor, scores: tuple[int, ...]) -> torch.Tensor:
    """A mask as [B|1, H|1, n_q|1, n_k|1]; axes that only repeat have size 1.

    Raises:
        ShapeError: it does not broadcast to the scores.
    """
    four = mask[(None,) * (4 - mask.ndim)]
    if four.ndim > 4 or any(have not in (1, want) for have, want in zip(four.shape, scores, strict=True)):
        raise ShapeError(f"a mask of shape {tuple(mask.shape)} does not broadcast to the scores {scores}")
    for axis in range(4):
        if four.stride(axis) == 0 and four.shape[axis] > 1:
            four = four.narrow(axis, 0, 1)
    return four


def _cast(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A mask in a dtype that the kernel takes beside q; what was finite stays so."""
    wide = accumulator(q.dtype)
    if mask.dtype in (q.dtype, wide):
        return mask
    if mask.dtype == torch.float64:
        limits = torch.finfo(wide)
        mask = torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max))
    return mask.to(wide)


def _plan(mask: AddedMask, q: torch.Tensor, k: torch.Tensor) -> _Plan:
    scores = (*q.shape[:-1], k.shape[-2])
    added = _fit(mask.added, scores)
    if not added.is_floating_point():
        added = added.to(q.dtype)
    kept = None if mask.kept is None else _fit(mask.kept, scores)
    kernel = _cast(added, q)
    if kept is not None:
        kernel = torch.where(kept, kernel, -math.inf)
    top = kernel.amax(-1, keepdim=True)
    near = top.abs() <= NEAR
    alone = ~(top.abs() <= FAR)  # NaN is far
    moved = ~(near | alone)
    if bool(moved.any()):
        wide = accumulator(q.dtype)
        kernel = kernel.to(wide) - torch.where(moved, top, 0).to(wide)
    return _Plan(kernel, alone if bool(alone.any()) else None, AddedMask(added, kept, mask.fill))


# -- rows as they were written ---------------------------------------------------------------------------------------


def _written(operands: Operands, mask: AddedMask, scale: float) -> torch.Tensor:
    """The attention that stood in the model, for some rows: q [h, rows, d], k [h, n_k, d], mask [h, rows, n_k]."""
    q, k, v = operands
    scores = q @ k.mT * scale + mask.added
    if mask.kept is not None:
        scores = torch.where(mask.kept, scores, mask.fill)
    return torch.softmax(scores, -1).to(v.dtype) @ v


class _Part(NamedTuple):
    """Some rows of some heads of one batch element."""

    batch: int
    heads: slice
    keys: slice
    """The key heads that serve these heads."""
    rows: torch.Tensor
    """Positions, int64 [rows]."""

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor [B, H, n_q, ·], by key head: [key heads, groups · rows, ·]."""
        return self._by_key_head(x[self.batch, self.heads][:, self.rows])

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.batch, self.keys]

    def _by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        serving = self.keys.stop - self.keys.start
        return x.reshape(serving, x.shape[0] // serving * x.shape[1], x.shape[2])

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Operands:
        return self.of_queries(q), self.of_keys(k), self.of_keys(v)

    def mask(self, mask: AddedMask) -> AddedMask:
        return AddedMask(self._of_mask(mask.added), None if mask.kept is None else self._of_mask(mask.kept), mask.fill)

    def _of_mask(self, x: torch.Tensor) -> torch.Tensor:
        """As ``of_queries``, of a tensor whose axes may have size 1; the last one may stay so."""
        some = x[self.batch if x.shape[0] > 1 else 0]
        some = some[self.heads] if some.shape[0] > 1 else some
        some = some[:, self.rows] if some.shape[1] > 1 else some
        return self._by_key_head(some.expand(self.heads.stop - self.heads.start, len(self.rows), -1))

    def write(self, into: torch.Tensor, rows: torch.Tensor) -> None:
        """The inverse of ``of_queries``."""
        target = into[self.batch, self.heads]
        target.index_copy_(1, self.rows, rows.reshape(target.shape[0], len(self.rows), target.shape[-1]))


def _parts(alone: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Iterator[_Part]:
    """The rows that are computed as written, a few at a time; heads go together where their mask is the same."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    together = alone.shape[1] == 1
    for b in range(q.shape[0]):
        for h in range(alone.shape[1]):
            flags = alone[b if alone.shape[0] > 1 else 0, h, :, 0].expand(q.shape[2])
            mine = slice(0, heads) if together else slice(h, h + 1)
            keys = slice(0, k.shape[1]) if together else slice(h // groups, h // groups + 1)
            rows, step = flags.nonzero().squeeze(1), max(1, ROWS // (mine.stop - mine.start))
            for at in range(0, len(rows), step):
                yield _Part(b, mine, keys, rows[at : at + step])


def _row_gradients(
    parts: Iterator[_Part], g: torch.Tensor, tensors: Operands, mask: AddedMask, scale: float, made: Operands
) -> None:
    """Gradients of :func:`_written`: those of the rows of q are written to ``made``, what k and v get is added."""
    dq, dk, dv = made
    for part in parts:
        q, k, v = (x.detach().requires_grad_() for x in part.operands(*tensors))
        out = _written((q, k, v), part.mask(mask), scale)
        got = torch.autograd.grad(out, (q, k, v), part.of_queries(g))
        part.write(dq, got[0])
        part.of_keys(dk).add_(got[1])
        part.of_keys(dv).add_(got[2])


# -- the operators ---------------------------------------------------------------------------------------------------


def _kernel(q: torch.Tensor) -> Fused:
    kernel = targets.fused_kernel(q)
    if kernel is None or not kernel.masked:
        raise DeviceError(f"attention with an added mask is trained on CPUs only, got {q.device}")
    return kernel


def forward(tensors: Operands, mask: AddedMask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, H, n, ·] tensors, and the log-sum-exp that :func:`backward` takes.

    Returns:
        [B, H, n_q, e]; [B, H, n_q] in the accumulator's dtype, of no meaning for rows that are computed as written.
    Raises:
        DeviceError: tensors that are not on a CPU.
        ShapeError: the mask does not fit.
    """
    q, k, v = tensors
    kernel, wide = _kernel(q), accumulator(q.dtype)
    if 0 in (*q.shape[:-1], *v.shape[-2:]):  # nothing to sum, and nothing that torch's kernel survives
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1], dtype=wide)
    plan = _plan(mask, q, k)
    out, lse = exact.fused_forward(kernel, q, k, v, ExactSoftmax(scale, NONE), plan.kernel)
    if plan.alone is not None:
        for part in _parts(plan.alone, q, k):
            part.write(out, _written(part.operands(q, k, v), part.mask(plan.written), scale))
    return out, lse.to(wide)


def backward(
    g: torch.Tensor, tensors: Operands, mask: AddedMask, out: torch.Tensor, lse: torch.Tensor, scale: float
) -> Operands:
    """Gradients of :func:`forward` by q, k and v, of their dtypes.

    Raises:
        DeviceError, ShapeError: as :func:`forward`.
    """
    q, k, v = tensors
    kernel, wide = _kernel(q), accumulator(q.dtype)
    if 0 in (*q.shape[:-1], *v.shape[-2:]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    plan, softmax = _plan(mask, q, k), ExactSoftmax(scale, NONE)
    if plan.alone is None:
        return exact.fused_backward(kernel, g, tensors, out, lse, softmax, plan.kernel)
    # To the kernel the other rows have weights exp(-inf), no output and no gradient.
    rest = g.masked_fill(plan.alone, 0), out.masked_fill(plan.alone, 0)
    quiet = lse.masked_fill(plan.alone.squeeze(-1), math.inf)
    dq, dk, dv = exact.fused_backward(kernel, rest[0], tensors, rest[1], quiet, softmax, plan.kernel)
    made = dq, dk.to(wide), dv.to(wide)
    # Inside an operator autograd is off; in a thread of its own it is on, whatever the caller is in the middle of.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_row_gradients, _parts(plan.alone, q, k), g, tensors, plan.written, scale, made).result()
    return dq, made[1].to(k.dtype), made[2].to(v.dtype)


@torch.library.custom_op(
    "polyattn::masked_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? kept, float fill, float scale, str version) "
    "-> (Tensor, Tensor)",
)
def _masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    kept: torch.Tensor | None,
    fill: float,
    scale: float,
    version: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        out, lse = forward((q, k, v), AddedMask(mask, kept, fill), scale)
        return exact.tokens_first(out), lse


@_masked.register_fake
def _(q: Any, k: Any, v: Any, mask: Any, kept: Any, fill: Any, scale: Any, version: Any) -> Any:
    ops.check(q, k, v)
    return exact.empty_tokens_first(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "polyattn::masked_attention_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? kept, Tensor out, Tensor lse, float fill, "
    "float scale, str version, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _masked_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    kept: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    fill: float,
    scale: float,
    version: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        made = backward(g, (q, k, v), AddedMask(mask, kept, fill), out, lse, scale)
    dq, dk, dv = (exact.tokens_first(x) if need else x.new_zeros(0) for need, x in zip(needs, made, strict=True))
    return dq, dk, dv


@_masked_backward.register_fake
def _(g: Any, q: Any, k: Any, v: Any, *others: Any) -> Any:
    return ops.fake_gradients((q, k, v), others[-1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, kept, fill, scale, version = inputs
    if ctx.needs_input_grad[3]:
        raise PolyattnError("masked_attention has no gradient of the mask; detach it")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, kept, out, lse)
    ctx.numbers = fill, scale, version


def _backward(ctx: Any, g: torch.Tensor, unused: Any) -> Any:
    needs = list(ctx.needs_input_grad[:3])
    made = torch.ops.polyattn.masked_attention_backward(g, *ctx.saved_tensors, *ctx.numbers, needs)
    return (*(x if need else None for x, need in zip(made, needs, strict=True)), None, None, None, None, None)


def _twice(ctx: Any, *unused: Any) -> Any:
    raise DoubleBackwardError(
        "the backward of attention with an added mask is not differentiable itself; for gradients of gradients use the "
        "model without backend='polyattn'"
    )


_masked.register_autograd(_backward, setup_context=_setup)
_masked_backward.register_autograd(_twice, setup_context=lambda ctx, inputs, output: None)
