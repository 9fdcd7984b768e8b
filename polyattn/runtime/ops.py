"""The operators that stand in the graph, ``polyattn::attention`` and its backward, and ``polyattn.attention``.

The forward takes its site's decision (:mod:`polyattn.runtime.registry`), runs the low-rank kernels
(:mod:`polyattn.runtime.execute`) or exact attention, audits (:mod:`polyattn.runtime.audit`), and hands the plan to its
backward with the saved tensors.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyattn.errors import DeviceError, DoubleBackwardError, DtypeError, ShapeError
from polyattn.options import Options
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.runtime import exact as dense
from polyattn.runtime import execute, fits, policy, registry
from polyattn.runtime import key_mask as masking
from polyattn.runtime.call import attempt
from polyattn.runtime.exact import ExactSoftmax
from polyattn.runtime.execute import accumulator
from polyattn.runtime.observe import observers
from polyattn.site_plan import EXACT, SitePlan, intern, interned

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def _version() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for folder in (root, root / "rewriter", root / "passes", root / "codegen"):  # links, which rglob does not follow
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


VERSION = _version()
"""Hash of this package's sources: an argument of the ops, so that torch's caches never keep a stale backward."""


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Named errors for tensors that do not make an attention.

    Raises:
        ShapeError, DtypeError, DeviceError: the message says which tensors and what to change.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if q.dtype not in DTYPES:
        raise DtypeError(f"attention needs float16, bfloat16, float32 or float64, got {q.dtype}; cast q, k and v")
    if not q.device == k.device == v.device:
        raise DeviceError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}; move them")
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ShapeError("q, k and v need at least the axes [tokens, head_dim]")
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"head dims of q and k differ: {q.shape[-1]} and {k.shape[-1]}; project them to the same head_dim"
        )
    if k.shape[-2] != v.shape[-2]:
        raise ShapeError(f"k has {k.shape[-2]} tokens and v {v.shape[-2]}; they must be the same tokens")


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    names = ("batch", "heads", "kv_heads", "n_q", "n_k", "d", "e")
    return dict(
        zip(names, (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]), strict=True)
    )


@functools.lru_cache(maxsize=256)
def _options(key: str) -> Options:
    return Options.from_key(key)


@functools.lru_cache(maxsize=1024)
def _site_plan(options: str, causal: bool, scale: float, d: int, device: str, padding: bool) -> SitePlan:
    return SitePlan.of(_options(options), causal, scale, d, device, padding)


@torch.library.custom_op(
    "polyattn::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor[] owners, float scale, bool causal, str site, "
    "str options, str version) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None,
    owners: Sequence[torch.Tensor],
    scale: float,
    causal: bool,
    site: str,
    options: str,
    version: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    opts = _options(options)
    plain = _site_plan(options, causal, scale, q.shape[-1], q.device.type, keep is not None)
    wide = accumulator(q.dtype)
    if q.numel() == 0 or k.numel() == 0:  # nothing to decide, and nothing that torch's kernel survives
        out, stat = dense.empty_tokens_first(q, v.shape[-1]).zero_(), q.new_zeros(q.shape[:-1], dtype=wide)
        return out, stat, fits.nothing(k, opts), torch.tensor([EXACT])
    pointers = tuple(owner.data_ptr() for owner in owners)
    key = registry.Key(site, pointers, options, causal, scale, q.shape[-1], v.shape[-1])
    entry = registry.find(key, lambda: policy.decide(_shape(q, k, v), plain, opts))
    record = registry.enter(entry, opts, q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        made, fit, plan = None, None, plain
        if record.low_rank:
            made, plan, fit = attempt(entry, record, (q, k, v), opts, keep)
        registry.leave(entry, record, made is not None, fit, q, k, v)
        # operators may not return what they keep
        fitted = fits.nothing(k, opts) if fit is None else fit.values.clone()
        if made is None:
            out, stat = dense.forward(q, k, v, plain, keep)
            out, stat = dense.tokens_first(out), stat.to(wide)
        else:
            out = dense.tokens_first(made.out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype))
            stat = made.denominators.reshape(q.shape[:-1])
        for observer in observers():
            used = None if made is None else plan
            observer.forward(entry, (q, k, v), out, used, fit, keep)
        return out, stat, fitted, torch.tensor([intern(plan) if made is not None else EXACT])


@_attention.register_fake
def _(
    q: Any, k: Any, v: Any, keep: Any, owners: Any, scale: Any, causal: Any, site: Any, options: Any, version: Any
) -> Any:
    check(q, k, v)
    wide = accumulator(q.dtype)
    out = dense.empty_tokens_first(q, v.shape[-1])
    stat = q.new_empty(q.shape[:-1], dtype=wide)
    fitted = q.new_empty(fits.packed_shape(k, _options(options)), dtype=wide)
    return out, stat, fitted, torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "polyattn::attention_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor stat, Tensor fitted, "
    "Tensor plan, float scale, bool causal, str version, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None,
    out: torch.Tensor,
    stat: torch.Tensor,
    fitted: torch.Tensor,
    plan: torch.Tensor,
    scale: float,
    causal: bool,
    version: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        made: tuple[torch.Tensor | None, ...]
        mask, forward = CAUSAL if causal else NONE, interned(int(plan))
        if q.numel() == 0 or k.numel() == 0:
            made = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        elif forward is not None:
            packed = fitted if fitted.numel() else None
            made = execute.backward(g, q, k, v, out, stat, forward, packed, needs, keep)
        else:
            made = dense.backward(g, (q, k, v), out, stat, ExactSoftmax(scale, mask), keep)
    results = []
    for need, x, like in zip(needs, made, (q, k, v), strict=True):
        if need and x is not None:
            results.append(dense.tokens_first(x.reshape(like.shape).to(like.dtype)))
        else:
            results.append(like.new_zeros(0))
    for observer in observers():
        given = [x if need else None for need, x in zip(needs, results, strict=True)]
        observer.backward(g, (q, k, v), mask, given, keep)
    return results[0], results[1], results[2]


def fake_gradients(tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[Any, ...]:
    """What a backward operator returns, as memory: a gradient for each tensor that needs one, nothing for the rest."""
    return tuple(
        dense.empty_tokens_first(like, like.shape[-1]) if need else like.new_empty(0)
        for need, like in zip(needs, tensors, strict=True)
    )


@_attention_backward.register_fake
def _(
    g: Any,
    q: Any,
    k: Any,
    v: Any,
    keep: Any,
    out: Any,
    stat: Any,
    fitted: Any,
    plan: Any,
    scale: Any,
    causal: Any,
    version: Any,
    needs: Any,
) -> Any:
    return fake_gradients((q, k, v), needs)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, keep, owners, scale, causal, _, _, version = inputs
    out, stat, fitted, plan = output
    ctx.mark_non_differentiable(stat, fitted, plan)
    ctx.save_for_backward(q, k, v, keep, out, stat, fitted, plan)
    ctx.scale, ctx.causal, ctx.version, ctx.owners = scale, causal, version, len(owners)


def _backward(ctx: Any, g: torch.Tensor, *unused: Any) -> Any:
    needs = list(ctx.needs_input_grad[:3])
    made = torch.ops.polyattn.attention_backward(g, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.version, needs)
    gradients = [x if need else None for x, need in zip(made, needs, strict=True)]
    return (*gradients, None, [None] * ctx.owners, None, None, None, None, None)


def _twice(ctx: Any, *unused: Any) -> Any:
    raise DoubleBackwardError(
        "polyattn's backward is not differentiable itself; for gradients of gradients use the model without "
        "backend='polyattn' (or torch's scaled_dot_product_attention)"
    )


_attention.register_autograd(_backward, setup_context=_setup)
_attention_backward.register_autograd(_twice, setup_context=lambda ctx, inputs, output: None)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Softmax attention, low rank where the policy allows it; differentiable once.

    Args:
        q: [..., heads, n_q, d]; k: [..., kv_heads, n_k, d]; v: [..., kv_heads, n_k, e]; kv_heads divides heads.
            [tokens, head_dim] is one head.
        key_mask: boolean, [..., n_k] or [n_k], the same for all heads: True where a key takes part, for each batch
            element, also with ``causal``. Where a query sees no key the output is zero.
        causal: query i sees keys j ≤ i (torch's ``is_causal``, also for n_q ≠ n_k).
        scale: factor of the logits, 1/√d by default.
        options: an Options or a mapping of its fields.
    Returns:
        [..., heads, n_q, e], in the dtype of q.
    Raises:
        ShapeError, DtypeError, DeviceError: inputs that do not fit together.
        UnknownOptionError, OptionValueError: bad options.
    """
    opts = Options.make(options)
    check(q, k, v)
    if not (q.ndim == k.ndim == v.ndim) or q.shape[:-3] != k.shape[:-3] or k.shape[:-2] != v.shape[:-2]:
        raise ShapeError(
            f"q, k and v must have the same leading axes, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.ndim >= 3 and q.shape[-3] % k.shape[-3]:
        raise ShapeError(f"{q.shape[-3]} query heads cannot be shared out over {k.shape[-3]} key heads")
    lead = q.shape[:-3]
    q4, k4, v4 = (x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)] for x in (q, k, v))
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    site = "polyattn.attention"
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        site = f"polyattn.attention at {frame.f_code.co_filename}:{frame.f_lineno}"

    keep = None if key_mask is None else masking.expanded(key_mask, k)
    out: torch.Tensor = torch.ops.polyattn.attention(q4, k4, v4, keep, [], factor, causal, site, opts.key(), VERSION)[0]
    return out.reshape(*(lead if q.ndim > 3 else ()), *q.shape[-3:-1], v.shape[-1])
