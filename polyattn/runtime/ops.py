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

from polyattn.errors import DeviceError, DoubleBackwardError, DtypeError, PolyattnError, ShapeError
from polyattn.options import Options
from polyattn.passes.match.changes import NOTHING, Change, Changes
from polyattn.passes.replace.splice import OUTPUTS
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.runtime import exact, execute, fits, policy, registry
from polyattn.runtime import key_mask as masking
from polyattn.runtime.call import attempt
from polyattn.runtime.call_masks import Masks, nothing_hidden
from polyattn.runtime.execute import accumulator
from polyattn.runtime.observe import observers
from polyattn.site_plan import EXACT, ExactPlan, SitePlan, intern, interned

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


def _may_be_low_rank(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: str, causal: bool, scale: float, differentiated: bool
) -> bool:
    """Whether a call with masks can be low rank, if they show that it may."""
    plans = _site_plans(options, causal, scale, q.shape[-1], q.device.type, True, differentiated)
    return not policy.why_exact(tuple(_shape(q, k, v).items()), plans, options)


@functools.lru_cache(maxsize=1024)
def _site_plans(
    options: str, causal: bool, scale: float, d: int, device: str, padding: bool, differentiated: bool
) -> tuple[SitePlan, ...]:
    return SitePlan.all_of(_options(options), causal, scale, d, device, padding, differentiated)


@torch.library.custom_op(
    "polyattn::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] masks, Tensor[] owners, float scale, bool causal, str changes, "
    "bool differentiated, str site, str options, str version) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: Sequence[torch.Tensor],
    owners: Sequence[torch.Tensor],
    scale: float,
    causal: bool,
    changes: str,
    differentiated: bool,
    site: str,
    options: str,
    version: str,
) -> tuple[torch.Tensor, ...]:
    opts, wide = _options(options), accumulator(q.dtype)
    if q.numel() == 0 or k.numel() == 0:  # nothing to decide, and nothing that torch's kernel survives
        out, stat = exact.empty_tokens_first(q, v.shape[-1]).zero_(), q.new_zeros(q.shape[:-1], dtype=wide)
        return out, stat, fits.nothing(k, opts), torch.tensor([EXACT]), *nothing_hidden(masks, q, k)
    useful = bool(masks) and _may_be_low_rank(q, k, v, options, causal, scale, differentiated)
    call = Masks.of(masks, changes, CAUSAL if causal else NONE, q, k, useful)
    padding = call.keep is not None
    plans = _site_plans(options, call.mask.is_causal, scale, q.shape[-1], q.device.type, padding, differentiated)
    plain = plans[0]
    pointers = tuple(owner.data_ptr() for owner in owners)
    seen = policy.OTHER if call.other else plain.seen
    key = registry.Key(
        site, pointers, options, seen, scale, q.shape[-1], v.shape[-1], all(plan.differentiated for plan in plans)
    )
    shape = _shape(q, k, v)
    entry = registry.find(key, lambda: call.decide(shape, plans, opts))
    record = registry.enter(entry, opts, q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        made, fit, plan = None, None, plain
        if record.low_rank:
            made, plan, fit = attempt(entry, record, (q, k, v), opts, call.keep)
        registry.leave(entry, record, None if made is None else plan, fit, q, k, v)
        # operators may not return what they keep
        fitted = fits.nothing(k, opts) if fit is None or made is None else made.packed(fit)
        executed: SitePlan | ExactPlan | None = plan
        if made is None:
            out, stat, executed = call.exact((q, k, v), scale)
            out, stat = exact.tokens_first(out), stat.to(wide)
        else:
            out = exact.tokens_first(made.out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype))
            stat = made.denominators.reshape(q.shape[:-1])
        for observer in observers():
            used = None if made is None else plan
            observer.forward(entry, (q, k, v), out, used, fit, call.keep)
        call.write_lost(out, (q, k, v), scale)
        return out, stat, fitted, torch.tensor([intern(executed)]), *call.hidden(q, k)


@_attention.register_fake
def _(
    q: Any,
    k: Any,
    v: Any,
    masks: Any,
    owners: Any,
    scale: Any,
    causal: Any,
    changes: Any,
    differentiated: Any,
    site: Any,
    options: Any,
    version: Any,
) -> Any:
    check(q, k, v)
    wide = accumulator(q.dtype)
    out = exact.empty_tokens_first(q, v.shape[-1])
    stat = q.new_empty(q.shape[:-1], dtype=wide)
    fitted = q.new_empty(fits.packed_shape(k, _options(options)), dtype=wide)
    return out, stat, fitted, torch.empty(1, dtype=torch.int64, device="cpu"), *nothing_hidden(masks, q, k)


@torch.library.custom_op(
    "polyattn::attention_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor q, Tensor k, Tensor v, Tensor[] masks, Tensor out, Tensor stat, Tensor fitted, "
    "Tensor plan, Tensor kept, Tensor lost, float scale, bool causal, str changes, str version, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: Sequence[torch.Tensor],
    out: torch.Tensor,
    stat: torch.Tensor,
    fitted: torch.Tensor,
    plan: torch.Tensor,
    kept: torch.Tensor,
    lost: torch.Tensor,
    scale: float,
    causal: bool,
    changes: str,
    version: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        made: tuple[torch.Tensor | None, ...]
        executed = interned(int(plan))
        call = Masks.again(masks, changes, executed, CAUSAL if causal else NONE, kept, lost, q, k)
        rest, out = call.without_lost(g), call.without_lost(out)
        if q.numel() == 0 or k.numel() == 0:
            made = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        elif isinstance(executed, SitePlan):
            packed = fitted if fitted.numel() else None
            made = execute.backward(rest, q, k, v, out, stat, executed, packed, needs, call.keep)
        else:
            made = call.exact_backward(rest, (q, k, v), out, stat, scale)
        results = []
        for need, x, like in zip(needs, made, (q, k, v), strict=True):
            results.append(x.reshape(like.shape) if need and x is not None else None)
        for observer in observers():
            observer.backward(g, (q, k, v), call.mask, results, call.keep)
        results = call.add_lost_gradients(results, g, (q, k, v), scale)
    dq, dk, dv = (
        like.new_zeros(0) if x is None else exact.tokens_first(x.to(like.dtype))
        for x, like in zip(results, (q, k, v), strict=True)
    )
    return dq, dk, dv


def fake_gradients(tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[Any, ...]:
    """What a backward operator returns, as memory: a gradient for each tensor that needs one, nothing for the rest."""
    return tuple(
        exact.empty_tokens_first(like, like.shape[-1]) if need else like.new_empty(0)
        for need, like in zip(needs, tensors, strict=True)
    )


@_attention_backward.register_fake
def _(g: Any, q: Any, k: Any, v: Any, *others: Any) -> Any:
    return fake_gradients((q, k, v), others[-1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, masks, owners, scale, causal, changes, _, _, _, version = inputs
    if any(mask.requires_grad for mask in masks):
        raise PolyattnError("polyattn::attention has no gradient of a mask; detach it")
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output, *masks)
    ctx.scale, ctx.causal, ctx.changes, ctx.version = scale, causal, changes, version
    ctx.owners = len(owners)


def _backward(ctx: Any, g: torch.Tensor, *unused: Any) -> Any:
    needs = list(ctx.needs_input_grad[:3])
    q, k, v, *rest = ctx.saved_tensors
    output, masks = rest[:OUTPUTS], rest[OUTPUTS:]
    made = torch.ops.polyattn.attention_backward(
        g, q, k, v, masks, *output, ctx.scale, ctx.causal, ctx.changes, ctx.version, needs
    )
    gradients = [x if need else None for x, need in zip(made, needs, strict=True)]
    return (*gradients, [None] * len(masks), [None] * ctx.owners, *[None] * 7)


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

    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    masks, changes = [], NOTHING
    if key_mask is not None:
        masks = [masking.expanded(key_mask, k)[:, None, None]]
        changes = Changes((Change("replace", causal=causal),), zero=True)
    out: torch.Tensor = torch.ops.polyattn.attention(
        q4, k4, v4, masks, [], factor, causal, changes.text(), differentiated, site, opts.key(), VERSION
    )[0]
    return out.reshape(*(lead if q.ndim > 3 else ()), *q.shape[-3:-1], v.shape[-1])
