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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from polyattn.codegen import targets
from polyattn.codegen.target import Fused
from polyattn.errors import DoubleBackwardError, PolyattnError
from polyattn.passes.match.changes import Change, Changes
from polyattn.rewriter.masks.mask import NONE
from polyattn.runtime import exact, ops, written
from polyattn.runtime.exact import ExactSoftmax
from polyattn.runtime.execute import accumulator
from polyattn.runtime.written import Operands, ScoreMask

NEAR = 64.0
"""Up to here a weight that is recomputed from lse is off by no more than 64 units of the last place."""
FAR = 8192.0
"""Up to here a score in float32 keeps three digits beside M; beyond, what eager attention rounds away is rounded
away."""


class _Plan(NamedTuple):
    """The mask of a call: for the kernel, and for rows that are computed as they were written."""

    kernel: torch.Tensor
    """What the kernel adds, [B|1, H|1, n_q|1, n_k|1]: the same softmax in the rows that are not alone."""
    alone: torch.Tensor | None
    """The other rows, bool [B|1, H|1, n_q|1, 1]; None where there are none."""


def _cast(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A mask in a dtype that the kernel takes beside q; what was finite stays so."""
    wide = accumulator(q.dtype)
    if mask.dtype in (q.dtype, wide):
        return mask
    if not mask.is_floating_point():
        return mask.to(q.dtype)
    if mask.dtype == torch.float64:
        limits = torch.finfo(wide)
        mask = torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max))
    return mask.to(wide)


def _plan(mask: ScoreMask, q: torch.Tensor, k: torch.Tensor) -> _Plan:
    kernel, kept = _sums(mask, q, k)
    if kept is not None:
        kernel = torch.where(kept, kernel, -math.inf)
    kinds = [step.kind for step, _ in mask.steps]
    if kinds != sorted(kinds):  # what is added to scores that were replaced may bring them back
        return _Plan(kernel, torch.ones_like(kernel[:1, :1, :1, :1], dtype=torch.bool))
    top = kernel.amax(-1, keepdim=True)
    near = top.abs() <= NEAR
    alone = ~(top.abs() <= FAR)  # NaN is far
    moved = ~(near | alone)
    if bool(moved.any()):
        wide = accumulator(q.dtype)
        kernel = kernel.to(wide) - torch.where(moved, top, 0).to(wide)
    return _Plan(kernel, alone if bool(alone.any()) else None)


def _sums(mask: ScoreMask, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All that is added, and where scores are kept (None: everywhere)."""
    added: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    seen = ~(torch.arange(k.shape[-2], device=q.device) > torch.arange(q.shape[-2], device=q.device)[:, None])
    for step, tensor in mask.steps:
        if step.kind == "add":
            part = q.new_zeros(1, 1, 1, 1) if tensor is None else _cast(tensor, q)
            part = torch.where(seen, part, step.fill) if step.causal else part
            added = part if added is None else added + part
        else:
            shown = tensor
            if step.causal:
                shown = seen[None, None] if shown is None else shown & seen
            if shown is not None:
                kept = shown if kept is None else kept & shown
    return q.new_zeros(1, 1, 1, 1) if added is None else added, kept


# -- torch's attention -----------------------------------------------------------------------------------------------


def _kernel(q: torch.Tensor) -> Fused | None:
    """The fused kernel of a device that takes added masks; None where there is none."""
    kernel = targets.fused_kernel(q)
    return kernel if kernel is not None and kernel.masked else None


def kernel_takes_masks(q: torch.Tensor) -> bool:
    """Whether the fused kernel of a device, where it has one, takes added masks; else torch chooses another."""
    kernel = targets.fused_kernel(q)
    return kernel is None or kernel.masked


def _any_kernel(tensors: Operands, added: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention that torch chooses for a device."""
    q, k, v = tensors
    out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, added.to(q.dtype), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


def _any_backward(g: torch.Tensor, tensors: Operands, added: torch.Tensor, scale: float) -> Operands:
    """Gradients of :func:`_any_kernel`, which runs again; in a thread of its own, where autograd is on."""

    def run() -> Operands:
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        dq, dk, dv = torch.autograd.grad(_any_kernel((q, k, v), added, scale), (q, k, v), g)
        return dq, dk, dv

    return written.with_autograd(run)


def forward(tensors: Operands, mask: ScoreMask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, H, n, ·] tensors, and the log-sum-exp that :func:`backward` takes.

    Returns:
        [B, H, n_q, e]; [B, H, n_q] in the accumulator's dtype, of no meaning for rows that are computed as written.
    """
    q, k, v = tensors
    kernel, wide = _kernel(q), accumulator(q.dtype)
    if 0 in (*q.shape[:-1], *v.shape[-2:]):  # nothing to sum, and nothing that torch's kernel survives
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1], dtype=wide)
    plan = _plan(mask, q, k)
    if kernel is not None:
        out, lse = exact.fused_forward(kernel, q, k, v, ExactSoftmax(scale, NONE), plan.kernel)
    else:
        out, lse = _any_kernel(tensors, plan.kernel, scale), q.new_zeros(q.shape[:-1])
    if plan.alone is not None:
        written.write_rows(out, plan.alone, tensors, mask, scale)
    return out, lse.to(wide)


def backward(
    g: torch.Tensor, tensors: Operands, mask: ScoreMask, out: torch.Tensor, lse: torch.Tensor, scale: float
) -> Operands:
    """Gradients of :func:`forward` by q, k and v, of their dtypes."""
    q, k, v = tensors
    kernel, wide = _kernel(q), accumulator(q.dtype)
    if 0 in (*q.shape[:-1], *v.shape[-2:]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    plan, softmax = _plan(mask, q, k), ExactSoftmax(scale, NONE)
    if plan.alone is not None:
        # To the kernel the other rows have weights exp(-inf), no output and no gradient.
        quiet = plan.alone.squeeze(-1)
        g_rest, out, lse = (
            g.masked_fill(plan.alone, 0),
            out.masked_fill(plan.alone, 0),
            lse.masked_fill(quiet, math.inf),
        )
    else:
        g_rest = g
    if kernel is not None:
        dq, dk, dv = exact.fused_backward(kernel, g_rest, tensors, out, lse, softmax, plan.kernel)
    else:
        dq, dk, dv = _any_backward(g_rest, tensors, plan.kernel, scale)
    if plan.alone is None:
        return dq, dk, dv
    made = dq, dk.to(wide), dv.to(wide)
    written.add_gradients(made, g, plan.alone, tensors, mask, scale)
    return dq, made[1].to(k.dtype), made[2].to(v.dtype)


# -- the operators ---------------------------------------------------------------------------------------------------


def _mask(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, kept: torch.Tensor | None, fill: float) -> ScoreMask:
    steps = (Change("add"), *([] if kept is None else [Change("replace", fill)]))
    tensors = [mask, *([] if kept is None else [kept])]
    return ScoreMask.of(Changes(steps), tensors, (*q.shape[:-1], k.shape[-2]))


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
        out, lse = forward((q, k, v), _mask(q, k, mask, kept, fill), scale)
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
        made = backward(g, (q, k, v), _mask(q, k, mask, kept, fill), out, lse, scale)
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
